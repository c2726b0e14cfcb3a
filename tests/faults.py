"""Faults to try the pipeline with, as a flag, a mount, a limit or a signal can cause them, and what must hold after."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL

import pipeline
import torch
from PIL import Image
from pipeline import MODEL, OFTEN, Ended, Pipeline, docker
from stages import STAGES, contents, read_json, sha256

# Kills --------------------------------------------------------------------------------------------------------------

# Kills with the engine's rights, at the instant in which one of some files is there. Exit status 1: it never was.
KILL_ON_FILE = """
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


def kill_once_there_is(container, project, *files):
    """Kills a container of the project at the instant in which one of the files is in the volume; True if it did."""
    options = ("--rm", "--pid", "host", "--network", "none", "--volume", f"{project.name}_mnist:{MODEL}")
    script = ("--entrypoint", "python", pipeline.image("train"), "-c", KILL_ON_FILE)
    paths = [f"{MODEL}/{file}" for file in files]
    return docker("run", *options, *script, container.state()["Pid"], *paths).returncode == 0


WORKERS = "$(cat /proc/$P/task/$P/children)"
# The process that has workers: the first one, or its child if an init process is the first.
PARENT = 'P=1; for C in $(cat /proc/1/task/1/children); do [ -z "$(cat /proc/$C/task/$C/children)" ] || P=$C; done; '


def start_training(project, *flags):
    """A container that is in the middle of its training."""
    train = project.start("train", *flags, *OFTEN)
    train.wait_until_it_trains()
    script = PARENT + f"echo {WORKERS}"
    train.wait_until(lambda: len(train.inside(script).stdout.split()) == 2, "the workers")
    return train


def kill_one_worker(train):
    """One worker is gone, as when the kernel runs out of memory."""
    train.inside(PARENT + f"set -- {WORKERS}; kill -KILL $1")


def kill_all_workers(train):
    """All workers are gone; their parent lives."""
    train.inside(PARENT + f"kill -KILL {WORKERS}")


def freeze_one_worker(train):
    """One worker stands still, and does not end."""
    train.inside(PARENT + f"set -- {WORKERS}; kill -STOP $1")


# Trainings under way, and what makes them go wrong when they are resumed ----------------------------------------------


def begin_training(folder):
    """Leaves a training of 100 epochs in a folder, killed after its first checkpoint."""
    with Pipeline(folder) as project:
        flags = ("--epochs", "100", "--lr", "0.02", "--batch-size", "250")  # mild enough to end at any epoch
        train = project.start("train", *flags)
        train.wait_until((folder / "checkpoint.pt").exists, "a checkpoint")
        train.send(SIGKILL)
        train.end()


def shorten_training(folder):
    """Makes the epoch that is under way the last one."""
    change_settings(folder, epochs=len(progress_of(folder)["history"]) + 1)


def make_loss_infinite(folder):
    """The workers' velocities are so large that the loss is not finite any more after a step or two."""
    forge(folder, velocities=lambda old: 1e37 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1)))


def make_neurons_dead(folder):
    """All parameters become so negative that no neuron is ever active: the loss is finite, and stays as it is."""
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


# Disks and limits -----------------------------------------------------------------------------------------------------


def fill_disk(project, leave=0):
    """Fills the disk of a Pipeline(disk=...), but for a number of kB."""
    project.shell(f"dd if=/dev/zero of=filler bs=4k 2>&1; truncate -s -{leave}k filler")


def free_disk(project):
    """Takes away what filled the disk."""
    project.shell("rm filler")


def read_only():
    """A volume that nobody can write to: Pipeline(**read_only())."""
    return {stage: {"volumes": [f"mnist:{MODEL}:ro"]} for stage in STAGES}


def half_the_memory():
    """Half of the memory that the compose file gives a stage: Pipeline(environment=half_the_memory())."""
    config = docker("compose", "--file", pipeline.COMPOSE_FILE, "config", "--format", "json").stdout
    return {"MNIST_MEMORY": str(int(json.loads(config)["services"]["train"]["mem_limit"]) // 2)}


ONE_CPU = {"MNIST_CPU_QUOTA": "100000"}  # however many there are


# What must hold whatever happened -------------------------------------------------------------------------------------


def faults_in(folder):
    """What is wrong in a volume, as a list of sentences: an artifact that is not whole, or one that another denies."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            try:
                check_whole(path)
            except Exception as error:
                found.append(f"{path.name} is not whole: {error}")
    parts = [path.name for path in folder.rglob("*.part")]
    if len(parts) != len({name.split(".part")[0] for name in parts}):
        found.append(f"unfinished files pile up: {parts}")
    return found or contradictions_in(folder)


def check_whole(path):
    """Raises what its reader raises if the file cannot be read from its beginning to its end."""
    if path.suffix == ".json":
        json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)
    elif path.suffix == ".png":
        with Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".pt":
        load(path)


def load(path):
    """What is in a checkpoint."""
    return torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=True)


def contradictions_in(folder):
    """Where the artifacts of a volume, each whole, contradict each other."""
    results, progress = results_of(folder), progress_of(folder)
    if results and results["finished"] and results["model_sha256"] != sha256(folder / "mnist_cnn.pt"):
        return ["train_results.json is of another model than mnist_cnn.pt"]
    if results and progress and results["run"] == progress["run"] and results["batches"] > progress["batches"]:
        return ["train_results.json is ahead of checkpoint.pt"]
    return []


def results_of(folder):
    """What train_results.json says, or None."""
    with contextlib.suppress(FileNotFoundError):
        return read_json(folder / "train_results.json")


def progress_of(folder):
    """The results as checkpoint.pt has them, or None."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(load(folder / "checkpoint.pt")["results"])


def batches_done(folder):
    """The batches that the checkpoint has done."""
    progress = progress_of(folder)
    return progress["batches"] if progress else 0


def published(folder):
    """The sha256 of every file in a volume that a reader of the results looks at: not of a training's progress."""
    return {name: sha for name, sha in contents(folder).items() if name not in ("checkpoint.pt", "train_results.json")}


@dataclass
class Death:
    """How a killed training ended, and what was in the volume then."""

    ended: Ended
    faults: list
    batches: int
    seconds_lost: float  # of training: from the last checkpoint to the end


def death_of(train, folder):
    """What a training in the folder, which has been killed, left.

    A checkpoint is written as soon as the workers rest, so its time is the file's. Before the first, all is lost since
    the container's first output.
    """
    ended, checkpoint = train.end(), folder / "checkpoint.pt"
    saved = checkpoint.stat().st_mtime if checkpoint.exists() else 0
    seconds_lost = ended.ended - max(saved, ended.first_output) if ended.first_output else 0.0
    return Death(ended, faults_in(folder), batches_done(folder), seconds_lost)
