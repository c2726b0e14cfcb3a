"""The pipeline in containers: a Compose project of its own on a volume of its own."""

import json
import os
import subprocess
import uuid
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from stages import STAGES, TREE, wait_until

COMPOSE_FILE = TREE / "docker-compose.yml"
MODEL = "/opt/mount/model"  # where a stage has the volume
DATA_FOLDER = "/opt/mount/data"
BASE_IMAGE, REAL_BASE = "python:3.11-slim-bookworm", 125e6  # and its size in bytes
PREFIX = f"mnist-test-{uuid.uuid4().hex[:10]}"  # of this process's images, and of its projects
OFTEN = ("--log-interval", "20")  # flags for a line of progress every few tenths of a second
READ_ONLY = {stage: {"volumes": [f"mnist:{MODEL}:ro"]} for stage in STAGES}  # Pipeline(**READ_ONLY)


def docker(*words, **options):
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False} | options
    return subprocess.run(["docker", *map(str, words)], **options)


def output_of(*words, **options):
    """What a docker command prints; it must succeed."""
    done = docker(*words, **options)
    if done.returncode:
        raise RuntimeError(f"docker {words[0]}: {done.stderr}")
    return done.stdout


def inspect(name):
    return json.loads(output_of("inspect", name))[0]


def image(stage):
    return f"{PREFIX}-{stage}"


def image_size(stage):
    """The bytes of a stage's image as on the real base image, also where a stand-in with wheels in it has its name."""
    size = inspect(image(stage))["Size"]
    return size + REAL_BASE - inspect(BASE_IMAGE)["Size"] if "wheels" in in_image(stage, "ls /opt") else size


def build():
    output_of("compose", "--project-name", PREFIX, "--file", COMPOSE_FILE, "build", "--quiet", timeout=800)


def remove_images():
    docker("image", "rm", "--force", *map(image, (*STAGES, "export")))


def in_image(stage, script, *options, program=("sh", "-c")):
    """Runs a script in a container of a stage's image, as root and without a network, and returns what it prints."""
    options = ("--rm", "--network", "none", "--user", "0", *options, "--entrypoint", program[0])
    return output_of("run", *options, image(stage), *program[1:], script)


def as_root(folder, script):
    """Runs a shell script in a folder of this machine with root's rights."""
    in_image("train", f"cd /folder && {script}", "--volume", f"{folder}:/folder")


@dataclass(frozen=True)
class Container:
    id: str

    def state(self):
        return inspect(self.id)["State"]

    def logs(self):
        return docker("logs", self.id).stdout

    def send(self, number):
        docker("kill", "--signal", int(number), self.id)

    def end(self, seconds=240):
        """Waits for its end, and returns how it ended: as subprocess.CompletedProcess, and when, in seconds since 1970.

        Raises subprocess.TimeoutExpired if the end does not come.
        """
        docker("wait", self.id, timeout=seconds)
        state, logs = self.state(), docker("logs", self.id)
        began, ended = (datetime.fromisoformat(state[name]).timestamp() for name in ("StartedAt", "FinishedAt"))
        result = {"returncode": state["ExitCode"], "stdout": logs.stdout, "stderr": logs.stderr}
        return SimpleNamespace(**result, began=began, ended=ended, seconds=ended - began)

    def inside(self, script):
        """Runs a shell script in the container, with all rights, and returns what came of it."""
        return docker("exec", "--privileged", "--user", "0", self.id, "sh", "-c", script)

    def wait_until_it_trains(self):
        """Waits for the first line of progress, which comes soon with the flags OFTEN."""

        def trains():
            has_ended, value = self.state()["Status"] == "exited", "images/s" in self.logs()
            assert value or not has_ended, f"ended before a line of progress: {self.end()}"
            return value

        wait_until(trains, "a line of progress")


class Pipeline:
    """docker-compose.yml under a project name of its own, on a volume of its own, for a block.

    volume: a folder of this machine; without it the volume is the engine's. disk: the volume is a disk in memory of
    that size, such as "300k". data: another folder with the data set. environment: variables that the compose file
    reads, such as MNIST_MEMORY. changes: what is to be different for a service, such as train={"user": "1000"}.
    """

    files = (COMPOSE_FILE,)

    def __init__(self, volume=None, data=None, disk=None, environment=None, **changes):
        self.name, self.disk = f"{PREFIX}-{uuid.uuid4().hex[:6]}", disk
        self.environment = os.environ | (environment or {})
        names = (*STAGES, "export", *changes)
        services = {name: {"image": image(name), "volumes": []} | changes.get(name, {}) for name in names}
        for stage in STAGES if data else ():
            mount = f"{data}:{DATA_FOLDER}{'' if stage == 'train' else ':ro'}"
            services[stage]["volumes"] = [mount, *services[stage]["volumes"]]
        options = {}
        if disk:
            options = {"type": "tmpfs", "device": "tmpfs", "o": f"size={disk},mode=0777"}
        elif volume:
            volume.mkdir(parents=True, exist_ok=True)
            for path in (volume, *volume.rglob("*/")):
                path.chmod(0o777)  # for the owner of the data folder, whatever uid that is
            options = {"type": "none", "device": str(volume.resolve()), "o": "bind"}
        self.override = {"services": services, "volumes": {"mnist": {"driver_opts": options}}}

    def __enter__(self):
        if self.disk:
            self.shell("true")  # a disk in memory lasts as long as a container has it mounted
        return self

    def __exit__(self, *_):
        docker("rm", "--force", *self.containers())
        self.compose("down", "--volumes", "--timeout", "0")

    def containers(self, **labels):
        """The ids of the project's containers, of those that have some of Compose's labels."""
        labels = {"project": self.name} | labels
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
        return output_of("ps", "--all", "--quiet", "--no-trunc", *filters).split()

    def compose(self, *words, seconds=300):
        """Runs a Compose command, which has the changes to the compose file from standard input."""
        # Compose's own words on standard error are not to be taken for a stage's.
        files = [word for file in (*self.files, "-") for word in ("--file", file)]
        options = ("--progress", "quiet", "--project-name", self.name, *files)
        changes = json.dumps(self.override)
        return docker("compose", *options, *words, input=changes, env=self.environment, timeout=seconds)

    def start(self, stage, *flags, options=()):
        """Starts a stage alone and returns its container at once; options are those of `docker compose run`."""
        started = self.compose("run", "--detach", "--no-deps", "-T", *options, stage, *flags)
        if started.returncode:
            raise RuntimeError(started.stderr)
        return Container(started.stdout.split()[-1])

    def run(self, stage, *flags, options=(), seconds=240):
        return self.start(stage, *flags, options=options).end(seconds)

    def up(self, *flags):
        """Runs the pipeline as `docker compose up` does: how each stage's container ended; only of those that ran."""
        self.compose("up", *flags, seconds=800)
        containers = {stage: self.container(stage) for stage in STAGES}
        return {stage: made.end() for stage, made in containers.items() if made and made.state()["Status"] != "created"}

    def container(self, stage):
        """The container that up() made for a stage, or None."""
        found = self.containers(service=stage, oneoff="False")
        return Container(found[0]) if found else None

    @cached_property
    def helper(self):
        """A container that has the volume mounted and does nothing."""
        return self.start("train", "infinity", options=("--entrypoint", "sleep"))

    def shell(self, script):
        """Runs a shell script as root in the volume's folder, and returns what it prints."""
        done = self.helper.inside(f"cd {MODEL} && {script}")
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout

    def copy_out(self, folder):
        """Copies what is in the volume to a new folder, and returns the folder."""
        output_of("cp", f"{self.helper.id}:{MODEL}", folder)
        return Path(folder)


def statuses(ended):
    """The exit status of each stage that ran, from what Pipeline.up() returns."""
    return {stage: end.returncode for stage, end in ended.items()}
