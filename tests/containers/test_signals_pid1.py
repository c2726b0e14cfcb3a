"""Signals to the first process of a container: at every moment of a stage's start, and in the middle of a training."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from signal import SIGHUP, SIGINT, SIGQUIT, SIGTERM

import faults
import pytest
from faults import OFTEN, STAGES, Pipeline, docker

SIGNALS = (SIGTERM, SIGINT, SIGHUP, SIGQUIT)
DELAYS = [step / 20 for step in range(33)]  # in seconds, past the end of the start; each signal has every fourth one
SECONDS = 20  # more than a stage that was asked to stop takes, with another one at work on the same cores
FLAGS = {"train": ("--epochs", "9999"), "evaluate": ("--min-accuracy", "50"), "infer": ()}


@pytest.fixture(scope="module", autouse=True)
def complete(pipeline):
    """A volume after all three stages. Tests only look at it."""
    faults.IMAGES = pipeline.project.name
    return pipeline.volume


@pytest.fixture
def folder(complete, tmp_path):
    """A copy of that volume."""
    return shutil.copytree(complete, tmp_path / "volume")


def send(container, number):
    """Sends a signal to the container's first process."""
    docker("kill", "--signal", int(number), container.id)


@pytest.mark.parametrize("stage", STAGES)
def test_every_service_has_an_init_process(stage):
    config = docker("compose", "-f", faults.TREE / "docker-compose.yml", "config", "--format", "json").stdout
    assert json.loads(config)["services"][stage].get("init") is True


@pytest.fixture
def sweep(complete, tmp_path):
    """A function that stops a stage at many moments of its start, by each signal.

    What went wrong comes back as sentences. Each signal has a container and a volume of its own, started anew for each
    moment; two signals at once, as the machine may have two cores.
    """

    def stop(stage, number):
        folder = shutil.copytree(complete, tmp_path / number.name)
        wrong, names = [], {path.name for path in folder.iterdir()}
        with Pipeline(folder, **{stage: {"command": [*FLAGS[stage]]}}) as pipeline:
            pipeline.compose("up", "--no-start", "--no-deps", stage)
            container = pipeline.container(stage)
            for delay in DELAYS[SIGNALS.index(number) :: len(SIGNALS)]:
                assert docker("start", container.id).returncode == 0
                time.sleep(delay)
                sent = time.time()
                send(container, number)
                try:
                    ended = container.end(SECONDS)
                except TimeoutError:
                    wrong.append(f"{stage}: {number.name} after {delay} s: it runs on")
                    break
                finished = ended.status == 0 and ended.ended < sent + 0.2  # before the signal, or just about to
                if ended.status != 128 + number and not finished:
                    wrong.append(f"{stage}: {number.name} after {delay} s: exit status {ended.status}")
                    break
            if "Traceback" in container.logs()[1]:
                wrong.append(f"{stage}: {number.name}: {container.logs()[1]}")
        left = {path.name for path in folder.iterdir()} - names
        return wrong + faults.faults_in(folder) + [f"{stage}: {number.name} leaves {name}" for name in left]

    def stop_by_each(stage):
        with ThreadPoolExecutor(2) as pool:
            return [wrong for found in pool.map(lambda number: stop(stage, number), SIGNALS) for wrong in found]

    return stop_by_each


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_stopped_by_every_signal_at_every_moment_of_its_start(sweep, stage):
    wrong = sweep(stage)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_run_without_compose_is_stopped_by_every_signal_as_it_starts(folder, stage, number):
    before = faults.artefacts(folder)
    with faults.without_compose(stage, folder, *FLAGS[stage]) as container:
        container.wait_until_it_listens(number)
        send(container, number)
        ended = container.end(SECONDS)
    assert ended.status == 128 + number
    assert "Traceback" not in ended.stderr
    assert faults.artefacts(folder) == before


@pytest.mark.parametrize("numbers", [(SIGHUP,), (SIGQUIT,), (SIGTERM, SIGTERM)], ids=["hang up", "quit", "twice"])
def test_a_training_that_is_stopped_by_any_signal_keeps_a_checkpoint(folder, numbers):
    with Pipeline(folder) as pipeline:
        train = pipeline.start("train", "--fresh", *FLAGS["train"], *OFTEN)
        train.wait_until_it_trains()
        for number in numbers:
            send(train, number)
        ended = train.end(SECONDS)
    assert ended.status == 128 + numbers[0]
    assert ended.is_one_line
    assert faults.progress_of(folder)["settings"]["epochs"] == 9999
    assert faults.progress_of(folder)["batches"] > 0
    assert faults.faults_in(folder) == []
