"""net.py, the contract of the three images: the network, its checkpoints, and how files are published."""

import errno
import io
import os
import pickle
import stat
import threading
from pathlib import Path

import artifacts
import example
import net
import pytest
import torch


class RunsCode:
    """A pickle of this makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def altered(**tensors):
    """A state dict of an untrained network, with other tensors in the place of some; `_` in a name stands for a dot."""
    return example.untrained().state_dict() | {name.replace("_", "."): tensor for name, tensor in tensors.items()}


def saved(content):
    """What torch.save makes of it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# The network ----------------------------------------------------------------------------------------------------------


def test_the_network_has_21840_parameters():
    assert sum(parameter.numel() for parameter in net.Net().parameters()) == 21_840


def test_the_state_dict_has_the_examples_keys_shapes_and_types():
    def form(model):
        return [(key, tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()]

    assert form(net.Net()) == form(example.ExampleNet())


def test_both_networks_say_the_same_of_the_test_images(data, trained):
    images, _ = example.read_test_images(data)
    model, _ = net.load_model(trained / "mnist_cnn.pt")
    expected = example.read_digits(example.load(trained / "mnist_cnn.pt"), images[:500])
    torch.testing.assert_close(net.predict(model, images[:500]), expected, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_the_examples_network_loads(tmp_path):
    torch.save(example.untrained(seed=5).state_dict(), tmp_path / "mnist_cnn.pt")
    model, _ = net.load_model(tmp_path / "mnist_cnn.pt")
    for key, tensor in example.untrained(seed=5).state_dict().items():
        assert model.state_dict()[key].equal(tensor)


def test_the_input_is_normalised_as_in_the_example():
    images = torch.arange(2 * 28 * 28).remainder(256).to(torch.uint8).view(2, 28, 28)
    expected = ((images / 255 - 0.1307) / 0.3081).view(2, 1, 28, 28)
    torch.testing.assert_close(net.to_input(images), expected)


def test_predictions_do_not_depend_on_how_the_images_are_batched(data):
    images, _ = net.read_split(data, "t10k")
    model = net.Net()
    whole, parts = net.predict(model, images[:100]), net.predict(model, images[:100], batch_size=7)
    torch.testing.assert_close(whole, parts)


def test_a_network_in_training_mode_still_predicts_without_dropout(data):
    images, _ = net.read_split(data, "t10k")
    model = net.Net().train()
    torch.testing.assert_close(net.predict(model, images[:10]), net.predict(model, images[:10]))


def test_where_torch_lacks_onednn_the_predictions_are_the_same(data, monkeypatch):
    def fail(tensor):
        raise RuntimeError("PyTorch is built without MKL-DNN")

    images, _ = net.read_split(data, "t10k")
    model = net.Net()
    expected = net.predict(model, images[:100])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", fail)
    torch.testing.assert_close(net.predict(model, images[:100]), expected, atol=1e-4, rtol=1e-4)


# Checkpoints that are not good ----------------------------------------------------------------------------------------


NO_CHECKPOINTS = {
    "an empty file": b"",
    "text": b"no checkpoint",
    "a truncated checkpoint": saved(altered())[:40_000],
    "a checkpoint that lost its end": saved(altered())[:-1],
    "a list": saved([1, 2]),
    "a tensor": saved(torch.zeros(3)),
    "no keys at all": saved({}),
    "a key too many": saved(altered(conv3_weight=torch.zeros(1))),
    "keys under a prefix": saved({f"module.{key}": tensor for key, tensor in altered().items()}),
    "another shape": saved(altered(fc2_bias=torch.zeros(11))),
    "a shape that broadcasts": saved(altered(fc2_bias=torch.zeros(1))),
    "another type": saved(altered(fc2_bias=torch.zeros(10, dtype=torch.float64))),
    "a number for a tensor": saved(altered(fc2_bias=0.0)),
    "a sparse tensor": saved(altered(fc2_bias=torch.zeros(10).to_sparse())),
    "not a number": saved(altered(fc2_bias=torch.full((10,), torch.nan))),
    "infinity": saved(altered(conv1_weight=torch.full((10, 1, 5, 5), torch.inf))),
    "a whole module": saved(example.untrained()),
    "a file that is far too large": saved(altered()) + bytes(2_000_000),
}


@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS.keys())
def test_what_is_no_checkpoint_of_this_network_is_refused(tmp_path, content):
    path = tmp_path / "mnist_cnn.pt"
    path.write_bytes(content)
    with pytest.raises(artifacts.Failure, match=r"mnist_cnn\.pt .*--fresh"):
        net.load_model(path)


@pytest.mark.parametrize("save", [saved, pickle.dumps], ids=["saved by torch", "a plain pickle"])
def test_a_checkpoint_that_would_run_code_does_not_run_it(tmp_path, save):
    path = tmp_path / "mnist_cnn.pt"
    path.write_bytes(save({"conv1.weight": RunsCode(tmp_path / "ran")}))
    with pytest.raises(artifacts.Failure):
        net.load_model(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "a folder"])
def test_a_checkpoint_that_cannot_be_read_is_a_failure_that_names_it(tmp_path, make):
    make(tmp_path / "mnist_cnn.pt")
    with pytest.raises(artifacts.Failure, match=r"mnist_cnn\.pt"):
        net.load_model(tmp_path / "mnist_cnn.pt")


# Publishing -----------------------------------------------------------------------------------------------------------


def test_a_published_file_is_readable_by_all_and_nothing_is_left_beside_it(tmp_path):
    before = os.umask(0o077)
    try:
        artifacts.publish(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["file"]


def test_publishing_replaces_a_file_and_leaves_those_who_read_the_old_one_in_peace(tmp_path):
    artifacts.publish(tmp_path / "file", b"old and long")
    with open(tmp_path / "file", "rb") as reader:
        artifacts.publish(tmp_path / "file", b"new")
        assert reader.read() == b"old and long"
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch, call):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    artifacts.publish(tmp_path / "file", b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(artifacts.Failure, match="disk space"):
        artifacts.publish(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_crash_left_half_written_does_not_reach_the_next_file(tmp_path):
    (tmp_path / ".file.part").write_bytes(b"half of a much longer file")
    artifacts.publish(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_two_who_publish_the_same_file_at_once_leave_one_of_both_whole(tmp_path):
    contents = [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=artifacts.publish, args=(tmp_path / "file", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_publishing_into_a_folder_that_is_not_there_is_a_failure_that_names_the_file(tmp_path):
    with pytest.raises(artifacts.Failure, match="missing/file"):
        artifacts.publish(tmp_path / "missing" / "file", b"new")
