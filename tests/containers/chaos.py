"""Faults that depend on the moment, many times, and every broken file. pytest runs it only if it is named.

make chaos
.venv/bin/python -m pytest tests/containers/chaos.py -k accurate --kills 2 --seed 7
"""

import random
import time
from signal import SIGINT, SIGTERM

import pytest
import scenarios

import corpus
from pipeline import Pipeline
from stages import LOCKS, assert_succeeds, read_json

TRAININGS = 5  # to be killed again and again
SPAN = 8  # seconds: a random moment is up to this time after a container's start; starting takes about 2 of them
MOST_ACCURACY_LOST = 0.1  # percent of the test images, in the mean of the trainings


@pytest.fixture(scope="session")
def wait(pytestconfig):
    """A function that waits until a random moment of a training, which has just been started."""
    chance = random.Random(pytestconfig.getoption("seed"))
    return lambda train: time.sleep(chance.uniform(0, SPAN))


def accuracy(volume, flags):
    """Trains to the end what is in a folder, and returns the accuracy on the test images."""
    with Pipeline(volume) as project:
        assert_succeeds(project.run("train", *flags, seconds=600))
        assert {path.name for path in volume.glob(".*")} <= LOCKS
        assert_succeeds(project.run("evaluate", "--min-accuracy", "0"))
    return read_json(volume / "eval_results.json")["Accuracy"]


@pytest.mark.timeout(0)
def test_trainings_that_are_killed_again_and_again_are_as_accurate_as_others(pytestconfig, tmp_path, wait):
    differences = []
    for seed in map(str, range(TRAININGS)):
        volume, flags = tmp_path / seed, ("--seed", seed)
        with Pipeline(volume) as project:
            for _ in range(pytestconfig.getoption("kills")):
                scenarios.kill_training(project, volume, *flags, wait=wait)
        differences.append(accuracy(volume, flags) - accuracy(tmp_path / f"{seed}-never-killed", flags))
    assert abs(sum(differences)) <= MOST_ACCURACY_LOST * TRAININGS


@pytest.mark.parametrize("number", [SIGTERM, SIGINT] * 3)
def test_a_training_that_is_stopped_at_a_random_moment_ends_within_3_seconds(volume, wait, number):
    scenarios.stop_training(volume, number, wait)


@pytest.mark.parametrize("left", range(0, 240, 48))
def test_a_training_on_a_full_disk_fails_and_succeeds_when_there_is_space_again(volume, left):
    scenarios.fill_disk(volume, left)


@pytest.mark.timeout(0)
def test_an_export_killed_at_20_moments_is_the_old_one_or_the_new_one(volume, tmp_path):
    scenarios.kill_exports(volume, tmp_path)


@pytest.mark.parametrize("case", corpus.cases(), ids=lambda case: case.name)
def test_a_broken_file_is_named_in_one_line_with_what_fixes_it_and_harms_nothing(complete, tmp_path, case):
    corpus.check(case, complete, tmp_path, corpus.run_in_container)
