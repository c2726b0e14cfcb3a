"""Signals to the first process of a container, at moments of a stage's start and in the middle of a training."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from signal import SIGHUP, SIGINT, SIGQUIT, SIGTERM

import pytest
import scenarios

from pipeline import Pipeline, output_of, statuses
from stages import STAGES, assert_whole, batches_saved, wait_until

# As in a checkout of a plain user, whose uid is not that of who sends the signal. The entrypoint treats root likewise.
pytestmark = pytest.mark.parametrize("owned", [1000], indirect=True, scope="module")

SIGNALS = (SIGTERM, SIGINT, SIGHUP, SIGQUIT)
DELAYS = [step / 10 for step in range(16)]  # in seconds, past the end of the start; each signal has every fourth one
SECONDS = 20  # more than a stage that was asked to stop takes, with another one at work on the same cores
FLAGS = {"train": ("--epochs", "9999"), "evaluate": (), "infer": ()}


def stop_at_moments(stage, data, number, volume):
    """Starts a stage again and again, and stops it at other moments of its start."""
    names = {*os.listdir(volume)}
    with Pipeline(volume, data, **{stage: {"command": [*FLAGS[stage]]}}) as project:
        project.compose("up", "--no-start", "--no-deps", stage)
        container = project.container(stage)
        for delay in DELAYS[SIGNALS.index(number) :: len(SIGNALS)]:
            output_of("start", container.id)
            time.sleep(delay)
            sent = time.time()
            container.send(number)
            ended = container.end(SECONDS)
            finished = ended.returncode == 0 and ended.ended < sent + 1  # before the signal, or just about to
            assert finished or ended.returncode == 128 + number, f"{number.name} after {delay} s: {ended}"
            assert "Traceback" not in ended.stderr
    assert_whole(volume)
    assert {*os.listdir(volume)} <= names


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_stopped_by_every_signal_at_every_moment_of_its_start(complete, tmp_path, stage, owned):
    volumes = [shutil.copytree(complete, tmp_path / number.name) for number in SIGNALS]
    with ThreadPoolExecutor(2) as pool:
        [*pool.map(partial(stop_at_moments, stage, owned[0]), SIGNALS, volumes)]  # it raises what they raise


def test_a_training_that_is_stopped_saves_a_checkpoint_and_ends_within_3_seconds(volume, owned):
    before = batches_saved(volume)
    scenarios.stop_training(volume, SIGTERM, data=owned[0])
    assert batches_saved(volume) > before


def test_compose_stop_stops_the_training_and_keeps_evaluate_from_starting(volume, owned):
    flags = [*scenarios.LONG, *scenarios.OFTEN]
    with Pipeline(volume, owned[0], train={"command": flags}) as project, ThreadPoolExecutor() as pool:
        up = pool.submit(project.up)
        train = wait_until(lambda: project.container("train"))
        train.wait_until_it_trains()
        project.compose("stop")
        assert statuses(up.result(timeout=60)) == {"train": 143}
