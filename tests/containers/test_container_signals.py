"""Signals to the first process of a container, at moments of a stage's start and in the middle of a training."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from signal import SIGHUP, SIGINT, SIGQUIT, SIGTERM

import pytest
import scenarios
from pipeline import Pipeline, output_of, statuses
from stages import STAGES, assert_whole, batches_saved, contents, wait_until

SIGNALS = (SIGTERM, SIGINT, SIGHUP, SIGQUIT)
# In seconds, past the end of the start; each signal has every fourth one. Not from 0 on: without an init, signals are
# ignored in the first milliseconds, before the entrypoint runs (docs/operations.md).
DELAYS = [step / 10 for step in range(1, 17)]
SECONDS = 20  # more than a stage that was asked to stop takes, with another one at work on the same cores
FLAGS = {"train": ("--epochs", "9999"), "evaluate": (), "infer": ()}


def names_of(volume):
    """The files in a volume, but for the predictions: an infer that finishes before the signal makes others."""
    return {name for name in contents(volume) if not name.startswith("results/")}


def stop_at_moments(stage, init, number, volume):
    """Starts a stage again and again, under an init process or as PID 1, and stops it at other moments of its start."""
    names = names_of(volume)
    with Pipeline(volume, **{stage: {"command": [*FLAGS[stage]], "init": init}}) as project:
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
    assert names_of(volume) <= names


@pytest.mark.parametrize("init", [True, False], ids=["under an init", "as PID 1"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_stopped_by_every_signal_at_every_moment_of_its_start(complete, tmp_path, stage, init):
    volumes = [shutil.copytree(complete, tmp_path / number.name) for number in SIGNALS]
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(stop_at_moments, [stage] * len(SIGNALS), [init] * len(SIGNALS), SIGNALS, volumes):
            pass  # it raises what they raise


def test_a_training_that_is_stopped_saves_a_checkpoint_and_ends_within_3_seconds(volume):
    before = batches_saved(volume)
    scenarios.stop_training(volume, SIGTERM)
    assert batches_saved(volume) > before


def test_compose_stop_stops_the_training_and_keeps_evaluate_from_starting(volume):
    flags = [*scenarios.LONG, *scenarios.OFTEN]
    with Pipeline(volume, train={"command": flags}) as project, ThreadPoolExecutor() as pool:
        up = pool.submit(project.up)
        train = wait_until(lambda: project.container("train"))
        train.wait_until_it_trains()
        project.compose("stop")
        assert statuses(up.result(timeout=60)) == {"train": 143}
