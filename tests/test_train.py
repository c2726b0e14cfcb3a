"""train as a process: what a training leaves, and that it resumes, trains on, starts over and repeats itself."""

import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

import stages
import train
from stage import process
from training import workers
from training.details.lock import volume_lock


def test_the_model_is_plain_numbers_and_the_same_as_in_the_last_checkpoint(trained):
    model, last = torch.load(trained / "mnist_cnn.pt", weights_only=True), stages.load_checkpoint(trained)["model"]
    assert model.keys() == last.keys()
    for key, tensor in model.items():
        assert tensor.equal(last[key])
        assert tensor.dtype == torch.float32
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def test_an_epoch_is_one_pass_over_55000_images_that_both_workers_share(trained):
    images = [worker["images"] for worker in stages.results(trained)["workers"]]
    assert sum(images) == 55_000
    assert len(images) == 2
    assert min(images) > 5_000


def test_the_curves_are_a_picture(trained):
    picture = Image.open(trained / "training.png").convert("RGB")
    assert min(picture.size) > 300
    assert len(picture.getcolors(10**6)) > 10


def test_one_worker_with_a_seed_gives_the_same_bits_also_if_it_averages_and_is_stopped_and_resumed(data, tmp_path):
    flags = (*stages.QUICK, "--epochs", "2", "--averaging", "0.8", "--num-processes", "1", "--seed", "7")
    stages.assert_succeeds(stages.run("train", *flags, model=tmp_path / "one"))
    with stages.training(tmp_path / "two", *flags) as process:
        assert any("epoch 1 of 2" in line for line in process.stdout), process.stderr.read()
        stages.stop(process, signal.SIGQUIT)
    assert stages.load_checkpoint(tmp_path / "two")["sum"][-1] > 0
    stages.assert_succeeds(stages.run("train", model=tmp_path / "two"))
    assert stages.sha256(tmp_path / "one" / "mnist_cnn.pt") == stages.sha256(tmp_path / "two" / "mnist_cnn.pt")


@pytest.mark.parametrize("flags", [(), ("--epochs", "1", "--num-processes", "2", "--log-interval", "5")])
def test_a_finished_model_is_left_as_it_is_before_torch_is_even_imported(volume, tmp_path, flags):
    for name in ("torch", "torchvision", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('this must not be imported')")
    before = {path: (path.stat().st_mtime_ns, stages.sha256(path)) for path in volume.iterdir()}
    stages.assert_succeeds(stages.run("train", *flags, model=volume, PYTHONPATH=tmp_path))
    assert {path: (path.stat().st_mtime_ns, stages.sha256(path)) for path in volume.iterdir()} == before


def test_a_stopped_dry_run_does_not_say_that_it_has_saved_anything(tmp_path):
    words = stages.command("train", "--dry-run", "--batch-size", "27000", model=tmp_path)
    with stages.running(words) as process:
        stages.wait_until(lambda: stages.workers(process))
        assert "a dry run saves nothing" in stages.stop(process, signal.SIGTERM)
    assert stages.contents(tmp_path) == {}


def test_more_epochs_train_the_same_model_on(volume):
    before = stages.results(volume)
    stages.assert_succeeds(stages.run("train", "--epochs", "2", model=volume))
    after = stages.results(volume)
    assert after["run"] == before["run"]
    assert after["history"][0] == before["history"][0]
    assert [line["epoch"] for line in after["history"]] == [1, 2]
    assert stages.images_trained_on(volume) == 110_000
    assert after["model_sha256"] == stages.sha256(volume / "mnist_cnn.pt") != before["model_sha256"]


def test_a_training_that_was_stopped_published_nothing_and_resumes_where_it_was(data, tmp_path):
    with stages.training(tmp_path, "--epochs", "1", "--seed", "5") as process:
        assert not (tmp_path / "mnist_cnn.pt").exists()
        stages.stop(process, signal.SIGTERM, signal.SIGTERM)
    assert {*stages.contents(tmp_path)} == {"checkpoint.pt", "train_results.json"}
    run = stages.results(tmp_path)["run"]
    assert 0 < stages.images_trained_on(tmp_path) < 55_000
    stages.assert_succeeds(stages.run("train", model=tmp_path))
    assert stages.results(tmp_path)["run"] == run
    assert stages.results(tmp_path)["settings"]["seed"] == 5
    assert stages.images_trained_on(tmp_path) == 55_000
    assert {*stages.contents(tmp_path)} == stages.MADE_BY["train"]


def test_a_training_over_a_finished_one_leaves_the_old_model_until_it_is_finished(volume):
    before, old = stages.sha256(volume / "mnist_cnn.pt"), stages.results(volume)["run"]
    with stages.training(volume, "--fresh") as process:
        assert stages.results(volume)["run"] != old
        stages.assert_fails(stages.call("train", "--fresh", model=volume), 2, volume)  # one training at a time
        stages.assert_succeeds(stages.call("evaluate", model=volume))  # of the old model
        stages.stop(process, signal.SIGHUP)
    assert stages.sha256(volume / "mnist_cnn.pt") == before


COME_TO_NOTHING = {  # velocities that the workers resume with
    "a loss that is not finite": lambda old: 1e37 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1)),
    "neurons that are never active": lambda old: torch.full_like(old, 1e30),
}


@pytest.mark.parametrize("velocities", COME_TO_NOTHING.values(), ids=COME_TO_NOTHING.keys())
def test_a_training_that_comes_to_nothing_names_its_settings_and_leaves_the_old_model(volume, velocities):
    stages.edit_checkpoint(volume, velocities=velocities)
    before = stages.contents(volume)
    stages.assert_fails(stages.run("train", "--epochs", "2", model=volume), 1, "--epochs 2", "--fresh")
    after = stages.contents(volume)
    assert all(after[name] == before[name] for name in ("mnist_cnn.pt", "training.png"))
    stages.assert_whole(volume)


def test_a_model_that_was_deleted_is_published_again(volume):
    before = stages.sha256(volume / "mnist_cnn.pt")
    (volume / "mnist_cnn.pt").unlink()
    stages.assert_succeeds(stages.run("train", model=volume))
    assert stages.sha256(volume / "mnist_cnn.pt") == before


@pytest.mark.parametrize("workers", [1, os.cpu_count() + 1])
def test_a_dry_run_neither_reads_nor_writes_the_volume_and_works_with_more_workers_than_cores(volume, workers):
    (volume / "training.png").unlink()
    (volume / "training.png").mkdir()  # which a training would be refused for
    with stages.unchanged(volume):
        result = stages.run("train", "--dry-run", "--num-processes", str(workers), model=volume)
    stages.assert_succeeds(result)
    assert ("warning" in result.stdout) == (workers > 1)


def test_nothing_is_published_before_the_workers_have_ended(data, tmp_path, monkeypatch):
    events, arguments = [], ["train.py", "--data", str(data), "--model", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(process, "handle_stop_signals", lambda handler: None)
    monkeypatch.setattr(workers.Workers, "__enter__", lambda self: self)
    monkeypatch.setattr(workers.Workers, "__exit__", lambda *error: events.append("the workers have ended"))
    monkeypatch.setattr(train, "train_epochs", lambda *parts: events.append("they have trained"))
    monkeypatch.setattr(train, "publish_model", lambda *parts: events.append("the model is published"))
    assert train.main() == 0
    assert events == ["they have trained", "the workers have ended", "the model is published"]


def test_a_training_whose_workers_are_all_killed_fails_and_resumes(data, tmp_path):
    with stages.training(tmp_path, "--epochs", "1") as process:
        for worker in stages.workers(process):
            os.kill(worker, signal.SIGKILL)
        stages.assert_fails(stages.finish(process), 1, "MNIST_MEMORY")
    stages.assert_succeeds(stages.run("train", model=tmp_path))
    assert stages.images_trained_on(tmp_path) == 55_000


def test_a_stop_while_the_workers_stand_still_says_that_it_saved_no_checkpoint(data, tmp_path):
    with stages.training(tmp_path) as process:
        for worker in stages.workers(process):
            os.kill(worker, signal.SIGSTOP)
        with stages.unchanged(tmp_path):
            assert "the last checkpoint" in stages.stop(process, signal.SIGINT)


def test_a_training_that_is_killed_leaves_the_volume_to_the_next_one_at_once(data, tmp_path):
    with stages.training(tmp_path) as process:
        workers = stages.workers(process)
        process.kill()
        process.wait()
        stages.wait_until(lambda: not any(Path(f"/proc/{worker}/stat").exists() for worker in workers))
        with volume_lock(tmp_path):
            pass


def test_each_worker_may_use_every_core_whatever_openmp_is_told(data, tmp_path):
    with stages.training(tmp_path, OMP_PROC_BIND="true", GOMP_CPU_AFFINITY="0", OMP_PLACES="cores") as process:
        may_use = [os.sched_getaffinity(worker) for worker in stages.workers(process)]
    assert may_use == 2 * [os.sched_getaffinity(0)]


def test_on_a_terminal_there_is_a_bar_instead_of_lines(data, tmp_path):
    ours, theirs = pty.openpty()
    with subprocess.Popen(stages.command("train", "--epochs", "1", model=tmp_path), stdout=theirs) as process:
        os.close(theirs)
        try:
            printed = b""
            while printed.count(b"\r") < 5:  # OSError if the training ends
                printed += os.read(ours, 1000)
        finally:
            process.kill()
    os.close(ours)
    assert b"images/s]" in printed
    assert b"images/s, loss" not in printed
