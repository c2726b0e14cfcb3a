"""Faults to try the pipeline with: each has a name in plain words, and does what a flag, a mount or a signal can do.

A `Pipeline` is the project's own compose file under a project name of its own, on a volume of its own:

    with Pipeline(folder) as pipeline:
        train = pipeline.start("train", *OFTEN)
        train.wait_until_it_trains()
        kill(train)
        assert train.end().status == 137
        assert not faults_in(folder)
        assert pipeline.run("train").status == 0
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from PIL import Image

TREE = Path(__file__).parents[1]
STAGES = ("train", "evaluate", "infer")
IMAGES = "mnist"  # what the names of the images begin with
MODEL = "/opt/mount/model"
OFTEN = ("--log-interval", "20")  # flags for a line of progress every few tenths of a second

# The pipeline under test ---------------------------------------------------------------------------------------------


def docker(*words, **options):
    """Runs a docker command, and returns what came of it."""
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False} | options
    return subprocess.run(["docker", *map(str, words)], **options)


def wait_until(condition, seconds=90, what="what was waited for"):
    """Returns what condition() returns, once that is true; TimeoutError after the seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {seconds} s")
        time.sleep(0.02)
    return value


class Pipeline:
    """The compose file on a volume that is a folder of this machine, or a disk of the engine's.

    data: another folder with the data set. disk: options of the engine for a volume, such as small_disk() gives; a
    watching container keeps it mounted then, and look() copies what is on it. environment: variables that the compose
    file looks at. changes: entries of the compose file that are to be different for a service, such as
    train={"network_mode": "none"}.
    """

    def __init__(self, folder, data=TREE / "data", disk=None, environment=None, **changes):
        self.folder, self.disk, self.containers = Path(folder), disk, []
        self.environment = os.environ | (environment or {})
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.folder, *self.folder.rglob("*/")):
            path.chmod(0o777)  # for the owner of the data folder, whoever that is
        self.name = f"fault-{uuid.uuid4().hex[:10]}"
        services = {stage: {"image": f"{IMAGES}-{stage}", "pull_policy": "never"} for stage in STAGES}
        for stage, service in services.items():
            service["volumes"] = [f"{Path(data).resolve()}:/opt/mount/data" + (":ro" if stage != "train" else "")]
            service |= changes.get(stage, {})
            service["volumes"] += changes.get(stage, {}).get("more_volumes", [])
            service.pop("more_volumes", None)
        options = disk or {"type": "none", "o": "bind", "device": str(self.folder.resolve())}
        if disk is not None:
            services["watcher"] = {
                "image": f"{IMAGES}-train",
                "entrypoint": ["sleep", "infinity"],
                "network_mode": "none",
                "stop_signal": "SIGKILL",
                "volumes": [f"mnist:{MODEL}"],
            }
        self.override = {"services": services, "volumes": {"mnist": {"driver_opts": options}}}

    def __enter__(self):
        if self.disk is not None:
            self.compose("up", "--detach", "watcher")
            self.watcher = self.compose("ps", "--quiet", "watcher").stdout.strip()
        return self

    def __exit__(self, *_):
        if self.containers:
            docker("rm", "--force", *[container.id for container in self.containers])
        self.compose("down", "--volumes", "--timeout", "0")

    def compose_command(self, *words):
        """The command line of Compose for this project; the changes come by standard input."""
        return ["docker", "compose", "-p", self.name, "-f", TREE / "docker-compose.yml", "-f", "-", *words]

    def compose(self, *words):
        """Runs a Compose command."""
        return subprocess.run(
            self.compose_command(*words),
            input=json.dumps(self.override),
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=300,
            check=False,
        )

    def start(self, stage, *flags):
        """Starts a stage, and returns its container at once. What it depends on is not started."""
        started = self.compose("run", "--detach", "--no-deps", "-T", stage, *map(str, flags))
        if started.returncode:
            raise RuntimeError(started.stderr)
        self.containers.append(Container(started.stdout.split()[-1]))
        return self.containers[-1]

    def run(self, stage, *flags, seconds=240):
        """Runs a stage to its end."""
        return self.start(stage, *flags).end(seconds)

    @contextlib.contextmanager
    def up(self):
        """Has Compose run all stages in their order, as `docker compose up` does; the block has its process."""
        command = self.compose_command("up", *STAGES)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        ) as up:
            up.stdin.write(json.dumps(self.override).encode())
            up.stdin.close()
            try:
                yield up
            finally:
                up.kill()

    def container(self, stage):
        """The container that Compose made for a stage, as soon as it is there."""
        find = partial(self.compose, "ps", "--all", "--quiet", stage)
        return Container(wait_until(lambda: find().stdout.strip(), what=f"the container of {stage}"))

    def has_started(self, stage):
        """Whether the stage's container, if there is one, ever ran."""
        number = self.compose("ps", "--all", "--quiet", stage).stdout.strip()
        return bool(number) and not Container(number).state()["StartedAt"].startswith("0001-")

    def look(self):
        """The folder with what is in the volume."""
        if self.disk is not None:
            shutil.rmtree(self.folder)
            docker("cp", f"{self.watcher}:{MODEL}", self.folder)
        return self.folder

    def put(self, folder):
        """Copies what is in a folder to the disk."""
        docker("cp", f"{folder}/.", f"{self.watcher}:{MODEL}")


@dataclass
class Ended:
    """How a container ended: its exit status, what it said, and when it began, first spoke (if it did), and ended."""

    status: int
    stdout: str
    stderr: str
    began: float
    spoke: float | None
    ended: float

    @property
    def seconds(self):
        return self.ended - self.began

    @property
    def is_one_line(self):
        """Whether it said one line about its failure, to a person."""
        return len(self.stderr.splitlines()) == 1 and "Traceback" not in self.stdout + self.stderr


class Container:
    """A container of a stage, running or ended."""

    def __init__(self, number):
        self.id = number

    def state(self):
        """What the engine says of it."""
        return json.loads(docker("inspect", "--format", "{{json .State}}", self.id).stdout)

    def logs(self):
        """What it said so far: standard output, standard error."""
        logs = docker("logs", self.id)
        return logs.stdout, logs.stderr

    def end(self, seconds=240):
        """Waits for its end; if that does not come, kills it and raises TimeoutError."""
        try:
            docker("wait", self.id, timeout=seconds)
        except subprocess.TimeoutExpired:
            kill(self)
            raise TimeoutError(f"still running after {seconds} s") from None
        state, words = self.state(), docker("logs", "--timestamps", self.id).stdout.split()
        spoke = clock(words[0]) if words else None
        return Ended(state["ExitCode"], *self.logs(), clock(state["StartedAt"]), spoke, clock(state["FinishedAt"]))

    def wait_until_it_trains(self):
        """Waits for the first line of progress, which comes soon with the flags OFTEN."""
        self.wait_until_or_end(lambda: "images/s" in self.logs()[0], "a line of progress")

    def wait_until_it_listens(self, number=signal.SIGTERM):
        """Waits until the program heeds a signal. (Before, a container's first process does not even notice it.)"""
        caught = "for P in 1 $(cat /proc/1/task/1/children); do sed -n 's/^SigCgt://p' /proc/$P/status; done"

        def heeds():
            """By the program's own handlers: Python itself has one for SIGINT."""
            read = self.inside(caught)
            masks = [int(mask, 16) for mask in read.stdout.split()] if read.returncode == 0 else []
            return any(mask >> number - 1 & mask >> signal.SIGTERM - 1 & 1 for mask in masks)

        self.wait_until_or_end(heeds, "listening")

    def wait_until_or_end(self, condition, what):
        """Waits for a condition; RuntimeError if the container ends before."""

        def met():
            ended = self.state()["Status"] in ("exited", "dead")
            if not condition() and ended:
                raise RuntimeError(f"ended before {what}: {self.logs()}")
            return condition()

        wait_until(met, what=what)

    def inside(self, script):
        """Runs a shell script in the container, with all rights."""
        return docker("exec", "--privileged", "--user", "0", self.id, "sh", "-c", script)


@contextlib.contextmanager
def without_compose(stage, folder, *flags, options=()):
    """A container of a stage's image by `docker run`, with the two folders and nothing else of the compose file."""
    folder.chmod(0o777)
    mounts = ("--volume", f"{TREE / 'data'}:/opt/mount/data:ro", "--volume", f"{folder}:{MODEL}")
    started = docker("run", "--detach", *options, *mounts, f"{IMAGES}-{stage}", *flags)
    if started.returncode:
        raise RuntimeError(started.stderr)
    container = Container(started.stdout.strip())
    try:
        yield container
    finally:
        docker("rm", "--force", container.id)


def clock(text):
    """The engine's timestamps as seconds of the clock."""
    return datetime.fromisoformat(f"{text[:26].rstrip('Z'):0<26}+00:00").timestamp()


# Signals -------------------------------------------------------------------------------------------------------------


def kill(container):
    """The container is gone from one instant to the next, as by a power cut."""
    docker("kill", "--signal", "KILL", container.id)


def ask_to_stop(container):
    """What `docker stop` and `docker compose stop` begin with."""
    docker("kill", "--signal", "TERM", container.id)


def press_ctrl_c(container):
    """What a terminal sends to what runs in it."""
    docker("kill", "--signal", "INT", container.id)


# Kills with the engine's rights, at the instant in which one of some files is there. Exit status 1: it never was.
SNIPER = """
import os, sys, time
pid, files = int(sys.argv[1]), sys.argv[2:]
while not any(map(os.path.lexists, files)):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        sys.exit(1)
    time.sleep(0.00005)
os.kill(pid, 9)
"""


def kill_once_there_is(container, pipeline, *files):
    """Kills the container in the very instant in which one of the files appears in the volume; True if it did."""
    volume, pid = f"{pipeline.name}_mnist:{MODEL}", container.state()["Pid"]
    options = ("--rm", "--pid", "host", "--network", "none", "--volume", volume, "--entrypoint", "python")
    paths = [f"{MODEL}/{file}" for file in files]
    return docker("run", *options, f"{IMAGES}-train", "-c", SNIPER, pid, *paths).returncode == 0


WORKERS = "$(cat /proc/$P/task/$P/children)"
# The process that has workers: the first one, or its child if an init process is the first.
PARENT = 'P=1; for C in $(cat /proc/1/task/1/children); do [ -z "$(cat /proc/$C/task/$C/children)" ] || P=$C; done; '


def wait_for_workers(container, count=2):
    """Waits until the training has its workers."""
    script = PARENT + f"echo {WORKERS}"
    container.wait_until_or_end(lambda: len(container.inside(script).stdout.split()) == count, "the workers")


def kill_one_worker(container):
    """One worker is gone, as when the kernel runs out of memory."""
    container.inside(PARENT + f"set -- {WORKERS}; kill -KILL $1")


def kill_all_workers(container):
    """All workers are gone; the process that looks after them lives."""
    container.inside(PARENT + f"kill -KILL {WORKERS}")


def freeze_one_worker(container):
    """One worker stands still, and does not end."""
    container.inside(PARENT + f"set -- {WORKERS}; kill -STOP $1")


# Trainings that go wrong: what to do to a volume whose training is to go on -------------------------------------------


def throw_off_course(folder):
    """The workers' velocities are so large that the loss is not finite any more after a step or two."""
    forge(folder, velocities=lambda old: 1e37 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1)))


def kill_the_neurons(folder):
    """All parameters become so negative that no neuron ever speaks again: the loss is finite, and stays as it is."""
    forge(folder, velocities=lambda old: torch.full_like(old, 1e30))


def change_settings(folder, **settings):
    """The training was begun with other settings; they stand in two files."""

    def edit(text):
        results = json.loads(text)
        results["settings"] |= settings
        return json.dumps(results)

    forge(folder, results=edit)
    (folder / "train_results.json").write_text(edit((folder / "train_results.json").read_text()))


def forge(folder, **edits):
    """Changes the named parts of checkpoint.pt by functions."""
    checkpoint = load(folder / "checkpoint.pt")
    torch.save(checkpoint | {name: edit(checkpoint[name]) for name, edit in edits.items()}, folder / "checkpoint.pt")


# Disks and limits: what to make a Pipeline with -----------------------------------------------------------------------


def small_disk(size):
    """A volume that holds no more than a size, such as "300k": Pipeline(disk=small_disk("300k"))."""
    return {"type": "tmpfs", "device": "tmpfs", "o": f"size={size},mode=0777"}


def fill_disk(pipeline, leave=0):
    """Fills a small disk up, but for a number of kB."""
    script = f"dd if=/dev/zero of={MODEL}/filler bs=4k; truncate -s -{leave}k {MODEL}/filler"
    docker("exec", pipeline.watcher, "sh", "-c", script)


def free_disk(pipeline):
    """Takes away what filled the disk."""
    docker("exec", pipeline.watcher, "rm", f"{MODEL}/filler")


def read_only():
    """A volume that nobody can write to: Pipeline(**read_only())."""
    mount = {"type": "volume", "source": "mnist", "target": MODEL, "read_only": True}
    return {stage: {"more_volumes": [mount]} for stage in STAGES}


def memory_limit(size):
    """A limit to the memory of every stage, such as "300m": Pipeline(**memory_limit("300m"))."""
    return {"environment": {"MNIST_MEMORY": size}}


def half_the_memory():
    """Half of the memory that the compose file gives a stage: Pipeline(**half_the_memory())."""
    config = docker("compose", "-f", TREE / "docker-compose.yml", "config", "--format", "json").stdout
    return memory_limit(str(int(json.loads(config)["services"]["train"]["mem_limit"]) // 2))


def one_cpu():
    """Time of one CPU for every stage, however many there are: Pipeline(**one_cpu())."""
    return {"environment": {"MNIST_CPU_QUOTA": "100000"}}


# What must hold whatever happened ------------------------------------------------------------------------------------


def faults_in(folder):
    """What is wrong in a volume, as a list of sentences: an artefact that is not whole, or one that another denies."""
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            try:
                check_whole(path)
            except Exception as error:
                found.append(f"{path.name} is not whole: {error}")
    parts = [path.name for path in Path(folder).rglob("*.part")]
    if len(parts) != len({name.split(".part")[0] for name in parts}):
        found.append(f"unfinished files pile up: {parts}")
    if not found:
        found += contradictions_in(Path(folder))
    return found


def check_whole(path):
    """Raises what its reader raises if the file cannot be read from its beginning to its end."""
    if path.suffix == ".json":
        json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".pt":
        load(path)


def load(path):
    """What is in a checkpoint."""
    return torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=True)


def contradictions_in(folder):
    """Where the artefacts of a volume, each whole, contradict each other."""
    results, progress = results_of(folder), progress_of(folder)
    if results and results["finished"] and results["model_sha256"] != sha256(folder / "mnist_cnn.pt"):
        return ["train_results.json is of another model than mnist_cnn.pt"]
    if results and progress and results["run"] == progress["run"] and results["batches"] > progress["batches"]:
        return ["train_results.json is ahead of checkpoint.pt"]
    return []


def results_of(folder):
    """What train_results.json says, or None."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads((folder / "train_results.json").read_text())


def progress_of(folder):
    """The results as checkpoint.pt has them, or None."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(load(folder / "checkpoint.pt")["results"])


def sha256(path):
    """The sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def artefacts(folder, but=()):
    """The sha256 of every file in a volume by its name, but for some; a symlink, folder or FIFO has none."""
    paths = sorted(path for path in Path(folder).rglob("*") if str(path.relative_to(folder)) not in but)
    return {str(path.relative_to(folder)): sha256(path) for path in paths if path.is_file() and not path.is_symlink()}


def seconds_lost(ended, folder):
    """The seconds of training that a killed container took with it: from its last checkpoint to its end.

    A checkpoint is written as soon as the workers rest, so its time is the file's. Before the first, all is lost since
    the container said that it trains.
    """
    checkpoint = folder / "checkpoint.pt"
    saved = checkpoint.stat().st_mtime if checkpoint.exists() else 0
    return ended.ended - max(saved, ended.spoke) if ended.spoke else 0.0
