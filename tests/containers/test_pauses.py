"""Pauses of a training longer than its watchdog waits: what stands still altogether does not hang."""

import os
import signal
import subprocess
import time
from types import SimpleNamespace

import faults
import pytest
import stages
from faults import Pipeline, docker

FLAGS = ("--epochs", "2", "--batch-size", "1000", "--log-interval", "1")  # such a batch takes longer than a look at it
SECONDS = 68  # the watchdog waits for 60


@pytest.fixture(scope="module")
def interrupted(pipeline, data, tmp_path_factory):
    """What became of three trainings, interrupted at the same time so that the time is spent once.

    One was paused by the engine; of one, all processes were stopped and continued; of one, a single worker was stopped.
    """
    faults.IMAGES = pipeline.project.name
    folders = {how: tmp_path_factory.mktemp(how) for how in ("paused", "stopped", "frozen")}
    command = stages.command("train", *FLAGS, model=folders["stopped"])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with (
        Pipeline(folders["paused"]) as first,
        Pipeline(folders["frozen"]) as second,
        subprocess.Popen(command, start_new_session=True, **pipes) as process,
    ):
        try:
            containers = {"paused": first.start("train", *FLAGS), "frozen": second.start("train", *FLAGS)}
            for container in containers.values():
                container.wait_until_it_trains()
            stages.await_progress(process)
            os.killpg(process.pid, signal.SIGSTOP)
            docker("pause", containers["paused"].id)
            faults.freeze_one_worker(containers["frozen"])
            time.sleep(SECONDS)
            os.killpg(process.pid, signal.SIGCONT)
            docker("unpause", containers["paused"].id)
            _, stderr = process.communicate(timeout=240)
            ended = {how: container.end() for how, container in containers.items()}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    ended["stopped"] = SimpleNamespace(status=process.returncode, stderr=stderr)
    return {how: (ended[how].status, ended[how].stderr, faults.results_of(folders[how])) for how in folders}


@pytest.mark.parametrize("how", ["paused", "stopped"])
def test_a_training_that_stood_still_for_longer_than_a_minute_goes_on_with_all_workers(interrupted, how):
    status, stderr, results = interrupted[how]
    assert (status, stderr) == (0, "")
    assert results["finished"]
    assert results["lost_workers"] == []


def test_a_worker_that_alone_stands_still_is_killed_and_the_other_does_its_work(interrupted):
    status, stderr, results = interrupted["frozen"]
    assert (status, stderr) == (0, "")
    assert [lost["signal"] for lost in results["lost_workers"]] == [signal.SIGKILL]
    assert sum(worker["images"] for worker in results["workers"]) == 2 * 55_000
