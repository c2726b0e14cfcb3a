"""The volumes that the fast tests start from. The tests in containers/, which need a Docker engine, run after them."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

import stages
from pictures import prediction

# A shell has a job in the background ignore these, and the stages would inherit that.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# A proxy cannot reach the servers that the tests start.
DIRECT = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
if DIRECT != "*":
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{DIRECT},127.0.0.1,localhost"


def pytest_collection_modifyitems(items):
    def is_in_containers(item):
        return item.path.parent.name == "containers"

    items.sort(key=is_in_containers)
    for item in items:  # the seconds include those of the fixtures that a test is the first to use
        item.add_marker(pytest.mark.timeout(900 if is_in_containers(item) else 240))


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
def predictor(trained, data):
    """The model after a training of one epoch, ready to predict."""
    return prediction.load_predictor(trained, data)


@pytest.fixture(scope="session")
def finished(trained, tmp_path_factory):
    """The volume after all three stages, to look at."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("finished") / "volume")
    for stage in ("evaluate", "infer"):
        stages.assert_succeeds(stages.run(stage, model=folder))
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
    """A function that makes the volume that a stage starts with: empty for train, else with a model and no more."""

    def make(stage, name="volume"):
        folder = tmp_path / name
        folder.mkdir()
        if stage != "train":
            shutil.copy(trained / "mnist_cnn.pt", folder)
        return folder

    return make
