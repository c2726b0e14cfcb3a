"""Signals that ask a stage to stop: while it starts, and in the middle of a training."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

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
def importing(start, tmp_path):
    """A function that starts a stage, after a command's words if given, and waits until it is importing torch."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torch.py").write_text(SWALLOWS)

    def begin(stage, *before):
        words = [*before, *stages.command(stage, model=start(stage))]
        return stages.running(words, PYTHONPATH=tmp_path / "site")

    return begin


def is_in(name, process, number):
    """Whether a signal is in one of the sets that the kernel has for a process: SigCgt, SigIgn, SigBlk."""
    with open(f"/proc/{process.pid}/status") as file:
        sets = dict(line.split(":", 1) for line in file)
    return bool(int(sets.get(name, "0"), 16) >> (number - 1) & 1)


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
def test_a_signal_at_any_moment_of_the_start_stops_a_stage_and_harms_no_file(start, stage):
    def stop(delay, number):
        """Starts the stage, and sends it the signal after the delay: what is wrong about its end, or None."""
        folder = start(stage, str(delay))
        with stages.running(stages.command(stage, model=folder)) as process:
            time.sleep(delay)
            over = process.poll() is not None or stages.MADE_BY[stage] <= {*os.listdir(folder)}
            handled = over or any(is_in(name, process, signal.SIGTERM) for name in ("SigCgt", "SigBlk"))
            process.send_signal(number)
            _, stderr = process.communicate(timeout=10)
        stages.assert_whole(folder)
        expected = {128 + number} | ({0} if over else set())
        if not handled:
            expected.add(-number)  # it was ended as any process is that has not begun to handle signals
        if process.returncode not in expected or (handled and len(stderr.splitlines()) > 1):
            return (delay, number.name, process.returncode, stderr[-200:])

    with ThreadPoolExecutor(2) as pool:
        assert [wrong for wrong in pool.map(stop, DELAYS, cycle(STOPS)) if wrong] == []


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGHUP,), (signal.SIGQUIT,), (signal.SIGTERM, signal.SIGTERM)],
    ids=lambda numbers: " ".join(number.name for number in numbers),
)
def test_signals_to_all_processes_of_a_training_stop_it_with_a_checkpoint(data, tmp_path, numbers):
    with stages.training(tmp_path) as process:
        for number in numbers[1:]:
            os.killpg(process.pid, number)
        os.killpg(process.pid, numbers[0])
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + numbers[0]
    assert len(stderr.splitlines()) == 1
    assert stages.results(tmp_path)["batches"] > 0
    assert {*stages.contents(tmp_path)} == {"checkpoint.pt", "train_results.json"}
