"""What the tests share: running the three programs as processes of their own, and looking at what they leave."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).parents[1]
DATA = TREE / "data"
FOLDERS = {"train": "model-train", "evaluate": "model-eval", "infer": "model-infer"}
STAGES = [*FOLDERS]
RAW_FILES = [f"{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3")] + [
    "t10k-labels-idx1-ubyte"
]
MADE_BY = {
    "train": {"mnist_cnn.pt", "checkpoint.pt", "train_results.json", "training.png"},
    "evaluate": {"eval_results.json", "confusion_matrix.png", "mistakes.png"},
    "infer": {"predictions.json", "predictions.png"},  # and the pictures in results
}
SECONDS = 60


def command(stage, *flags, model, data=DATA):
    """The command line of a stage, run from the tree on the folders given."""
    program = TREE / FOLDERS[stage] / f"{stage}.py"
    return [sys.executable, program, "--data", data, "--model", model, *flags]


def run(stage, *flags, model, data=DATA, **env):
    """Runs a stage to its end, with variables added to its environment."""
    return subprocess.run(
        command(stage, *flags, model=model, data=data),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {name: str(value) for name, value in env.items()},
        timeout=SECONDS,
        check=False,
    )


@contextlib.contextmanager
def running(command, **env):
    """Starts a process with variables added to its environment, as the leader of a group of processes.

    The block has it with its output to read from, and all of the group is gone afterwards.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {name: str(value) for name, value in env.items()},
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def await_progress(process):
    """Waits until a training says how it goes; it is in the middle of an epoch then."""
    assert any("images/s" in line for line in process.stdout), process.stderr.read()


def assert_fails(result, status, *names):
    """A failure for a person: the exit status, and one line on standard error that names what it is about."""
    assert result.returncode == status, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for name in names:
        assert name in result.stderr, result.stderr


def sha256(path):
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder):
    """The sha256 of every file in a folder, hidden ones too, by its path in there."""
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


def pictures(folder):
    """The names of what is in the folder of results."""
    return {path.name for path in (folder / "results").iterdir()}


def read_json(path):
    """What a JSON file says."""
    return json.loads(path.read_text())
