"""The crash contract: what is done to a stage, and what must hold then. An AssertionError says what does not.

Each function takes a volume that it may change. The container tests run each once, and chaos.py many times.
"""

import contextlib
import subprocess
import time
from signal import SIGKILL

import faults
from pipeline import OFTEN, Pipeline, docker
from stages import STAGES, contents

MOST_SECONDS_LOST = 5
MOST_SECONDS_TO_STOP = 3


def fails(ended, *names, status=1):
    """A failure for a person: the exit status, and one line on standard error that names what it is about."""
    assert ended.status == status, ended
    assert ended.is_one_line, ended
    assert all(name in ended.stderr for name in names), ended
    return True


def succeeds(ended):
    """A success without a warning."""
    assert (ended.status, ended.stderr) == (0, ""), ended
    return True


def check_death(death, before):
    """What must hold of a training that was killed, and whose checkpoint had done the batches `before`."""
    assert death.ended.status == 128 + SIGKILL
    assert death.faults == []
    assert death.batches >= before
    assert death.seconds_lost <= MOST_SECONDS_LOST


def kill_while_publishing(volume, stage, file, is_brief=False):
    """Kills a stage at the instant in which it writes a file; `is_brief` for one that is there for too short a time."""
    names = {path.name for path in volume.iterdir()}
    with Pipeline(volume) as project:
        container = project.start(stage)
        was_hit = faults.kill_once_there_is(container, project, file)
        container.end()
        assert was_hit or is_brief
        assert faults.faults_in(volume) == []
        assert project.run(stage).status == 0
    after = {path.name for path in volume.iterdir()}
    assert after >= names
    assert not any(name.startswith(".") for name in after)


def stop_training(volume, *signals, after=None):
    """Sends signals to a training: in its middle, or the seconds `after` it has its handlers."""
    before = faults.batches_done(volume)
    with Pipeline(volume) as project:
        if after is None:
            train = faults.start_training(project)
        else:
            train = project.start("train", *OFTEN)
            train.wait_until_it_handles(signals[0])
            with contextlib.suppress(subprocess.TimeoutExpired):
                docker("wait", train.id, timeout=after)
        asked = time.time()
        for number in signals:
            train.send(number)
        ended = train.end()
    assert ended.status == 128 + signals[0]
    assert ended.ended - asked < MOST_SECONDS_TO_STOP
    assert faults.faults_in(volume) == []
    if after is None:
        assert ended.is_one_line, ended
        assert faults.batches_done(volume) > before


def lose_one_worker(volume, fault):
    """Kills or freezes one worker of a training; the others take over its work."""
    with Pipeline(volume) as project:
        train = faults.start_training(project)
        fault(train)
        succeeds(train.end())
    results = faults.results_of(volume)
    assert [lost["signal"] for lost in results["lost_workers"]] == [SIGKILL]
    assert sum(worker["images"] for worker in results["workers"]) == 55_000 * results["settings"]["epochs"]
    assert faults.faults_in(volume) == []


def lose_all_workers(volume):
    """Kills all workers of a training, whose last checkpoint stays."""
    with Pipeline(volume) as project:
        train = faults.start_training(project)
        faults.kill_all_workers(train)
        fails(train.end(seconds=30), "MNIST_MEMORY")
    assert faults.faults_in(volume) == []
    assert not (volume / "mnist_cnn.pt").exists()
    assert faults.batches_done(volume) > 0


def train_to_nothing(volume, fault):
    """Has a resumed training diverge or learn nothing; then nothing is published."""
    fault(volume)
    with Pipeline(volume) as project:
        fails(project.run("train"), "--lr")
    assert faults.faults_in(volume) == []
    assert not (volume / "mnist_cnn.pt").exists()


def fill_disk(volume, copy, stage, left):
    """Runs a stage on a full disk that has a copy of the volume and some kB left, and again when there is space."""
    with Pipeline(disk="4m") as project:
        project.copy_in(volume)
        faults.fill_disk(project, leave=left)
        fails(project.run(stage), "No space")
        faults.free_disk(project)
        before, after = contents(volume), contents(project.copy_out(copy))
        for found in (before, after):
            found.pop("train_results.json")  # may name the training that has been resumed
        assert after == before
        assert faults.faults_in(copy) == []
        succeeds(project.run(stage))


def write_protect(volume, stage, *flags):
    """Runs a stage on a volume that is mounted read-only."""
    before = contents(volume)
    with Pipeline(volume, **faults.read_only()) as project:
        fails(project.run(stage, *flags), "/opt/mount/model")
    assert contents(volume) == before


def train_twice(volume):
    """Starts a second training on a volume, which is refused; the first one goes on."""
    with Pipeline(volume) as project:
        first = faults.start_training(project, "--fresh", "--epochs", "100")
        fails(project.run("train", "--epochs", "100"), first.id[:12], status=2)
        assert first.state()["Running"]
        first.send(SIGKILL)
        first.end()
        faults.start_training(project)  # the lock has gone with its owner


def run_within(volume, limit):
    """Runs all stages within a limit, an environment for the compose file."""
    with Pipeline(volume, environment=limit) as project:
        for stage in STAGES:
            succeeds(project.run(stage, *(["--min-accuracy", "20"] if stage == "evaluate" else [])))
    assert faults.results_of(volume)["lost_workers"] == []
    assert faults.faults_in(volume) == []
