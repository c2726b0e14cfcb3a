"""The volume that the container tests start from: what the main command left. Without a Docker engine, all are skipped.

With REQUIRE_CONTAINERS set, the lack of an engine is a failure.
"""

import os
import shutil
import subprocess

import pytest

from pipeline import PREFIX, Pipeline, as_root, docker, output_of, remove_images

OWNERS = (0, 1234)  # of a checkout: root, another user

pytest.register_assert_rewrite("scenarios", "slurm")


def pytest_addoption(parser):
    group = parser.getgroup("chaos", "tests/containers/chaos.py")
    group.addoption("--kills", type=int, default=20, help="random kills of each training (default: %(default)s)")
    group.addoption("--seed", type=int, default=1, help="of the random moments (default: %(default)s)")


@pytest.fixture(scope="session", autouse=True)
def first_run(data):
    """The README's main command, run once to its end: its project, and how the container of each stage ended."""
    try:
        for words in (["info"], ["compose", "version"]):
            output_of(*words, timeout=30)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        give_up = pytest.fail if "REQUIRE_CONTAINERS" in os.environ else pytest.skip
        give_up(" ".join(str(error).split()))
    try:
        with Pipeline() as project:
            ended = project.up("--build")
            project.compose("build", "export", seconds=800)
            yield project, ended
    finally:
        remove_images()
        docker("image", "rm", "--force", f"{PREFIX}-slurm")  # which is there only if a test has had it built


@pytest.fixture(scope="session")
def complete(first_run, tmp_path_factory):
    """A volume after all three stages. Tests only look at it; those that change it take `volume`."""
    project, _ = first_run
    return project.copy_out(tmp_path_factory.mktemp("first_run") / "volume")


@pytest.fixture
def volume(complete, tmp_path):
    """A copy of a volume after all three stages."""
    return shutil.copytree(complete, tmp_path / "volume")


@pytest.fixture(scope="module", params=OWNERS)
def owned(request, data, tmp_path_factory):
    """A data folder with an owner, as in a checkout of that user, and the owner."""
    folder = shutil.copytree(data / "MNIST", tmp_path_factory.mktemp("owned") / "data" / "MNIST").parent
    as_root(folder, f"chown -R {request.param}:{request.param} .")
    yield folder, request.param
    as_root(folder, f"chown -R {os.getuid()}:{os.getgid()} .")  # or pytest could not remove it


@pytest.fixture
def cluster(first_run, tmp_path):
    """A Slurm cluster of two nodes."""
    import slurm  # once its assertions are rewritten

    with slurm.Cluster(tmp_path) as cluster:
        cluster.start_daemons()
        yield cluster
