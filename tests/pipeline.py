"""The pipeline in containers: a Compose project of its own on a volume of its own.

build()
with Pipeline(folder) as pipeline:
    train = pipeline.start("train", "--epochs", "2")
    train.wait_until_it_trains()
    train.send(SIGKILL)
    assert train.end().status == 137
    assert pipeline.run("train").status == 0
remove_images()
"""

import contextlib
import json
import os
import subprocess
import uuid
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from signal import SIGKILL, SIGTERM

from stages import DATA, QUICK, STAGES, TREE, wait_until

COMPOSE_FILE = TREE / "docker-compose.yml"
MODEL = "/opt/mount/model"  # where a stage has the volume
DATA_FOLDER = "/opt/mount/data"
PREFIX = f"mnist-test-{uuid.uuid4().hex[:10]}"  # of this process's images, and of its projects
OFTEN = ("--log-interval", "20")  # flags for a line of progress every few tenths of a second
SMALL = {  # flags for a run that takes little time
    "train": QUICK,
    "evaluate": ("--min-accuracy", "20"),
    "infer": (),
}


def docker(*words, **options):
    """Runs a docker command, and returns what came of it."""
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False} | options
    return subprocess.run(["docker", *map(str, words)], **options)


def output_of(*words, **options):
    """What a docker command prints; it must succeed."""
    done = docker(*words, **options)
    if done.returncode:
        raise RuntimeError(f"docker {words[0]}: {done.stderr}")
    return done.stdout


def inspect(*names):
    """What the engine says of containers or images, a dict for each."""
    return json.loads(output_of("inspect", *names)) if names else []


def image(stage):
    """The name of a stage's image."""
    return f"{PREFIX}-{stage}"


def build():
    """Builds the images of the tree as it is."""
    output_of("compose", "--project-name", PREFIX, "--file", COMPOSE_FILE, "build", "--quiet", timeout=800)


def remove_images():
    """Removes them again."""
    docker("image", "rm", "--force", *map(image, STAGES))


def in_image(stage, script, *options, program=("sh", "-c")):
    """Runs a script in a container of a stage's image, as root and without a network, and returns what it prints."""
    options = ("--rm", "--network", "none", "--user", "0", *options, "--entrypoint", program[0])
    return output_of("run", *options, image(stage), *program[1:], script)


def as_root(folder, script):
    """Runs a shell script in a folder of this machine with root's rights."""
    in_image("train", f"cd /folder && {script}", "--volume", f"{folder}:/folder")


def seconds_since_epoch(text):
    """The seconds since 1970 of the engine's time, such as 2026-01-31T12:00:00.123456789Z."""
    return datetime.fromisoformat(f"{text[:26].rstrip('Z'):0<26}+00:00").timestamp()


@dataclass
class Ended:
    """How a container ended: its exit status, its output, and when it began, first printed (if it did), and ended."""

    status: int
    stdout: str
    stderr: str
    began: float
    first_output: float | None
    ended: float

    @property
    def seconds(self):
        return self.ended - self.began

    @property
    def is_one_line(self):
        """Whether it printed one line about its failure, for a person."""
        return len(self.stderr.splitlines()) == 1 and "Traceback" not in self.stdout + self.stderr


@dataclass(frozen=True)
class Container:
    """A container of a stage, running or ended."""

    id: str

    def state(self):
        """Its state, as the engine has it."""
        return inspect(self.id)[0]["State"]

    def was_started(self):
        """Whether it ever ran."""
        return not self.state()["StartedAt"].startswith("0001-")

    def logs(self):
        """What it printed so far: standard output, standard error."""
        logs = docker("logs", self.id)
        return logs.stdout, logs.stderr

    def send(self, number):
        """Sends a signal to its first process."""
        docker("kill", "--signal", int(number), self.id)

    def end(self, seconds=240):
        """Waits for its end; if that does not come, kills it and raises TimeoutError."""
        try:
            docker("wait", self.id, timeout=seconds)
        except subprocess.TimeoutExpired:
            self.send(SIGKILL)
            raise TimeoutError(f"still running after {seconds} s") from None
        state, words = self.state(), docker("logs", "--timestamps", self.id).stdout.split()
        first_output = seconds_since_epoch(words[0]) if words else None
        moments = [seconds_since_epoch(state[name]) for name in ("StartedAt", "FinishedAt")]
        return Ended(state["ExitCode"], *self.logs(), moments[0], first_output, moments[1])

    def inside(self, script):
        """Runs a shell script in the container, with all rights, and returns what came of it."""
        return docker("exec", "--privileged", "--user", "0", self.id, "sh", "-c", script)

    def wait_until(self, condition, what):
        """Waits for a condition; RuntimeError if the container ends before."""

        def is_met():
            ended = self.state()["Status"] in ("exited", "dead")
            if not condition() and ended:
                raise RuntimeError(f"ended before {what}: {self.logs()}")
            return condition()

        wait_until(is_met, what=what)

    def wait_until_it_trains(self):
        """Waits for the first line of progress, which comes soon with the flags OFTEN."""
        self.wait_until(lambda: "images/s" in self.logs()[0], "a line of progress")

    def wait_until_it_handles(self, number):
        """Waits until the program has its own handler for a signal. (Python itself has one for SIGINT alone.)"""
        script = "for P in 1 $(cat /proc/1/task/1/children); do sed -n 's/^SigCgt://p' /proc/$P/status; done"

        def handles():
            read = self.inside(script)
            masks = [int(mask, 16) for mask in read.stdout.split()] if read.returncode == 0 else []
            return any(mask >> number - 1 & mask >> SIGTERM - 1 & 1 for mask in masks)

        self.wait_until(handles, "a handler of the signal")


class Pipeline:
    """docker-compose.yml under a project name of its own, on a volume of its own, for a block.

    volume: a folder of this machine; without it the volume is the engine's. disk: the volume is a disk in memory of
    that size, such as "300k". data: another folder with the data set. environment: variables that the compose file
    reads, such as MNIST_MEMORY. changes: what is to be different for a service, such as train={"user": "1000"}.
    """

    def __init__(self, volume=None, data=None, disk=None, environment=None, **changes):
        self.volume, self.disk = volume, disk
        self.name = f"{PREFIX}-{uuid.uuid4().hex[:6]}"
        self.environment = os.environ | (environment or {})
        services = {stage: {"image": image(stage), "volumes": []} | changes.get(stage, {}) for stage in STAGES}
        for stage, service in services.items():
            mounts = [f"{data}:{DATA_FOLDER}{'' if stage == 'train' else ':ro'}"] if data else []
            service["volumes"] = mounts + service["volumes"]
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
        options = ("--progress", "quiet", "--project-name", self.name, "--file", COMPOSE_FILE, "--file", "-")
        changes = json.dumps(self.override)
        return docker("compose", *options, *words, input=changes, env=self.environment, timeout=seconds)

    def start(self, stage, *flags, options=()):
        """Starts a stage alone and returns its container at once; options are those of `docker compose run`."""
        started = self.compose("run", "--detach", "--no-deps", "-T", *options, stage, *flags)
        if started.returncode:
            raise RuntimeError(started.stderr)
        return Container(started.stdout.split()[-1])

    def run(self, stage, *flags, options=(), seconds=240):
        """Runs a stage alone to its end."""
        return self.start(stage, *flags, options=options).end(seconds)

    def up(self, *flags):
        """Runs the pipeline as `docker compose up` does: how each stage's container ended, None if it never ran."""
        self.compose("up", *flags, seconds=800)
        containers = {stage: self.container(stage) for stage in STAGES}
        return {stage: found.end() if found and found.was_started() else None for stage, found in containers.items()}

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

    def copy_in(self, folder):
        """Copies what is in a folder to the volume."""
        output_of("cp", f"{folder}/.", f"{self.helper.id}:{MODEL}")

    def copy_out(self, folder):
        """Copies what is in the volume to a new folder, and returns the folder."""
        output_of("cp", f"{self.helper.id}:{MODEL}", folder)
        return Path(folder)


@contextlib.contextmanager
def without_compose(stage, volume, *flags, options=()):
    """A container of a stage's image by `docker run`, with the two folders and nothing else of the compose file."""
    volume.chmod(0o777)
    mounts = ("--volume", f"{DATA}:{DATA_FOLDER}:ro", "--volume", f"{volume}:{MODEL}")
    container = Container(output_of("run", "--detach", *options, *mounts, image(stage), *flags).strip())
    try:
        yield container
    finally:
        docker("rm", "--force", container.id)


def statuses(ended):
    """The exit status of each stage, from what Pipeline.up() returns."""
    return {stage: end and end.status for stage, end in ended.items()}
