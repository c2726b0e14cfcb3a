"""The two tiers of tests: a fast one that needs no Docker engine, and the one in tests/containers that drives it.

Where no engine answers, the second is skipped, and the summary says so; with REQUIRE_CONTAINERS set, that is a failure.
"""

import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import stages

TESTS = Path(__file__).parent
TIERS = {"fast": 240, "container": 900}  # and the most seconds for one test, with the fixtures that it is first to use

# The programs' modules. All three folders have a net.py; the original comes first.
sys.path[:0] = [str(stages.TREE / folder) for folder in stages.FOLDERS.values()]


# A shell has a job in the background ignore these, and the stages would inherit that.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def tier_of(nodeid):
    """The tier of a test."""
    return "container" if "containers/" in nodeid else "fast"


@cache
def why_no_containers():
    """The reason for which containers cannot be used here; empty if they can."""
    if not shutil.which("docker"):
        return "there is no docker command here"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            return f"`{' '.join(command)}` does not answer"
        if result.returncode:
            return f"`{' '.join(command)}` says: {' '.join(result.stderr.split())}"
    return ""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: tier_of(item.nodeid) == "container")  # what fails fast comes first
    for item in items:
        tier = tier_of(item.nodeid)
        item.add_marker(pytest.mark.timeout(TIERS[tier]))
        if tier == "container" and why_no_containers():
            item.add_marker(pytest.mark.skip(reason=why_no_containers()))


def count(reporter, tier, *outcomes):
    """How many tests of a tier came out so."""
    return sum(tier_of(report.nodeid) == tier for outcome in outcomes for report in reporter.stats.get(outcome, []))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("tiers")
    for tier in TIERS:
        passed, failed = count(terminalreporter, tier, "passed"), count(terminalreporter, tier, "failed", "error")
        text = f"{passed} passed, {failed} failed"
        if not passed + failed:
            text = f"did not run ({(tier == 'container' and why_no_containers()) or 'none of its tests was chosen'})"
        elif skipped := count(terminalreporter, tier, "skipped"):
            text += f", {skipped} skipped"
        terminalreporter.write_line(f"{tier} tier: {text}")


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("REQUIRE_CONTAINERS") and not count(reporter, "container", "passed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def data():
    """The folder of the data set, which is put there if it is not."""
    fetched = subprocess.run([sys.executable, stages.DATA / "fetch.py"], capture_output=True, text=True, check=False)
    assert fetched.returncode == 0, fetched.stdout
    return stages.DATA


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """The volume after a training of one epoch. Tests only look at it; those that change it take `volume`."""
    folder = tmp_path_factory.mktemp("trained")
    stages.assert_succeeds(stages.run("train", "--epochs", "1", model=folder))
    return folder


@pytest.fixture(scope="session")
def finished(trained, tmp_path_factory):
    """The volume after all three stages, to look at. The last two had nothing but the model."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(trained / "mnist_cnn.pt", folder)
    stages.assert_succeeds(stages.run("evaluate", model=folder))
    stages.assert_succeeds(stages.run("infer", model=folder))
    return folder


@pytest.fixture
def volume(trained, tmp_path):
    """A copy of the volume after a training of one epoch."""
    return shutil.copytree(trained, tmp_path / "volume")


@pytest.fixture
def unfinished(volume):
    """A volume whose training was killed after 1 of 3 epochs."""
    (volume / "mnist_cnn.pt").unlink()
    stages.edit_training(volume, lambda record: (record.update(finished=False), record["settings"].update(epochs=3)))
    return volume


@pytest.fixture
def start(trained, tmp_path):
    """A function that makes the volume that a stage starts with: empty for train, else with a model."""

    def make(stage, name="volume"):
        folder = tmp_path / name
        folder.mkdir()
        if stage != "train":
            shutil.copy(trained / "mnist_cnn.pt", folder)
        return folder

    return make
