"""The pipeline, run once for all container tests, and projects that go on from what it left."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import stages
from compose import Project


@dataclass
class Pipeline:
    """What a run of the whole pipeline left."""

    project: Project
    containers: dict  # what the engine says of each service's container
    logs: dict  # what each service printed
    volume: Path  # a copy of the volume

    def image(self, stage):
        """The name of a stage's image."""
        return f"{self.project.name}-{stage}"


@pytest.fixture(scope="session")
def pipeline(data, tmp_path_factory):
    """The README's main command, run once to its end, in a project and a volume of its own."""
    project = Project()
    volume = tmp_path_factory.mktemp("pipeline") / "volume"
    try:
        up = project("up", "--build", timeout=800)
        logs = {stage: project("logs", "--no-log-prefix", stage).stdout for stage in stages.STAGES}
        project("cp", "train:/opt/mount/model/.", str(volume))
        assert volume.exists(), up.stdout + up.stderr
        yield Pipeline(project, project.containers(), logs, volume)
    finally:
        project.down("--rmi", "local")


@pytest.fixture
def start(pipeline, tmp_path):
    """A function that makes a project of the images built before, with another folder as ./data if it is given one.

    Its volume is `project.volume`, a folder, which is a copy of what the pipeline left, unless it is to be `empty`; or
    it is another one, as `volume` describes it to Compose. `override` is what to change about the services.
    """
    projects = []

    def make(data=stages.DATA, empty=False, volume=None, override=None):
        folder = tmp_path / f"project{len(projects)}"
        folder.mkdir()
        (folder / "data").symlink_to(data)
        services = {stage: {"image": pipeline.image(stage)} for stage in stages.STAGES}
        for stage, changes in (override or {}).items():
            services[stage] |= changes
        bind = {"driver_opts": {"type": "none", "o": "bind", "device": str(folder / "volume")}}
        projects.append(
            Project(folder, {"services": services, "volumes": {"mnist": bind if volume is None else volume}})
        )
        projects[-1].volume = fill(folder / "volume", empty) if volume is None else None
        return projects[-1]

    def fill(volume, empty):
        volume.mkdir() if empty else shutil.copytree(pipeline.volume, volume)
        for path in (volume, *volume.rglob("*/")):
            path.chmod(0o777)  # for the owner of ./data, whoever that is
        return volume

    yield make
    for project in projects:
        project.down()
