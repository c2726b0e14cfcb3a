"""A stage that fails stops those after it, and bad input gets one line, an exit status, and touches nothing good."""

import os
import pickle
import shutil
import uuid

import compose
import example
import pytest
import stages
import torch

RAW = "MNIST/raw"


# What does not start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "status"),
    [({"command": ["--lr", "0"]}, 2), ({"network_mode": "none"}, 1)],
    ids=["a wrong request", "no data and no network"],
)
def test_if_train_fails_neither_of_the_others_starts(start, tmp_path, override, status):
    (tmp_path / "data").mkdir()
    project = start(data=tmp_path / "data", empty=True, override={"train": override})
    assert compose.exit_codes(project.up()) == {"train": status, "evaluate": None, "infer": None}
    assert not stages.contents(project.volume)


def test_if_evaluate_fails_infer_does_not_start(start):
    project = start(override={"evaluate": {"command": ["--min-accuracy", "100"]}})
    before = stages.contents(project.volume)
    assert compose.exit_codes(project.up()) == {"train": 0, "evaluate": 1, "infer": None}
    assert stages.contents(project.volume) == before


def test_an_untrained_network_never_gets_past_evaluate(start):
    project = start(empty=True)
    torch.save(example.untrained().state_dict(), project.volume / "mnist_cnn.pt")
    assert compose.exit_codes(project.up()) == {"train": 0, "evaluate": 1, "infer": None}
    assert {*stages.contents(project.volume)} == {"mnist_cnn.pt"}


# Data that is not good ------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(data, tmp_path):
    """A copy of the data set, to be damaged."""
    return shutil.copytree(data / "MNIST", tmp_path / "copied" / "MNIST").parent


def alter(path):
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {"truncated": lambda path: os.truncate(path, 1000), "altered": alter}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    ("stage", "name", "flags"),
    [
        ("train", "train-images-idx3-ubyte", ["--fresh"]),
        ("evaluate", "t10k-labels-idx1-ubyte", []),
        ("infer", "t10k-images-idx3-ubyte", []),
    ],
)
def test_a_damaged_data_file_is_named_with_its_remedy(start, copied, stage, name, flags, how):
    DAMAGE[how](copied / RAW / name)
    project = start(data=copied)
    before = stages.contents(project.volume)
    stages.assert_fails(project.stage(stage, *flags), 1, name, "make data")
    assert stages.contents(project.volume) == before


def test_data_that_is_missing_without_a_network_is_a_failure_that_names_the_remedy(start, tmp_path):
    (tmp_path / "none").mkdir()
    project = start(data=tmp_path / "none", override={"train": {"network_mode": "none"}})
    before = stages.contents(project.volume)
    stages.assert_fails(project.stage("train", "--fresh"), 1, "make data")
    assert stages.contents(project.volume) == before


def test_data_that_is_missing_in_a_folder_that_is_read_only_is_a_failure_that_names_the_folder(start, tmp_path):
    (tmp_path / "none").mkdir()
    mounts = {"train": {"volumes": ["./data:/opt/mount/data:ro"]}}
    project = start(data=tmp_path / "none", empty=True, override=mounts)
    stages.assert_fails(project.stage("train"), 1, "/opt/mount/data")
    assert not stages.contents(project.volume)


# A volume that is not good --------------------------------------------------------------------------------------------


class RunsCode:
    """A pickle of this makes a folder in the volume when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("/opt/mount/model/ran",)


def other_network(path):
    """Saves a network with one more digit to tell."""
    torch.save(example.untrained().state_dict() | {"fc2.bias": torch.zeros(11)}, path)


def forged(path):
    """Saves a network whose parameters are no numbers."""
    state = example.untrained().state_dict()
    torch.save(state | {"fc2.bias": torch.full((10,), torch.nan)}, path)


BAD_MODELS = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, 50_000),
    "of another network": other_network,
    "not finite": forged,
    "with code, saved by torch": lambda path: torch.save({"conv1.weight": RunsCode()}, path),
    "with code, pickled": lambda path: path.write_bytes(pickle.dumps({"conv1.weight": RunsCode()})),
}


@pytest.mark.parametrize(
    ("stage", "how"), [("evaluate", how) for how in BAD_MODELS] + [("infer", "truncated"), ("infer", "missing")]
)
def test_a_model_that_is_no_good_is_named_with_its_remedy_and_runs_no_code(start, stage, how):
    project = start()
    BAD_MODELS[how](project.volume / "mnist_cnn.pt")
    before = stages.contents(project.volume)
    stages.assert_fails(project.stage(stage), 1, "mnist_cnn.pt", "--fresh")
    assert stages.contents(project.volume) == before
    assert not (project.volume / "ran").exists()


def test_garbage_in_place_of_the_trainings_results_is_named_with_its_remedy(start):
    project = start()
    (project.volume / "train_results.json").write_bytes(b"\xff{garbage")
    before = stages.contents(project.volume)
    stages.assert_fails(project.stage("train"), 1, "train_results.json", "--fresh")
    assert stages.contents(project.volume) == before


def test_garbage_in_place_of_the_evaluations_results_is_replaced(start):
    project = start()
    (project.volume / "eval_results.json").write_bytes(b"\xff{garbage")
    assert project.stage("evaluate").returncode == 0
    assert stages.read_json(project.volume / "eval_results.json")["Accuracy"] >= 95


@pytest.mark.parametrize(("stage", "flags"), [("train", ["--epochs", "99"]), ("evaluate", []), ("infer", [])])
def test_a_volume_that_is_read_only_is_a_failure_that_names_it(start, stage, flags):
    project = start(override={stage: {"volumes": ["mnist:/opt/mount/model:ro"]}})
    before = stages.contents(project.volume)
    stages.assert_fails(project.stage(stage, *flags), 1, "/opt/mount/model")
    assert stages.contents(project.volume) == before


# A full disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(start, pipeline):
    """A project whose volume is a disk of 1 MB, with what the pipeline left on it, and not a byte more.

    `contents()` says what is on it, apart from what fills it.
    """
    volume = keeper = f"mnist-test-{uuid.uuid4().hex[:10]}"
    project = start(volume={"external": True, "name": volume})
    options = ["--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", "o=size=1m,mode=0777"]
    compose.docker("volume", "create", *options, volume)

    def shell(script):
        return compose.docker("exec", keeper, "sh", "-c", script)

    def contents():
        lines = shell("cd /volume && find . -type f ! -name filler -exec sha256sum {} +").splitlines()
        return {path: sha256 for sha256, path in (line.split() for line in lines)}

    project.contents = contents
    try:
        # A disk in memory lasts as long as a container has it mounted.
        program = ["--entrypoint", "sleep", pipeline.image("train"), "infinity"]
        compose.docker("run", "--detach", "--init", "--name", keeper, "--volume", f"{volume}:/volume", *program)
        compose.docker("cp", f"{pipeline.volume}/.", f"{keeper}:/volume")
        shell("chmod -R a+rwX /volume && ! cat /dev/zero 2>/dev/null >/volume/filler")
        yield project
    finally:
        compose.docker("rm", "--force", keeper)
        compose.docker("volume", "rm", "--force", volume)


@pytest.mark.parametrize(("stage", "flags"), [("train", ["--fresh", "--epochs", "1"]), ("evaluate", []), ("infer", [])])
def test_a_disk_that_is_full_keeps_what_was_good(full_disk, stage, flags):
    before = full_disk.contents()
    stages.assert_fails(full_disk.stage(stage, *flags), 1, "/opt/mount/model", "No space")
    assert full_disk.contents() == before


# Flags ----------------------------------------------------------------------------------------------------------------


WRONG = [("train", "--unknown"), ("train", "--epochs=0"), ("evaluate", "--min-accuracy=-1"), ("infer", "--samples=x")]


@pytest.mark.parametrize(("stage", "flag"), WRONG)
def test_a_wrong_request_is_refused(start, stage, flag):
    project = start()
    before = stages.contents(project.volume)
    stages.assert_fails(project.stage(stage, flag), 2, flag.partition("=")[0])
    assert stages.contents(project.volume) == before
