"""Signals that ask a stage to stop while it starts or publishes. Those in a training are in test_train.py."""

import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

import stages

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

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


# Python imports this first: writing a file to disk takes half a second.
SLOW_DISK = """
import os, time
def fsync(file):
    print("writing", flush=True)
    time.sleep(0.5)
os.fsync = fsync
"""


@pytest.fixture
def site(tmp_path):
    """A folder with a torch that is imported slowly."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torch.py").write_text(SWALLOWS)
    return tmp_path / "site"


@pytest.fixture
def importing(start, site):
    """A function that starts a stage, after a command's words if given, with the torch above."""
    return lambda stage, *before: stages.running([*before, *stages.command(stage, model=start(stage))], PYTHONPATH=site)


def ignored(process):
    """The signals that a process ignores, once it is importing torch."""
    assert process.stdout.readline() == "importing torch\n", process.stderr.read()
    (mask,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return {number for number in STOPS if int(mask, 16) >> (number - 1) & 1}


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
        assert ignored(process) == {signal.SIGHUP}


def test_the_signals_of_a_terminal_are_ignored_by_a_worker_of_serve_already_while_it_imports(site):
    path = f"{site}:{stages.TREE / 'model-infer'}"
    with stages.running([sys.executable, "-m", "web.worker", "model", "data"], PYTHONPATH=path) as process:
        assert ignored(process) == {*STOPS}


@pytest.mark.parametrize("stage", ["evaluate", "infer"])
def test_a_signal_while_a_stage_publishes_is_handled_when_all_files_are_in_place(finished, tmp_path, stage):
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    folder = shutil.copytree(finished, tmp_path / "volume")
    modified = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with stages.running(stages.command(stage, model=folder), PYTHONPATH=tmp_path) as process:
        while (line := process.stdout.readline()) != "writing\n":
            assert line, process.stderr.read()
        process.send_signal(signal.SIGTERM)
        ended = stages.finish(process)
    assert (ended.returncode, ended.stderr) == (143, "")
    assert {path.name for path in folder.iterdir()} == {*modified}
    replaced = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns > modified[path.name]}
    assert replaced >= stages.MADE_BY[stage]
