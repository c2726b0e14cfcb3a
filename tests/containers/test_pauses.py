"""Pauses of a training longer than the time after which its parent kills workers that hang."""

import time
from signal import SIGKILL

import faults
import pytest
from pipeline import Pipeline, docker
from scenarios import succeeds
from stages import TREE

FLAGS = ("--epochs", "2", "--batch-size", "1000")  # such a batch takes longer than a look at it
HANG_SECONDS, PAUSE_SECONDS = 4, 8  # half a minute in the program, which is too long to wait for
INTERRUPTIONS = {
    "paused by the engine": lambda train: docker("pause", train.id),
    "all processes stopped": lambda train: train.inside("kill -STOP -1"),
    "one worker stopped": faults.freeze_one_worker,
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """What became of three trainings that were interrupted at the same time: their ends and their volumes."""
    workers = tmp_path_factory.mktemp("app") / "workers.py"
    text = (TREE / "model-train" / "workers.py").read_text()
    assert text.count("\nHANG_SECONDS = 30") == 1
    workers.write_text(text.replace("\nHANG_SECONDS = 30", f"\nHANG_SECONDS = {HANG_SECONDS}"))
    change = {"volumes": [f"{workers}:/opt/app/workers.py:ro"]}
    volumes = {how: tmp_path_factory.mktemp("interrupted") for how in INTERRUPTIONS}
    first, second, third = (Pipeline(volume, train=change) for volume in volumes.values())
    with first, second, third:
        trainings = [faults.start_training(project, *FLAGS) for project in (first, second, third)]
        for train, interrupt in zip(trainings, INTERRUPTIONS.values(), strict=True):
            interrupt(train)
        time.sleep(PAUSE_SECONDS)
        docker("unpause", trainings[0].id)
        trainings[1].inside("kill -CONT -1")
        ended = [train.end() for train in trainings]
    return dict(zip(INTERRUPTIONS, zip(ended, volumes.values(), strict=True), strict=True))


@pytest.mark.parametrize("how", ["paused by the engine", "all processes stopped"])
def test_a_training_that_stood_still_altogether_goes_on_with_all_workers(interrupted, how):
    ended, volume = interrupted[how]
    assert succeeds(ended)
    assert faults.results_of(volume)["finished"]
    assert faults.results_of(volume)["lost_workers"] == []


def test_a_worker_that_alone_stands_still_is_killed_and_the_other_does_its_work(interrupted):
    ended, volume = interrupted["one worker stopped"]
    assert succeeds(ended)
    results = faults.results_of(volume)
    assert [lost["signal"] for lost in results["lost_workers"]] == [SIGKILL]
    assert sum(worker["images"] for worker in results["workers"]) == 2 * 55_000
