"""train as a process: what it leaves, and what it does when it is run again, stopped, or asked for the impossible."""

import json
import os
import pty
import signal
import subprocess

import example
import pytest
import stages
import torch
from PIL import Image

POISON = "raise AssertionError('torch must not be imported')"
QUICK = ("--epochs", "1", "--batch-size", "250", "--num-processes", "1")


def results(folder):
    """What train_results.json says."""
    return stages.read_json(folder / "train_results.json")


def images_trained_on(folder):
    """How many images the workers together have trained on."""
    return sum(worker["images"] for worker in results(folder)["workers"])


# A finished training --------------------------------------------------------------------------------------------------


def test_a_training_leaves_its_four_files_and_nothing_else(trained):
    assert {*stages.contents(trained)} == stages.MADE_BY["train"]


def test_the_model_loads_strictly_in_the_examples_network_and_reads_digits(trained, data):
    images, labels = example.read_test_images(data)
    reads = example.read_digits(example.load(trained / "mnist_cnn.pt"), images).argmax(1)
    assert (reads == labels).float().mean() > 0.95


def test_the_model_is_the_one_that_the_last_checkpoint_has(trained):
    model = torch.load(trained / "mnist_cnn.pt", weights_only=True)
    last = torch.load(trained / "checkpoint.pt", weights_only=True)["model"]
    assert model.keys() == last.keys()
    assert all(model[key].equal(last[key]) for key in model)


def test_the_model_holds_nothing_but_plain_numbers_of_its_own(trained):
    for tensor in torch.load(trained / "mnist_cnn.pt", weights_only=True).values():
        assert tensor.dtype == torch.float32
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def test_the_results_name_the_model_and_the_data(trained, data):
    assert results(trained)["finished"] is True
    assert results(trained)["model_sha256"] == stages.sha256(trained / "mnist_cnn.pt")
    expected = {name: stages.sha256(data / "MNIST" / "raw" / name) for name in stages.RAW_FILES}
    assert results(trained)["data_sha256"] == expected


def test_an_epoch_is_one_pass_over_55000_images_that_both_workers_share(trained):
    assert images_trained_on(trained) == 55_000
    assert len(results(trained)["workers"]) == 2
    assert all(worker["images"] > 5_000 for worker in results(trained)["workers"])


def test_the_results_say_how_fast_the_training_was_and_how_long_each_worker_waited(trained):
    seconds = results(trained)["seconds"]
    assert results(trained)["images_per_second"] == pytest.approx(55_000 / seconds)
    assert all(0 < worker["waited_seconds"] < seconds for worker in results(trained)["workers"])


def test_the_history_has_a_line_for_every_epoch(trained):
    (line,) = results(trained)["history"]
    assert line["epoch"] == 1
    assert line["held_out_accuracy"] > 95
    assert 0 < line["held_out_loss"] < 0.2


def test_the_curves_can_be_looked_at(trained):
    picture = Image.open(trained / "training.png").convert("RGB")
    assert min(picture.size) > 300
    assert len(picture.getcolors(10**6)) > 10


# Running it again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--epochs", "1"), ("--num-processes", "2", "--log-interval", "5")])
def test_a_finished_model_is_left_alone_before_torch_is_even_imported(volume, tmp_path, flags):
    for name in ("torch", "torchvision", "numpy"):
        (tmp_path / f"{name}.py").write_text(POISON)
    before = {path: (path.stat().st_mtime_ns, stages.sha256(path)) for path in volume.iterdir()}
    result = stages.run("train", *flags, model=volume, PYTHONPATH=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert {path: (path.stat().st_mtime_ns, stages.sha256(path)) for path in volume.iterdir()} == before


def test_more_epochs_train_the_same_model_on(volume):
    before = results(volume)
    assert stages.run("train", "--epochs", "2", model=volume).returncode == 0
    after = results(volume)
    assert after["run"] == before["run"]
    assert after["history"][0] == before["history"][0]
    assert [line["epoch"] for line in after["history"]] == [1, 2]
    assert images_trained_on(volume) == 110_000
    assert after["model_sha256"] == stages.sha256(volume / "mnist_cnn.pt") != before["model_sha256"]


def test_another_recipe_is_refused_and_touches_nothing(volume):
    before = stages.contents(volume)
    stages.assert_fails(stages.run("train", "--lr", "0.0123", model=volume), 2, "--lr", "0.0123", "--fresh")
    assert stages.contents(volume) == before


def test_garbage_in_place_of_the_results_touches_nothing(volume):
    (volume / "train_results.json").write_bytes(b"\xff{garbage")
    before = stages.contents(volume)
    stages.assert_fails(stages.run("train", model=volume), 1, "train_results.json", "--fresh")
    assert stages.contents(volume) == before


@pytest.mark.parametrize("content", [b"", b"garbage"], ids=["empty", "garbage"])
def test_a_damaged_checkpoint_is_not_trained_on_from(volume, data, content):
    (volume / "checkpoint.pt").write_bytes(content)
    before = stages.contents(volume)
    stages.assert_fails(stages.run("train", "--epochs", "2", model=volume), 1, "checkpoint.pt", "--fresh")
    assert stages.contents(volume) == before


def test_a_training_over_a_finished_one_keeps_the_old_model_until_it_is_finished(volume):
    before, old = stages.sha256(volume / "mnist_cnn.pt"), results(volume)["run"]
    with stages.running(stages.command("train", "--fresh", "--log-interval", "10", model=volume)) as process:
        stages.await_progress(process)
        assert stages.sha256(volume / "mnist_cnn.pt") == before
        assert results(volume)["run"] != old
        process.terminate()
        assert process.wait(10) == 143
    assert stages.sha256(volume / "mnist_cnn.pt") == before


def test_one_worker_with_a_seed_is_repeatable_to_the_last_bit(data, tmp_path):
    for name in ("one", "two"):
        result = stages.run("train", *QUICK, "--seed", "7", model=tmp_path / name)
        assert result.returncode == 0, result.stderr
    assert stages.sha256(tmp_path / "one" / "mnist_cnn.pt") == stages.sha256(tmp_path / "two" / "mnist_cnn.pt")


# Stopping it ----------------------------------------------------------------------------------------------------------


def test_a_training_that_was_stopped_published_nothing_and_goes_on_where_it_was(data, tmp_path):
    flags = ("--epochs", "1", "--seed", "5", "--log-interval", "20")
    with stages.running(stages.command("train", *flags, model=tmp_path)) as process:
        stages.await_progress(process)
        assert not (tmp_path / "mnist_cnn.pt").exists()
        process.terminate()
        assert process.wait(10) == 143
        assert len(process.stderr.readlines()) == 1
    assert {*stages.contents(tmp_path)} == {"checkpoint.pt", "train_results.json"}
    run, images = results(tmp_path)["run"], images_trained_on(tmp_path)
    assert 0 < images < 55_000
    assert stages.run("train", model=tmp_path).returncode == 0
    assert results(tmp_path)["run"] == run
    assert results(tmp_path)["settings"]["seed"] == 5
    assert images_trained_on(tmp_path) == 55_000
    assert {*stages.contents(tmp_path)} == stages.MADE_BY["train"]


def test_two_trainings_at_once_do_not_share_a_volume(data, tmp_path):
    with stages.running(stages.command("train", "--log-interval", "10", model=tmp_path)) as process:
        stages.await_progress(process)
        stages.assert_fails(stages.run("train", model=tmp_path), 2, str(tmp_path))
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


# What does not become a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, os.cpu_count() + 1])
def test_a_dry_run_publishes_nothing_and_works_with_more_workers_than_cores(volume, workers):
    before = stages.contents(volume)
    result = stages.run("train", "--dry-run", "--num-processes", str(workers), model=volume)
    assert result.returncode == 0, result.stderr
    assert ("warning" in result.stdout) == (workers > 1)
    assert stages.contents(volume) == before


def test_a_training_that_comes_to_nothing_leaves_the_old_model(volume):
    before = stages.contents(volume)
    stages.assert_fails(stages.run("train", "--fresh", *QUICK, "--lr", "1000", model=volume), 1, "--lr 1000")
    assert stages.contents(volume)["mnist_cnn.pt"] == before["mnist_cnn.pt"]
    assert stages.contents(volume)["training.png"] == before["training.png"]


def test_a_folder_that_cannot_be_made_is_a_failure_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    stages.assert_fails(stages.run("train", model=tmp_path / "file" / "volume"), 1, str(tmp_path / "file"))


# What it says meanwhile -----------------------------------------------------------------------------------------------


def test_there_is_a_bar_on_a_terminal(data, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(stages.command("train", "--epochs", "1", model=tmp_path), stdout=theirs)
    try:
        said = b""
        while b"\r[" not in said:
            said += os.read(ours, 1000)
        assert b"\n[" not in said
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def test_the_results_are_json_that_any_reader_understands(trained):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((trained / "train_results.json").read_text(), parse_constant=refuse)
