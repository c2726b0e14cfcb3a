"""The volumes that the container tests start from: what the main command left, and a training under way."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import faults
import pytest
from pipeline import Pipeline, inspect, remove_images
from stages import STAGES

pytest.register_assert_rewrite("scenarios")


@dataclass
class FirstRun:
    """What the README's main command left."""

    project: Pipeline
    ended: dict  # how the container of each stage ended
    containers: dict  # what the engine says of it
    volume: Path  # a copy of the volume


@pytest.fixture(scope="session", autouse=True)
def first_run(data, tmp_path_factory):
    """The README's main command, run once to its end."""
    try:
        with Pipeline() as project:
            ended = project.up("--build")
            containers = {stage: inspect(project.container(stage).id)[0] for stage in STAGES}
            volume = project.copy_out(tmp_path_factory.mktemp("first_run") / "volume")
            yield FirstRun(project, ended, containers, volume)
    finally:
        remove_images()


@pytest.fixture(scope="session")
def complete(first_run):
    """A volume after all three stages. Tests only look at it; those that change it take `volume`."""
    return first_run.volume


@pytest.fixture
def volume(complete, tmp_path):
    """A copy of a volume after all three stages."""
    return shutil.copytree(complete, tmp_path / "volume")


@pytest.fixture(scope="session")
def begun(first_run, tmp_path_factory):
    """A volume with a training of 100 epochs that was killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("begun")
    faults.begin_training(folder)
    return folder


@pytest.fixture
def unfinished(begun, tmp_path):
    """A copy of the volume with the training that was killed."""
    return shutil.copytree(begun, tmp_path / "unfinished")


@pytest.fixture
def nearly_done(unfinished):
    """The same, but the epoch that is under way is the last one."""
    faults.shorten_training(unfinished)
    return unfinished
