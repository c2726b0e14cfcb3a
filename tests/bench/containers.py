"""Runs the stages' containers for the benchmark, and says what they took. See bench.py."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
import uuid
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = "mnist-bench"  # its images come from the same layers as those of the user's own project, which stays alone
IMAGES = {stage: f"{PROJECT}-{stage}" for stage in ("train", "evaluate", "infer")}

# Runs a command, and says on standard error what is in /dev/shm (now and then: blocks, free ones, bytes of a block) and
# at the end what the container took: the peak of its memory, and processor time in micro- or nanoseconds, from where
# cgroup v2 or v1 has them. It costs a few milliseconds.
WATCH = """while sleep 0.3; do stat -f -c 'shm %b %f %S' /dev/shm >&2; done &
"$@"; status=$?
cd /sys/fs/cgroup
cat memory.peak memory/memory.max_usage_in_bytes 2>/dev/null | sed 's/^/peak /' >&2
{ grep usage_usec cpu.stat || sed 's/^/usage_nsec /' cpuacct/cpuacct.usage; } >&2 2>/dev/null
exit $status"""


@contextlib.contextmanager
def project():
    """Builds the images of what the tree has, for the block."""
    try:
        compose("build", "--quiet")
        yield
    finally:
        compose("down", "--volumes")
        subprocess.run(["docker", "image", "rm", "--force", *IMAGES.values()], capture_output=True)


def docker(*arguments):
    """The standard output of a docker command, which must succeed."""
    return finished(["docker", *arguments]).stdout


def compose(*arguments):
    """What a command of Compose printed, on both channels; it must succeed."""
    return finished(["docker", "compose", "--project-name", PROJECT, *arguments])


def finished(command):
    """A process that has ended well; if it does not, the benchmark ends."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}bench: status {done.returncode} of: {shlex.join(command)}")
    return done


@contextlib.contextmanager
def new_volume():
    """A volume for the block, by its name."""
    name = f"mnist-bench-{uuid.uuid4().hex}"
    docker("volume", "create", name)
    try:
        yield name
    finally:
        docker("volume", "rm", "--force", name)


def run(stage, command, volume, environment=(), watched=False, reads=None):
    """Runs a command, or flags for the stage's own program, in a new container to its end.

    Returns the seconds from the container's start to its exit as the engine noted them; what it printed; if watched,
    the peaks of its memory and of /dev/shm in bytes; and the contents of the JSON file that it `reads` from the volume.
    """
    if not command or command[0].startswith("-"):
        entrypoint = docker("image", "inspect", "--format", "{{json .Config.Entrypoint}}", IMAGES[stage])
        command = [*json.loads(entrypoint), *command]
    if watched:
        command = ["/bin/sh", "-c", WATCH, "watch", *command]
    container = f"{PROJECT}-{uuid.uuid4().hex}"
    mounts = [f"--volume={volume}:/opt/mount/model", f"--volume={ROOT}/tests/bench:/opt/bench:ro"]
    options = [*mounts, *(f"--env={pair}" for pair in environment), f"--name={container}", f"--entrypoint={command[0]}"]
    try:
        done = compose("run", "--no-deps", "-T", *options, stage, *command[1:])
        taken = {"container_seconds": lifetime(container), "output": done.stdout}
        if watched:
            taken |= watched_figures(done.stderr)
        if reads:
            taken["file"] = read_json(container, reads)
        return taken
    finally:
        subprocess.run(["docker", "rm", "--force", container], capture_output=True)


def lifetime(container):
    """The seconds from the start of a container to its exit."""
    times = docker("inspect", "--format", "{{.State.StartedAt}} {{.State.FinishedAt}}", container).split()
    started, finished = (datetime.fromisoformat(moment) for moment in times)
    return (finished - started).total_seconds()


def watched_figures(text):
    """What WATCH said, None for what the machine does not tell."""
    shm = re.findall(r"^shm (\d+) (\d+) (\d+)$", text, re.M)
    peak = re.search(r"^peak (\d+)$", text, re.M)
    cpu = re.search(r"^usage_([un])sec (\d+)$", text, re.M)
    return {
        "peak_bytes": int(peak[1]) if peak else None,
        "shm_bytes": max(((int(blocks) - int(free)) * int(size) for blocks, free, size in shm), default=None),
        "cpu_seconds": int(cpu[2]) / {"u": 1e6, "n": 1e9}[cpu[1]] if cpu else None,
    }


def read_json(container, name):
    """The contents of a JSON file in the volume of a container that has ended."""
    command = ["docker", "cp", f"{container}:/opt/mount/model/{name}", "-"]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return json.load(tar.extractfile(name))


# Sizes --------------------------------------------------------------------------------------------------------------

REAL_BASE_BYTES = 125e6  # python:3.11-slim-bookworm


def image_sizes():
    """The bytes of each image, of all three together (a layer that they share counts once), and of their base.

    Where no registry can be reached, another image has the base's name, with the wheels to install in /opt/wheels.
    Then the sizes are as they would be on the real base.
    """
    base = re.search(r"^ARG BASE_IMAGE=(\S+)", (ROOT / "model-train/Dockerfile.train").read_text(), re.M)[1]
    correction = 0
    if subprocess.run(["docker", "run", "--rm", "--entrypoint=test", base, "-e", "/opt/wheels"]).returncode == 0:
        correction = REAL_BASE_BYTES - int(docker("image", "inspect", "--format", "{{.Size}}", base))
    layers = {stage: layers_of(image) for stage, image in IMAGES.items()}
    sizes = {stage: sum(own.values()) + correction for stage, own in layers.items()}
    together = {layer: size for own in layers.values() for layer, size in own.items()}
    return {"each": sizes, "together": sum(together.values()) + correction, "stand_in_base": bool(correction)}


def layers_of(image):
    """The bytes of each layer of an image, by place, moment and command: the same only if it is shared."""
    text = docker("history", "--no-trunc", "--human=false", "--format", "{{json .}}", image)
    lines = [json.loads(line) for line in reversed(text.splitlines())]
    return {(place, line["CreatedAt"], line["CreatedBy"]): int(line["Size"]) for place, line in enumerate(lines)}
