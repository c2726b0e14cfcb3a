"""Containers with too little memory, with too few processes, or whose user owns nothing, not even leftovers."""

import os
import shutil
from functools import partial

import faults
import pytest
from faults import STAGES, Pipeline, docker
from stages import MADE_BY

FLAGS = {
    "train": ("--fresh", "--epochs", "1", "--batch-size", "500"),
    "evaluate": ("--min-accuracy", "20"),
    "infer": (),
}
SOMEBODY = 12345


@pytest.fixture(scope="module", autouse=True)
def complete(pipeline):
    """A volume after all three stages. Tests only look at it."""
    faults.IMAGES = pipeline.project.name
    return pipeline.volume


@pytest.fixture
def folder(complete, tmp_path):
    """A copy of that volume."""
    return shutil.copytree(complete, tmp_path / "volume")


@pytest.fixture
def give(folder):
    """A function that gives a file of the volume to somebody until the test is over, as root in a container may."""

    def change(path, uid, mode):
        script = f"chown -hR {uid} {path} && chmod {mode} {path}"
        options = ("--rm", "--network", "none", "--user", "0", "--volume", f"{folder}:{folder}", "--entrypoint", "sh")
        changed = docker("run", *options, f"{faults.IMAGES}-train", "-c", script)
        assert changed.returncode == 0, changed.stderr

    yield change
    change(folder, os.getuid(), "0777")


# Limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "processes"),
    [("train", 3), ("train", 4), ("evaluate", 3), ("infer", 3)],
)
def test_a_stage_that_gets_no_thread_or_process_names_the_limit_and_publishes_nothing(folder, stage, processes):
    published = partial(faults.artefacts, folder, but=("checkpoint.pt", "train_results.json"))
    before = published()
    with Pipeline(folder, environment={"MNIST_PIDS": str(processes)}) as pipeline:
        ended = pipeline.run(stage, *FLAGS[stage], seconds=60)
    assert ended.status == 1
    assert ended.is_one_line
    assert "MNIST_PIDS" in ended.stderr
    assert published() == before


@pytest.mark.parametrize(
    ("stage", "flags", "memory"),
    [
        ("train", ("--fresh",), "200m"),
        ("train", ("--fresh", "--num-processes", "64"), "1g"),
        ("train", ("--fresh", "--num-processes", "8", "--batch-size", "10000"), "1g"),
        ("train", ("--epochs", "9999"), "200m"),
        ("evaluate", (), "100m"),
        ("infer", (), "100m"),
    ],
    ids=["train", "many workers", "large batches", "train on", "evaluate", "infer"],
)
def test_a_stage_without_enough_memory_is_refused_before_it_starts(folder, stage, flags, memory):
    before = faults.artefacts(folder)
    with Pipeline(folder, **faults.memory_limit(memory)) as pipeline:
        ended = pipeline.run(stage, *flags, seconds=60)
    assert ended.status == 2
    assert ended.is_one_line
    assert "MNIST_MEMORY" in ended.stderr
    assert faults.artefacts(folder) == before


# Users ---------------------------------------------------------------------------------------------------------------


def by_compose(stage, folder):
    """How a stage ends under another uid than the data folder's, as with `docker compose run --user 1000`."""
    with Pipeline(folder, **{stage: {"user": "1000"}}) as pipeline:
        return pipeline.run(stage, *FLAGS[stage])


def by_docker(stage, folder):
    """How a stage ends by `docker run --user 1000`."""
    with faults.without_compose(stage, folder, *FLAGS[stage], options=("--user", "1000")) as container:
        return container.end()


@pytest.mark.parametrize("run", [by_compose, by_docker])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("give")
def test_a_stage_runs_as_any_user_that_it_is_given(folder, stage, run):
    ended = run(stage, folder)
    assert (ended.status, ended.stderr) == (0, "")
    assert {(folder / name).stat().st_uid for name in MADE_BY[stage]} == {1000}
    assert faults.faults_in(folder) == []


@pytest.mark.parametrize("stage", STAGES)
def test_files_of_others_in_a_sticky_folder_are_kept_and_the_remedy_is_named(folder, give, stage):
    before = faults.artefacts(folder)
    with Pipeline(folder) as pipeline:
        give(folder, SOMEBODY, "1777")
        ended = pipeline.run(stage, *FLAGS[stage])
    assert ended.status == 1
    assert ended.is_one_line
    assert "Make the folder" in ended.stderr
    assert faults.artefacts(folder) == before


@pytest.mark.parametrize("stage", STAGES)
def test_an_unfinished_file_of_somebody_else_is_removed(folder, give, stage):
    parts = [folder / f".{name}.part" for name in MADE_BY[stage]]
    for part in parts:
        part.write_text("unfinished")
        give(part, SOMEBODY, "0444")
    with Pipeline(folder) as pipeline:
        ended = pipeline.run(stage, *FLAGS[stage])
    assert (ended.status, ended.stderr) == (0, "")
    assert [part for part in parts if part.exists()] == []
    assert faults.faults_in(folder) == []
