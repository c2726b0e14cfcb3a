"""Signals to the first process of a container, at moments of a stage's start."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from signal import SIGHUP, SIGINT, SIGQUIT, SIGTERM

import faults
import pytest
from pipeline import Pipeline, output_of, without_compose
from stages import STAGES, contents

SIGNALS = (SIGTERM, SIGINT, SIGHUP, SIGQUIT)
DELAYS = [step / 10 for step in range(17)]  # in seconds, past the end of the start; each signal has every fourth one
SECONDS = 20  # more than a stage that was asked to stop takes, with another one at work on the same cores
FLAGS = {"train": ("--epochs", "9999"), "evaluate": (), "infer": ()}


def stop_at_moments(stage, number, volume):
    """Starts a stage again and again, and stops it by a signal at other moments of its start: what went wrong."""
    names, wrong = {*contents(volume)}, []
    with Pipeline(volume, **{stage: {"command": [*FLAGS[stage]]}}) as project:
        project.compose("up", "--no-start", "--no-deps", stage)
        container = project.container(stage)
        for delay in DELAYS[SIGNALS.index(number) :: len(SIGNALS)]:
            output_of("start", container.id)
            time.sleep(delay)
            sent = time.time()
            container.send(number)
            ended = container.end(SECONDS)
            finished = ended.status == 0 and ended.ended < sent + 1  # before the signal, or just about to
            if ended.status != 128 + number and not finished:
                wrong.append(f"{number.name} after {delay} s: exit status {ended.status}")
        if "Traceback" in ended.stderr:
            wrong.append(f"{number.name}: {ended.stderr}")
    return wrong + faults.faults_in(volume) + [f"{number.name} leaves {name}" for name in {*contents(volume)} - names]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_stopped_by_every_signal_at_every_moment_of_its_start(complete, tmp_path, stage):
    volumes = [shutil.copytree(complete, tmp_path / number.name) for number in SIGNALS]
    with ThreadPoolExecutor(2) as pool:
        wrong = [*pool.map(stop_at_moments, [stage] * len(SIGNALS), SIGNALS, volumes)]
    assert wrong == [[]] * len(SIGNALS)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_run_without_an_init_process_is_stopped_by_every_signal(volume, stage, number):
    before = contents(volume)
    with without_compose(stage, volume, *FLAGS[stage]) as container:
        container.wait_until_it_handles(number)
        container.send(number)
        ended = container.end(SECONDS)
    assert ended.status == 128 + number
    assert "Traceback" not in ended.stderr
    assert contents(volume) == before
