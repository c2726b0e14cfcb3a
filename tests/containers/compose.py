"""What the container tests share: Compose projects of their own, and what the engine says of them."""

import json
import subprocess
import uuid
from datetime import datetime

import stages

# Compose's own words on standard error are not to be taken for a stage's.
COMPOSE = ["docker", "compose", "--progress", "quiet", "--file", stages.TREE / "docker-compose.yml"]
BASE_IMAGE = "python:3.11-slim-bookworm"


def docker(*args, timeout=60):
    """Runs a docker command, which must succeed, and returns its output."""
    result = subprocess.run(["docker", *args], capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def inspect(*names):
    """What the engine says of containers or images."""
    return json.loads(docker("inspect", *names)) if names else []


def as_root(image, folder, *command):
    """Runs a command in a container that has a folder at /folder, for what needs root's rights."""
    mount = f"type=bind,source={folder},target=/folder"
    options = ["--rm", "--user", "0:0", "--network", "none", "--mount", mount, "--entrypoint", command[0]]
    return docker("run", *options, image, *command[1:])


class Project:
    """A Compose project with a name of its own: docker-compose.yml as it stands, on folders of a test's.

    `folder` is the project's folder, so that ./data is the one in there; without it, it is the tree. `override` is
    what a test changes about docker-compose.yml.
    """

    def __init__(self, folder=stages.TREE, override=None):
        self.name = f"mnist-test-{uuid.uuid4().hex[:10]}"
        self.folder = folder
        self.command = [*COMPOSE, "--project-directory", folder, "--project-name", self.name]
        if override:
            (folder / "override.json").write_text(json.dumps(override))
            self.command[-4:-4] = ["--file", folder / "override.json"]

    def __call__(self, *args, timeout=120):
        """Runs `docker compose` with the arguments."""
        return subprocess.run(
            [*self.command, *args],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )

    def up(self, timeout=120):
        """Runs the pipeline, and returns the state of each container afterwards."""
        self("up", timeout=timeout)
        return self.states()

    def stage(self, name, *flags):
        """Runs one stage alone, with exactly the flags and mounts that it has in the pipeline."""
        return self("run", "--rm", "-T", "--no-deps", name, *flags)

    def containers(self):
        """What the engine says of each service's container."""
        found = inspect(*self("ps", "--all", "--quiet").stdout.split())
        return {container["Config"]["Labels"]["com.docker.compose.service"]: container for container in found}

    def states(self):
        """The state of each service's container."""
        return {service: container["State"] for service, container in self.containers().items()}

    def down(self, *args):
        """Leaves nothing behind, not even what a failed test had started with `run`, to which `down` is blind."""
        mine = f"label=com.docker.compose.project={self.name}"
        for container in docker("ps", "--all", "--quiet", "--filter", mine).split():
            subprocess.run(["docker", "rm", "--force", container], capture_output=True, check=False)
        self("down", "--volumes", "--remove-orphans", "--timeout", "1", *args)


def exit_codes(states):
    """The exit code of each service, None for one that was never started."""
    return {service: state["ExitCode"] if was_started(state) else None for service, state in states.items()}


def was_started(state):
    """Whether a container has ever run."""
    return not state["StartedAt"].startswith("0001-")


def in_seconds(moment):
    """The engine's time, such as 2026-01-31T12:00:00.123456789Z, as seconds since the epoch began."""
    whole, _, fraction = moment.rstrip("Z").partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def seconds(state):
    """How long a container ran."""
    return in_seconds(state["FinishedAt"]) - in_seconds(state["StartedAt"])


def assert_in_order(states):
    """Each stage started only when the one before it had ended."""
    assert in_seconds(states["train"]["FinishedAt"]) <= in_seconds(states["evaluate"]["StartedAt"])
    assert in_seconds(states["evaluate"]["FinishedAt"]) <= in_seconds(states["infer"]["StartedAt"])
