"""Runs programs in the stages' containers for the benchmark, and measures what they take. See bench.py."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
import uuid
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = "mnist-bench"  # not the user's own project, whose volume and images are left alone
IMAGES = {stage: f"{PROJECT}-{stage}" for stage in ("train", "evaluate", "infer")}
REAL_BASE_BYTES = 125e6  # of python:3.11-slim-bookworm

# Runs a command; prints to standard error what is in /dev/shm (now and then: blocks, free ones, bytes of a block) and,
# at the end, the container's peak memory and its processor time in micro- or nanoseconds, from cgroup v2 or v1.
WATCH = """while sleep 0.3; do stat -f -c 'shm %b %f %S' /dev/shm >&2; done &
"$@"; status=$?
cd /sys/fs/cgroup
cat memory.peak memory/memory.max_usage_in_bytes 2>/dev/null | sed 's/^/peak /' >&2
{ grep usage_usec cpu.stat || sed 's/^/usage_nsec /' cpuacct/cpuacct.usage; } >&2 2>/dev/null
exit $status"""


@contextlib.contextmanager
def project():
    """Builds the images from the tree, and removes them after the block."""
    try:
        compose("build", "--quiet")
        yield
    finally:
        compose("down", "--volumes")
        subprocess.run(["docker", "image", "rm", "--force", *IMAGES.values()], capture_output=True)


def docker(*arguments):
    """The standard output of a docker command, which must succeed."""
    return run_command(["docker", *arguments]).stdout


def compose(*arguments):
    """A command of Compose that has succeeded, with its output."""
    return run_command(["docker", "compose", "--project-name", PROJECT, *arguments])


def run_command(command):
    """A process that has succeeded; if it fails, the benchmark ends."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}bench: status {done.returncode} of: {shlex.join(command)}")
    return done


@contextlib.contextmanager
def new_volume():
    """The name of a volume, which is removed after the block."""
    name = f"{PROJECT}-{uuid.uuid4().hex}"
    docker("volume", "create", name)
    try:
        yield name
    finally:
        docker("volume", "rm", "--force", name)


def read_json(volume, name):
    """The contents of a JSON file in a volume."""
    return json.loads(docker("run", "--rm", f"--volume={volume}:/v", "--entrypoint=cat", IMAGES["train"], f"/v/{name}"))


def run(stage, arguments, volume, environment=(), watched=False):
    """Runs Python with the arguments in a new container of a stage, as its own program runs there, to its end.

    Returns the seconds from the container's start to its exit as the engine noted them; its standard output; and if
    watched, the processor time in seconds, and the peaks of its memory and of /dev/shm in bytes.
    """
    command = ["/opt/entrypoint.sh", *arguments]
    if watched:
        command = ["/bin/sh", "-c", WATCH, "watch", *command]
    container = f"{PROJECT}-{uuid.uuid4().hex}"
    mounts = [f"--volume={volume}:/opt/mount/model", f"--volume={ROOT}/tests/bench:/opt/bench:ro"]
    options = [*mounts, *(f"--env={pair}" for pair in environment), f"--name={container}", f"--entrypoint={command[0]}"]
    try:
        done = compose("run", "--no-deps", "-T", *options, stage, *command[1:])
        times = docker("inspect", "--format", "{{.State.StartedAt}} {{.State.FinishedAt}}", container).split()
    finally:
        subprocess.run(["docker", "rm", "--force", container], capture_output=True)
    started, finished = map(datetime.fromisoformat, times)
    figures = parse_figures(done.stderr) if watched else {}
    return {"container_seconds": (finished - started).total_seconds(), "output": done.stdout} | figures


def parse_figures(text):
    """What WATCH printed; None for what the machine does not report."""
    shm = re.findall(r"^shm (\d+) (\d+) (\d+)$", text, re.M)
    peak = re.search(r"^peak (\d+)$", text, re.M)
    cpu = re.search(r"^usage_([un])sec (\d+)$", text, re.M)
    return {
        "peak_bytes": int(peak[1]) if peak else None,
        "shm_bytes": max(((int(blocks) - int(free)) * int(size) for blocks, free, size in shm), default=None),
        "cpu_seconds": int(cpu[2]) / {"u": 1e6, "n": 1e9}[cpu[1]] if cpu else None,
    }


def image_sizes():
    """The bytes of each image, and of all three together: a layer that they share counts once.

    Where no registry can be reached, another image has the base's name, with packages to install in /opt/wheels. Then
    the sizes are calculated as they would be on the real base.
    """
    base = re.search(r"^ARG BASE_IMAGE=(\S+)", (ROOT / "model-train/Dockerfile.train").read_text(), re.M)[1]
    correction = 0
    if subprocess.run(["docker", "run", "--rm", "--entrypoint=test", base, "-e", "/opt/wheels"]).returncode == 0:
        correction = REAL_BASE_BYTES - int(docker("image", "inspect", "--format", "{{.Size}}", base))
    layers = {stage: layers_of(image) for stage, image in IMAGES.items()}
    sizes = {f"image of {stage}": sum(own.values()) + correction for stage, own in layers.items()}
    together = {layer: size for own in layers.values() for layer, size in own.items()}
    return sizes | {"the three images together": sum(together.values()) + correction}


def layers_of(image):
    """The bytes of each layer of an image, by place, time and command: the same only if it is shared."""
    text = docker("history", "--no-trunc", "--human=false", "--format", "{{json .}}", image)
    lines = [json.loads(line) for line in reversed(text.splitlines())]
    return {(place, line["CreatedAt"], line["CreatedBy"]): int(line["Size"]) for place, line in enumerate(lines)}
