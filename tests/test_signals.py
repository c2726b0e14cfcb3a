"""The signals that ask a stage to stop: while it starts, and in the middle of a training."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import faults
import pytest
import stages

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
DELAYS = [step / 10 for step in range(17)]  # seconds; importing torch takes one or two

# Stands in for torch: it swallows exceptions while it is imported, as extension modules in C now and then do.
SWALLOWS = """
import time
print("importing torch", flush=True)
end = time.monotonic() + 3
while time.monotonic() < end:
    try:
        time.sleep(3)
    except BaseException:
        pass
raise ImportError("nothing has ended this process")
"""


@pytest.fixture
def importing(trained, tmp_path):
    """A function that starts a stage, after a command's words if given, and waits until it is importing torch."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torch.py").write_text(SWALLOWS)

    def start(stage, *before):
        return stages.running([*before, *command(stage, trained, tmp_path)], PYTHONPATH=tmp_path / "site")

    return start


def command(stage, trained, folder):
    """The command line of a stage in a new volume in a folder: with a model in it, but for train."""
    volume = folder / "volume"
    volume.mkdir(parents=True)
    if stage != "train":
        (volume / "mnist_cnn.pt").write_bytes((trained / "mnist_cnn.pt").read_bytes())
    return stages.command(stage, model=volume)


def is_in(name, process, number):
    """Whether a signal is in one of the sets that the kernel keeps for a process: SigCgt, SigIgn, SigBlk."""
    with open(f"/proc/{process.pid}/status") as file:
        sets = dict(line.split(":", 1) for line in file)
    return bool(int(sets.get(name, "0"), 16) >> (number - 1) & 1)


# While a stage starts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_signal_stops_a_stage_even_while_an_import_swallows_exceptions(importing, stage, number):
    with importing(stage) as process:
        assert process.stdout.readline() == "importing torch\n", process.stderr.read()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + number, stderr
    assert len(stderr.splitlines()) <= 1


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_signal_that_was_ignored_when_a_stage_started_stays_ignored(importing, stage):
    with importing(stage, "nohup") as process:
        assert process.stdout.readline() == "importing torch\n", process.stderr.read()
        assert is_in("SigIgn", process, signal.SIGHUP)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_signal_at_any_moment_of_the_start_stops_a_stage_and_harms_no_file(trained, tmp_path, stage):
    def stop(delay, number):
        """Starts the stage, and sends it the signal after the delay: what is wrong about its end, or None."""
        folder = tmp_path / str(delay)
        with stages.running(command(stage, trained, folder)) as process:
            time.sleep(delay)
            over = process.poll() is not None or stages.MADE_BY[stage] <= {*os.listdir(folder / "volume")}
            handled = over or any(is_in(name, process, signal.SIGTERM) for name in ("SigCgt", "SigBlk"))
            process.send_signal(number)
            _, stderr = process.communicate(timeout=10)
        if not handled and process.returncode:
            return None  # it was ended as any process is that has not begun to handle signals
        expected = {128 + number} | ({0} if over else set())
        wrong = process.returncode not in expected or len(stderr.splitlines()) > 1
        wrong = wrong or faults.faults_in(folder / "volume")
        return (delay, number.name, process.returncode, stderr[-200:]) if wrong else None

    with ThreadPoolExecutor(2) as pool:
        assert [wrong for wrong in pool.map(stop, DELAYS, cycle(STOPS)) if wrong] == []


# In the middle of a training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGHUP,), (signal.SIGQUIT,), (signal.SIGTERM, signal.SIGTERM)],
    ids=lambda numbers: " ".join(number.name for number in numbers),
)
def test_signals_to_all_processes_of_a_training_stop_it_with_a_checkpoint(data, tmp_path, numbers):
    with stages.running(stages.command("train", "--log-interval", "10", model=tmp_path)) as process:
        stages.await_progress(process)
        for number in numbers:
            os.killpg(process.pid, number)
        assert process.wait(10) == 128 + numbers[-1]
        assert len(process.stderr.readlines()) == 1
    assert stages.read_json(tmp_path / "train_results.json")["batches"] > 0
    assert {*stages.contents(tmp_path)} == {"checkpoint.pt", "train_results.json"}
