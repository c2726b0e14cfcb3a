"""Pauses of a training longer than the time after which its parent kills workers that hang."""

import time
from signal import SIGCONT, SIGSTOP

import pytest

from pipeline import OFTEN, Pipeline, docker
from stages import TREE, assert_succeeds, results

FLAGS = ("--epochs", "2", "--batch-size", "1000")  # such a batch takes longer than a look at it
HANG_SECONDS, PAUSE_SECONDS = 4, 8  # half a minute in the program, which is too long to wait for


def pause_by_the_engine(train):
    docker("pause", train.id)
    time.sleep(PAUSE_SECONDS)
    docker("unpause", train.id)


def stop_all_processes(train):
    for number in (SIGSTOP, SIGCONT):
        train.send(number)  # from outside: within its container, the first process cannot be stopped
        train.inside(f"kill -{number} -1")
        time.sleep(PAUSE_SECONDS if number == SIGSTOP else 0)


@pytest.mark.parametrize("pause", [pause_by_the_engine, stop_all_processes])
def test_a_training_that_stood_still_altogether_goes_on_with_all_workers(tmp_path, pause):
    workers, volume = tmp_path / "workers.py", tmp_path / "volume"
    text = (TREE / "model-train/training/workers.py").read_text()
    assert text.count("\nHANG_SECONDS = 30") == 1
    workers.write_text(text.replace("\nHANG_SECONDS = 30", f"\nHANG_SECONDS = {HANG_SECONDS}"))
    with Pipeline(volume, train={"volumes": [f"{workers}:/opt/app/training/workers.py:ro"]}) as project:
        train = project.start("train", *FLAGS, *OFTEN)
        train.wait_until_it_trains()
        pause(train)
        assert_succeeds(train.end())
    assert results(volume)["finished"]
    assert results(volume)["lost_workers"] == []
