"""net.py: the network, its input and its predictions, compared with those of PyTorch's example."""

import pytest
import torch

import example
import net
from stage import dataset, weights


@pytest.fixture(scope="module")
def images(data):
    return dataset.read_split(data, "t10k")[0][:100]


def test_a_checkpoint_of_the_examples_network_has_the_same_keys_shapes_and_types_and_loads(tmp_path):
    expected = example.untrained(seed=5).state_dict()
    torch.save(expected, tmp_path / "mnist_cnn.pt")
    model = net.Net()
    weights.load_model(model, tmp_path)
    assert all(tensor.equal(expected[key]) for key, tensor in model.state_dict().items())


def test_the_predictions_are_those_of_the_examples_network(trained, images):
    model = net.Net()
    weights.load_model(model, trained)
    expected = example.predict(example.load(trained / "mnist_cnn.pt"), images)
    torch.testing.assert_close(net.predict(model, images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_predictions_do_not_depend_on_batches_and_threads(images, threads):
    model = net.Net()
    expected = net.predict(model, images)
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(net.predict(model, images, batch_size=7), expected)
    finally:
        torch.set_num_threads(1)


def test_a_network_in_training_mode_still_predicts_without_dropout(images):
    model = net.Net().train()
    torch.testing.assert_close(net.predict(model, images), net.predict(model.train(), images))


def test_where_torch_lacks_onednn_the_predictions_are_the_same(images, monkeypatch):
    def fail(tensor):
        raise RuntimeError("PyTorch is built without MKL-DNN")

    model = net.Net()
    expected = net.predict(model, images)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", fail)
    torch.testing.assert_close(net.predict(model, images), expected, atol=1e-4, rtol=1e-4)
