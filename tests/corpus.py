"""Broken and forged files: what the pipeline may find in place of each file that it reads.

A case says which file it breaks and how, which stage reads it, and the exit statuses that are right. The faults are
functions of a path, so that they can be done to any folder.
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pipeline import Pipeline
from stages import DATA, sha256

MARKER = "code-was-run"  # the file that forged pickles make in the volume, if they are obeyed
HUGE = 100 * 2**30


@dataclass(frozen=True)
class Case:
    """A broken file; `stage` with `flags` reads it, and is to end with one of the statuses."""

    file: str
    fault: str
    breaks: Callable[[Path], None]
    stage: str
    flags: tuple
    statuses: tuple

    @property
    def name(self):
        return f"{self.file.rpartition('/')[2]}: {self.fault}"

    @property
    def is_data(self):
        return self.file.startswith("MNIST/")


# Files of any kind ---------------------------------------------------------------------------------------------------


def cut(path, at):
    """Leaves the first part of a file, or with a negative number all but the end."""
    size = path.stat().st_size
    os.truncate(path, int(at * size) if isinstance(at, float) else at % (size + 1))


def write(path, content):
    path.unlink()
    path.write_bytes(content)


def append(path, content):
    path.write_bytes(path.read_bytes() + content)


def flip(path, part):
    """Turns one bit over, at a part of the file."""
    content = bytearray(path.read_bytes())
    content[int(part * len(content))] ^= 8
    path.write_bytes(content)


def make_huge(path):
    """A file of 100 GB that takes no space."""
    os.truncate(path, HUGE)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_fifo(path):
    path.unlink()
    os.mkfifo(path)


def make_loop(path):
    """A symlink to itself."""
    path.unlink()
    path.symlink_to(path.name)


def make_link_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


def forbid(path):
    """Nobody may read it; root may only with a capability that the containers do not have."""
    path.chmod(0)


FAULTS = {
    "missing": Path.unlink,
    "empty": partial(write, content=b""),
    "one byte": partial(write, content=b"\x80"),
    "cut in half": partial(cut, at=0.5),
    "without its last byte": partial(cut, at=-2),
    "nothing but zeros": partial(write, content=bytes(5000)),
    "text": partial(write, content=b"I am no such file.\n"),
    "100 GB": make_huge,
    "a folder": make_folder,
    "a FIFO": make_fifo,
    "a symlink to itself": make_loop,
    "forbidden to read": forbid,
}

# Checkpoints ---------------------------------------------------------------------------------------------------------


class RunsCode:
    """Pickled, it is the order to run a command."""

    def __reduce__(self):
        return os.system, (f"touch /opt/mount/model/{MARKER}",)


def save(path, value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    path.write_bytes(buffer.getvalue())


def change(path, edit, **options):
    """Loads a checkpoint, and saves what edit() makes of it: a new value, or None if it has changed the old one."""
    value = torch.load(path, weights_only=True)
    changed = edit(value)
    save(path, value if changed is None else changed, **options)


def rezip(path, compression=zipfile.ZIP_DEFLATED, without=None, pickled=None):
    """Writes a checkpoint's zip anew: compressed, without one of its parts, with another pickle in it."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w", compression) as new:
        for name in old.namelist():
            if name.endswith("/data.pkl") and pickled:
                new.writestr(name, pickled)
            elif not without or not name.endswith(without):
                new.writestr(name, old.read(name))
    path.write_bytes(content.getvalue())


def flip_the_end_of_the_zip(path):
    """Turns over one bit of the mark by which a reader finds a zip's directory."""
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\5\6")] ^= 8
    path.write_bytes(content)


def bomb(path, key=None, numbers=10**8):
    """A tensor of zeros, compressed to a thousandth of its size, in place of another (of one in the part `key`)."""
    put(path, "fc2.bias", torch.zeros(numbers), key)
    rezip(path)


def put(path, name, value, key=None):
    """Puts another value in a checkpoint's place for a tensor; if a key is given, in that part of it."""
    change(path, lambda checkpoint: (checkpoint[key] if key else checkpoint).update({name: value}))


def with_attribute(path, name, value):
    """A checkpoint whose dict has an attribute of its own."""

    def edit(checkpoint):
        forged = OrderedDict(checkpoint)
        setattr(forged, name, value)
        return forged

    change(path, edit)


def with_tensor_attribute(path):
    """A checkpoint with a tensor whose method isfinite is a number."""

    def edit(checkpoint):
        checkpoint["fc2.bias"].isfinite = 5

    change(path, edit)


def convert(path, to):
    """All tensors turned into others."""
    change(path, lambda checkpoint: {name: to(tensor) for name, tensor in checkpoint.items()})


CHECKPOINT_FAULTS = {
    "a pickle that runs code": lambda path: path.write_bytes(pickle.dumps(RunsCode())),
    "a torch file that runs code": lambda path: save(path, RunsCode()),
    "a zip with a pickle that runs code": partial(rezip, pickled=pickle.dumps({"model": RunsCode()})),
    "an old torch file that runs code": lambda path: save(path, RunsCode(), _use_new_zipfile_serialization=False),
    "a pickle that never ends": lambda path: path.write_bytes(b"\x80\x02" + b"(" * 500_000),
    "a pickle of empty lists in lists": lambda path: path.write_bytes(
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    ),
    "a pickle that claims a long text": lambda path: path.write_bytes(b"\x80\x02X\xff\xff\xff\x7fabc."),
    "a zip with another thing in it": partial(rezip, pickled=pickle.dumps("hello")),
    "a zip without its tensors": partial(rezip, without="/data/0"),
    "a flipped bit in the end of its zip": flip_the_end_of_the_zip,
    "a list": lambda path: save(path, [1, 2]),
    "a tensor": lambda path: save(path, torch.zeros(3)),
    "nothing": lambda path: save(path, None),
    "an empty dict": lambda path: save(path, {}),
}

MODEL_FAULTS = {
    "a zip bomb": bomb,
    "another key": lambda path: put(path, "fc3.bias", torch.zeros(10)),
    "a key too few": lambda path: change(path, lambda model: model.popitem()[:0]),
    "keys that are numbers": lambda path: change(path, lambda model: dict(enumerate(model.values()))),
    "another shape": lambda path: put(path, "fc2.bias", torch.zeros(11)),
    "a tensor of 4 TB without contents": lambda path: put(path, "fc2.bias", torch.zeros(1).expand(2**40)),
    "float64": partial(convert, to=torch.Tensor.double),
    "integers": partial(convert, to=torch.Tensor.int),
    "sparse tensors": partial(convert, to=torch.Tensor.to_sparse),
    "tensors without memory": partial(convert, to=lambda tensor: tensor.to("meta")),
    "a number for a tensor": lambda path: put(path, "fc2.bias", 5),
    "not a number": lambda path: put(path, "fc2.bias", torch.full((10,), float("nan"))),
    "infinity": lambda path: put(path, "fc2.bias", torch.full((10,), float("inf"))),
    "an untrained network": partial(convert, to=torch.zeros_like),
}

HARMLESS_MODELS = {  # evaluate may take these as they are, or say what is wrong
    "a dict with false keys()": partial(with_attribute, name="keys", value=5),
    "false metadata": partial(with_attribute, name="_metadata", value=5),
    "a tensor with a false method": with_tensor_attribute,
}


def in_results(path, edit):
    """Changes the results that a training's checkpoint has as text."""

    def change_text(checkpoint):
        results = json.loads(checkpoint["results"])
        edit(results)
        checkpoint["results"] = json.dumps(results)

    change(path, change_text)


TRAINING_FAULTS = {
    "a zip bomb": partial(bomb, key="model"),
    "a model that is none": lambda path: put(path, "model", 5),
    "no model": lambda path: change(path, lambda checkpoint: checkpoint.pop("model") and None),
    "no velocities": lambda path: change(path, lambda checkpoint: {**checkpoint, "velocities": None}),
    "velocities left out": lambda path: change(
        path, lambda checkpoint: {key: checkpoint[key] for key in ("model", "results")}
    ),
    "velocities of 64 workers": lambda path: put(path, "velocities", torch.zeros(64, 21840)),
    "velocities that are not numbers": lambda path: put(path, "velocities", torch.full((2, 21840), float("nan"))),
    "a model that is not numbers": lambda path: put(path, "fc2.bias", torch.full((10,), float("nan")), "model"),
    "results that are no text": lambda path: put(path, "results", 5),
    "results that are no JSON": lambda path: put(path, "results", "{"),
    "more batches than its history": lambda path: in_results(path, lambda results: results.update(batches=10**9)),
    "a worker too few": lambda path: in_results(
        path, lambda results: (results["workers"].pop(), results["settings"].update(num_processes=1))
    ),
    "a start after its progress": lambda path: in_results(
        path, lambda results: (results.update(start=10**12), results["settings"].update(epochs=9999))
    ),
}

# JSON ----------------------------------------------------------------------------------------------------------------


def edit_json(path, edit):
    """Changes what a JSON file says by a function."""
    results = json.loads(path.read_text())
    edit(results)
    path.write_text(json.dumps(results))


def set_to(value, *keys):
    """The fault of another value at a place of a JSON file."""

    def edit(results):
        for key in keys[:-1]:
            results = results[key]
        results[keys[-1]] = value

    return partial(edit_json, edit=edit)


def without(key):
    """The fault of a key that is not there."""
    return partial(edit_json, edit=lambda results: results.pop(key))


JSON_FAULTS = {
    "no JSON": partial(write, content=b"{'finished': True}"),
    "null": partial(write, content=b"null"),
    "a list": partial(write, content=b"[]"),
    "100,000 lists in each other": partial(write, content=b"[" * 100_000 + b"]" * 100_000),
    "a number of 100,000 digits": partial(write, content=b"1" * 100_000),
    "no UTF-8": partial(write, content=b'{"finished": "\xff\xfe"}'),
    "10 MB of empty lists": partial(write, content=b"[" + b"[]," * 3_300_000 + b"[]]"),
}

RESULTS_FAULTS = {
    "a learning rate that is not a number": set_to(float("nan"), "settings", "lr"),
    "a negative learning rate": set_to(-0.1, "settings", "lr"),
    "a huge learning rate": set_to(1e300, "settings", "lr"),
    "a learning rate that is a text": set_to("0.1", "settings", "lr"),
    "true for a batch size": set_to(True, "settings", "batch_size"),
    "10^12 workers": set_to(10**12, "settings", "num_processes"),
    "half an epoch": set_to(0.5, "settings", "epochs"),
    "no settings": without("settings"),
    "settings that are a list": set_to([], "settings"),
    "negative batches": set_to(-1, "batches"),
    "2^80 batches": set_to(2**80, "batches"),
    "endless seconds": set_to(float("inf"), "seconds"),
    "a history that is a text": set_to("", "history"),
    "a history that is an object": set_to({}, "history"),
    "a history of nothing": set_to([None], "history"),
    "a history of 20,000 epochs": partial(
        edit_json, edit=lambda results: results["history"].extend(results["history"] * 20_000)
    ),
    "no workers": set_to([], "workers"),
    "a worker that is a number": set_to([1, 2], "workers"),
    "finished by a text": set_to("yes", "finished"),
    "a run that is a number": set_to(5, "run"),
    "lost workers that are a number": set_to(5, "lost_workers"),
}

HARMLESS_RESULTS = {  # train may take these as they are, or say what is wrong
    "another model's sha256": set_to("0" * 64, "model_sha256"),
    "a model's sha256 that is a number": set_to(5, "model_sha256"),
    "no sha256 of the model": without("model_sha256"),
    "a key with a line break": set_to(1, "settings", "a\nb"),
    "one more key": set_to([1, 2], "surprise"),
}


# The corpus ----------------------------------------------------------------------------------------------------------


TRAIN_ON = ("--epochs", "9999")  # has train go on where it would say that it is finished: it reads data and checkpoint
SOME = ("missing", "empty", "cut in half", "a FIFO")
TWICE_THE_MEMORY = "600m"  # each stage takes 285 to 340 MB as it is
SECONDS = 30
FIXES = ("--fresh", "make data", "rm ", "train --epochs")  # a failure is to name one of these commands


def cases():
    """All broken files. The volume is to hold what the three stages have left."""
    data = FAULTS | {
        "a flipped bit": partial(flip, part=0.7),
        "a byte too many": partial(append, content=b"\0"),
        "a symlink to nothing": make_link_nowhere,
    }
    code = some(CHECKPOINT_FAULTS, "a torch file that runs code")
    return [
        *cases_of("MNIST/raw/train-images-idx3-ubyte", data, "train", TRAIN_ON),
        *cases_of("MNIST/raw/train-labels-idx1-ubyte", some(data, "a flipped bit", *SOME), "train", TRAIN_ON),
        *cases_of("MNIST/raw/t10k-images-idx3-ubyte", some(data, "a flipped bit", "100 GB", *SOME), "evaluate"),
        *cases_of("MNIST/raw/t10k-labels-idx1-ubyte", some(data, "a flipped bit", *SOME), "infer"),
        *cases_of("mnist_cnn.pt", FAULTS | CHECKPOINT_FAULTS | MODEL_FAULTS, "evaluate"),
        *cases_of("mnist_cnn.pt", HARMLESS_MODELS, "evaluate", statuses=(0, 1)),
        *cases_of("mnist_cnn.pt", some(FAULTS, "100 GB", "a folder", *SOME) | code, "train", statuses=(0, 1)),
        *cases_of("mnist_cnn.pt", some(FAULTS, *SOME) | code, "infer"),
        *cases_of("checkpoint.pt", FAULTS | CHECKPOINT_FAULTS | TRAINING_FAULTS, "train", TRAIN_ON),
        *cases_of("train_results.json", FAULTS | JSON_FAULTS | RESULTS_FAULTS, "train"),
        *cases_of("train_results.json", HARMLESS_RESULTS, "train", statuses=(0, 1)),
        *cases_of("train_results.json", some(FAULTS, *SOME), "evaluate", statuses=(0,)),
        *cases_of("eval_results.json", some(FAULTS, "a folder", *SOME), "infer", statuses=(0,)),
        *cases_of("eval_results.json", some(FAULTS, "100 GB", *SOME), "evaluate", statuses=(0,)),
        *cases_of("eval_results.json", some(FAULTS, "a folder"), "evaluate"),
    ]


def cases_of(file, faults, stage, flags=(), statuses=(1,)):
    """A case of a file for each of the faults."""
    return [Case(file, f"{fault} ({stage})", breaks, stage, flags, statuses) for fault, breaks in faults.items()]


def some(faults, *names):
    """Those of the faults that have the names."""
    return {name: faults[name] for name in names}


def run_case(case, good, folder):
    """Breaks a file in a copy of a good volume (or of the data), and runs the stage: what is wrong then."""
    volume, data = shutil.copytree(good, folder / "volume"), DATA
    if case.is_data:
        data = shutil.copytree(data, folder / "data")
    case.breaks((data if case.is_data else volume) / case.file)
    before = contents_but(volume, case.file)
    with Pipeline(
        volume, data, environment={"MNIST_MEMORY": TWICE_THE_MEMORY}, train={"network_mode": "none"}
    ) as project:
        ended = project.run(case.stage, *case.flags, seconds=60)
    after = contents_but(volume, case.file)
    wrong = []
    if ended.status not in case.statuses:
        wrong.append(f"exit status {ended.status}")
    if ended.status and not ended.is_one_line:
        wrong.append(f"more or less than one line: {ended.stderr!r}")
    if ended.status and not (Path(case.file).name in ended.stderr and any(fix in ended.stderr for fix in FIXES)):
        wrong.append(f"no word of the file, or of what fixes it: {ended.stderr!r}")
    if ended.status and after != before:
        wrong.append(f"other files changed: {sorted(set(before.items()) ^ set(after.items()))}")
    if MARKER in after:
        wrong.append("code was run")
    if ended.seconds > SECONDS:
        wrong.append(f"it took {ended.seconds:.0f} s")
    return wrong


def contents_but(volume, file):
    """The sha256 of every file in a volume by its path, but for one; a symlink, folder or FIFO has none."""
    others = [path for path in volume.rglob("*") if path.is_file() and path != volume / file]
    return {str(path.relative_to(volume)): sha256(path) for path in others}
