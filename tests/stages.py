"""What the tests share: running the three programs, looking at what they leave, and editing it."""

import contextlib
import gzip
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

TREE = Path(__file__).parents[1]
DATA = TREE / "data"
FOLDERS = {"train": "model-train", "evaluate": "model-eval", "infer": "model-infer"}
STAGES = [*FOLDERS]
sys.path[:0] = [str(TREE / folder) for folder in (*FOLDERS.values(), "data")]  # the first net.py is the original
RAW = "MNIST/raw"
RAW_FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
MADE_BY = {
    "train": {"mnist_cnn.pt", "checkpoint.pt", "train_results.json", "training.png"},
    "evaluate": {"eval_results.json", "confusion_matrix.png", "mistakes.png"},
    "infer": {"predictions.json", "predictions.png"},  # and the pictures in results
}
LOCKS = {".train.lock", ".publish.lock", ".download.lock"}  # empty files, which stay in the volume and the data folder
QUICK = ("--epochs", "1", "--batch-size", "500")  # a training that takes little time
SECONDS = 120  # for one process; a machine may be busy


def command(stage, *flags, model, data=DATA, tree=TREE):
    """The command line of a stage, run from the tree on the folders given."""
    program = tree / FOLDERS.get(stage, "model-infer") / f"{stage}.py"  # serve is in infer's image
    return [sys.executable, str(program), "--data", str(data), "--model", str(model), *flags]


def run(stage, *flags, before=(), model, data=DATA, tree=TREE, **env):
    """Runs a stage to its end as a process, after a command's words if given, with variables added."""
    with running([*before, *command(stage, *flags, model=model, data=data, tree=tree)], **env) as process:
        return finish(process)


def read_fashion_images(count):
    """Reads the first of Fashion-MNIST's test images, uint8 [count, 28, 28], from Debian's package of it."""
    path = Path("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz")
    if not path.exists():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    content = gzip.decompress(path.read_bytes())[16:]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 28, 28)[:count]


def infer_for(folder, changes):
    """Makes a copy of infer's and serve's programs in a folder, with DATA_SET changed as an expression says.

    Returns it with a model of its network, untrained: a folder of both, `tree` and `volume`.
    """
    program = shutil.copytree(TREE / "model-infer", folder / "tree" / "model-infer")
    with (program / "stage/dataset.py").open("a") as file:
        file.write(f"\n\nfrom dataclasses import replace\n\nDATA_SET = replace(DATA_SET, {changes})\n")
    (folder / "volume").mkdir()
    make = "import net, sys, torch; torch.manual_seed(1); torch.save(net.Net().state_dict(), sys.argv[1])"
    words = [sys.executable, "-c", make, folder / "volume" / "mnist_cnn.pt"]
    subprocess.run(words, cwd=program, check=True)
    return folder


def copy_tree(folder, texts=None):
    """Makes a copy of the programs in a folder, after `make copies`; files of model-train may have other texts."""
    for name in FOLDERS.values():
        shutil.copytree(TREE / name, folder / name, ignore=shutil.ignore_patterns("*_cache*"))
    shutil.copy(TREE / "Makefile", folder)
    for name, text in (texts or {}).items():
        (folder / "model-train" / name).write_text(text)
    subprocess.run(["make", "--silent", "copies"], cwd=folder, check=True)
    return folder


def call(stage, *flags, model, data=DATA):
    """Runs a stage to its end in this process: one that does not train. What comes of it is as that of run()."""
    words, stdout, stderr = command(stage, *flags, model=model, data=data)[1:], io.StringIO(), io.StringIO()
    with mock.patch("sys.argv", words), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            program = importlib.import_module(stage)
            if stage == "train":
                importlib.import_module("training.first_look").end_unless_there_is_work()
            status = program.main()
        except SystemExit as end:
            status = end.code
    torch.set_num_threads(1)  # or a process could not be forked safely
    return subprocess.CompletedProcess(words, status, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def running(words, **env):
    """Starts a process, with variables added to its environment, as the leader of a process group.

    The block has it with its output to read from, and all of the group is gone afterwards.
    """
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"stdin": subprocess.DEVNULL, "text": True}
    env = os.environ | {name: str(value) for name, value in env.items()}
    with subprocess.Popen(words, env=env, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def proxied(address, prefix):
    """A proxy that passes what is asked under a prefix on to an HTTP service without it; the block has its address."""

    class Proxy(BaseHTTPRequestHandler):
        def pass_on(self):
            if not self.path.startswith(f"{prefix}/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with contextlib.closing(HTTPConnection(urlsplit(address).netloc, timeout=SECONDS)) as service:
                service.request(self.command, self.path.removeprefix(prefix), body, dict(self.headers))
                response = service.getresponse()
                self.send_response(response.status)
                for name in ("Content-Type", "Content-Length", "Content-Security-Policy"):
                    if name in response.headers:
                        self.send_header(name, response.headers[name])
                self.end_headers()
                self.wfile.write(response.read())

        do_GET = do_POST = pass_on

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{prefix}"
        finally:
            server.shutdown()


def free_port():
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def finish(process):
    stdout, stderr = process.communicate(timeout=SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@contextlib.contextmanager
def training(folder, *flags, **env):
    """A training that speaks often; the block has its process once it is in the middle of an epoch."""
    with running(command("train", "--log-interval", "10", *flags, model=folder), **env) as process:
        assert any("images/s" in line for line in process.stdout), process.stderr.read()
        yield process


def stop(process, *numbers):
    """Sends signals to all processes of a training, as a terminal does: it must end soon, in one line, by the first."""
    for number in numbers:
        os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + numbers[0], stderr
    assert len(stderr.splitlines()) == 1, stderr
    return stderr


def workers(process):
    """The process ids of a training's workers."""
    return children(process.pid)


def children(number):
    """The ids of the processes that a process has started, and that have not been waited for; none if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    return []


def wait_until(condition, what="what was waited for"):
    """Returns what condition() returns, once that is true."""
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {SECONDS} s"
        time.sleep(0.01)
    return value


def assert_succeeds(result):
    """A success that says nothing on standard error."""
    assert (result.returncode, result.stderr) == (0, "")


def assert_fails(result, status, *names):
    """A failure for a person: the exit status, and one line on standard error that names what it is about."""
    assert result.returncode == status, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for name in names:
        assert str(name) in result.stderr, result.stderr


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder, but=None):
    """The sha256 of every file in a folder, hidden ones too but LOCKS, by its path; `but` one, which is not read."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != but and path.name not in LOCKS]
    return {str(path.relative_to(folder)): sha256(path) for path in paths}


@contextlib.contextmanager
def unchanged(folder):
    """The files in a folder are the same after the block."""
    before = contents(folder)
    yield
    differ = {name for name, _ in before.items() ^ contents(folder).items()}
    assert not differ, f"{sorted(differ)} changed in {folder}"


def read_json(path):
    """What a JSON file says; NaN and Infinity, which Python's own writer may leave, are no JSON."""

    def refuse(constant):
        raise ValueError(f"{path} has {constant}, which is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def results(folder):
    return read_json(folder / "train_results.json")


def load_checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def batches_saved(folder):
    """The batches that checkpoint.pt has done, if there is one."""
    return json.loads(load_checkpoint(folder)["results"])["batches"] if (folder / "checkpoint.pt").exists() else 0


def images_trained_on(folder):
    return sum(worker["images"] for worker in results(folder)["workers"])


def assert_whole(folder):
    """Every file in a folder can be read to its end, and train_results.json does not contradict the others."""
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
    if (folder / "train_results.json").exists():
        record = results(folder)
        assert not record["finished"] or record["model_sha256"] == sha256(folder / "mnist_cnn.pt")
        if (folder / "checkpoint.pt").exists():
            saved = json.loads(load_checkpoint(folder)["results"])
            assert saved["run"] != record["run"] or saved["batches"] >= record["batches"]


def edited(text, edit):
    """A text of JSON after a function has changed what it says."""
    content = json.loads(text)
    edit(content)
    return json.dumps(content)


def edit_record(folder, **changes):
    """Changes what train_results.json says; `settings` are added to those that are there."""
    content = results(folder)
    changes["settings"] = content["settings"] | changes.get("settings", {})
    (folder / "train_results.json").write_text(json.dumps(content | changes))


def edit_checkpoint(folder, **edits):
    """Changes parts of checkpoint.pt by functions."""
    checkpoint = load_checkpoint(folder)
    torch.save(checkpoint | {name: edit(checkpoint[name]) for name, edit in edits.items()}, folder / "checkpoint.pt")


def edit_training(folder, edit):
    """Changes the record of a training by a function, in train_results.json and in checkpoint.pt."""
    edit_checkpoint(folder, results=lambda text: edited(text, edit))
    path = folder / "train_results.json"
    path.write_text(edited(path.read_text(), edit))
