"""Running stages again and again on what a finished pipeline left, and stopping them."""

import os
import shutil

import compose
import example
import pytest
import stages
import torch
from PIL import Image


def identity(path):
    """What changes about a file when anybody writes it."""
    return stages.sha256(path), path.stat().st_mtime_ns, path.stat().st_ino


def test_evaluate_again_leaves_the_model_alone_and_train_takes_less_than_a_second(start):
    project = start()
    before = identity(project.volume / "mnist_cnn.pt")
    result = project("run", "--rm", "-T", "evaluate")
    assert result.returncode == 0, result.stderr
    assert identity(project.volume / "mnist_cnn.pt") == before
    train = project.states()["train"]
    assert train["ExitCode"] == 0
    assert compose.seconds(train) < 1


def test_up_again_runs_all_stages_in_order_and_leaves_five_pictures(start):
    project = start()
    before = identity(project.volume / "mnist_cnn.pt")
    for _ in range(2):
        states = project.up()
        assert compose.exit_codes(states) == {"train": 0, "evaluate": 0, "infer": 0}
        compose.assert_in_order(states)
        assert len(stages.pictures(project.volume)) == 5
    assert identity(project.volume / "mnist_cnn.pt") == before


def test_infer_leaves_exactly_as_many_pictures_as_it_was_asked_for(start):
    project = start()
    for flags, count in ((("--samples", "7"), 7), ((), 5)):
        result = project("run", "--rm", "-T", "infer", *flags)
        assert result.returncode == 0, result.stderr
        assert len(stages.pictures(project.volume)) == count
        for name in stages.pictures(project.volume):
            Image.open(project.volume / "results" / name).verify()


def test_a_stopped_training_has_published_nothing_and_the_next_one_goes_on(start):
    project = start(empty=True)
    flags = ("--epochs", "1", "--batch-size", "100", "--log-interval", "20")
    with stages.running(
        [*project.command, "run", "--rm", "-T", "--name", f"{project.name}-run", "train", *flags]
    ) as run:
        stages.await_progress(run)
        assert not (project.volume / "mnist_cnn.pt").exists()
        compose.docker("stop", f"{project.name}-run")
        assert run.wait(20) == 143
    assert {*stages.contents(project.volume)} == {"checkpoint.pt", "train_results.json"}
    unfinished = stages.read_json(project.volume / "train_results.json")
    assert project.stage("train").returncode == 0
    finished = stages.read_json(project.volume / "train_results.json")
    assert finished["run"] == unfinished["run"]
    assert sum(worker["images"] for worker in finished["workers"]) == 55_000
    assert {*stages.contents(project.volume)} == stages.MADE_BY["train"]


def test_a_checkpoint_of_the_examples_network_goes_through_the_pipeline(start):
    project = start(empty=True, override={"evaluate": {"command": ["--min-accuracy", "0"]}})
    torch.save(example.untrained().state_dict(), project.volume / "mnist_cnn.pt")
    before = identity(project.volume / "mnist_cnn.pt")
    assert compose.exit_codes(project.up()) == {"train": 0, "evaluate": 0, "infer": 0}
    assert identity(project.volume / "mnist_cnn.pt") == before
    assert stages.read_json(project.volume / "eval_results.json")["Accuracy"] < 40


# Owners ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def owned(pipeline, data, tmp_path):
    """A function that gives a copy of ./data to a user, and returns it."""
    folder = shutil.copytree(data / "MNIST", tmp_path / "data" / "MNIST").parent

    def give(uid, gid):
        compose.as_root(pipeline.image("train"), folder, "chown", "--recursive", f"{uid}:{gid}", "/folder")
        return folder

    yield give
    give(os.getuid(), os.getgid())  # or pytest could not remove it


@pytest.mark.parametrize("uid", [0, 1000, 1234])
def test_the_pipeline_works_in_a_new_volume_whoever_owns_the_data_folder(start, owned, uid):
    train = {"command": ["--epochs", "1"]}
    project = start(data=owned(uid, uid), volume={}, override={"train": train})
    assert compose.exit_codes(project.up()) == {"train": 0, "evaluate": 0, "infer": 0}
