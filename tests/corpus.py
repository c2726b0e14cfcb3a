"""Broken and forged files: what the pipeline may find in place of each file that it reads.

A case says which file it breaks and how, which stage reads it, and the exit status that is right. The faults are
functions of a path. check() tries a case: the fast tests all as processes, the tests in containers/ some of them there,
chaos.py all.
"""

import io
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

import example
import stages
from pipeline import MODEL, Pipeline

MARKER = "code-was-run"  # the file that forged pickles make in the volume, if they are obeyed
HUGE = 2_000_000_000  # bytes or numbers


@dataclass(frozen=True)
class Case:
    """A broken file; `stage` with `flags` reads it, and is to end with the status."""

    file: str
    fault: str
    breaks: Callable[[Path], None]
    stage: str
    flags: tuple
    status: int

    @property
    def name(self):
        return f"{self.file.rpartition('/')[2]}: {self.fault} ({self.stage})"


def each(edit, functions):
    """Faults by their names, from functions for the keyword argument `edit` of a function of a path."""
    return {name: partial(edit, edit=function) for name, function in functions.items()}


# Files of any kind ----------------------------------------------------------------------------------------------------


def edit_bytes(path, edit):
    path.write_bytes(edit(path.read_bytes()))


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :]


def replace(path, make):
    path.unlink()
    make(path)


FAULTS = {
    "missing": Path.unlink,
    "empty": partial(Path.write_bytes, data=b""),
    "text": partial(Path.write_bytes, data=b"I am no such file.\n"),
    "nothing but zeros": partial(Path.write_bytes, data=bytes(5000)),
    "cut in half": partial(edit_bytes, edit=lambda content: content[: len(content) // 2]),
    "without its last byte": partial(edit_bytes, edit=lambda content: content[:-1]),
    "100 GB": partial(os.truncate, length=100 * 2**30),  # which take no space
    "a folder": partial(replace, make=os.mkdir),
    "a FIFO": partial(replace, make=os.mkfifo),
    "a symlink to itself": partial(replace, make=lambda path: path.symlink_to(path.name)),
    "forbidden to read": partial(os.chmod, mode=0),  # root may, but not without a capability, as in the containers
}

DATA_FAULTS = FAULTS | {
    "a flipped bit": partial(edit_bytes, edit=lambda content: flip(content, len(content) * 7 // 10)),
    "a byte too many": partial(edit_bytes, edit=lambda content: content + b"\0"),
    "a symlink to nothing": partial(replace, make=lambda path: path.symlink_to("nowhere")),
}

# Checkpoints ----------------------------------------------------------------------------------------------------------


class RunsCode:
    """Pickled, it is the order to make a file in the volume, as the process or the container has it."""

    def __init__(self, path):
        self.command = f"touch {path.parent / MARKER} {MODEL}/{MARKER}"

    def __reduce__(self):
        return os.system, (self.command,)


def edit_checkpoint(path, edit):
    torch.save(edit(torch.load(path, weights_only=True)), path)


def rezip(path, compression=zipfile.ZIP_STORED, without=None, pickled=None):
    """Writes a checkpoint's zip anew: compressed, without one of its entries, with another pickle in it."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w", compression) as new:
        for name in old.namelist():
            if name.endswith("/data.pkl") and pickled:
                new.writestr(name, pickled)
            elif not without or not name.endswith(without):
                new.writestr(name, old.read(name))
    path.write_bytes(content.getvalue())


def bomb(path, edit):
    """A checkpoint with a part that is compressed to a thousandth of its size."""
    edit_checkpoint(path, edit)
    rezip(path, zipfile.ZIP_DEFLATED)


CHECKPOINT_FAULTS = {
    "a pickle that runs code": lambda path: path.write_bytes(pickle.dumps(RunsCode(path))),
    "a torch file that runs code": lambda path: torch.save(RunsCode(path), path),
    "an old file that runs code": lambda path: torch.save(RunsCode(path), path, _use_new_zipfile_serialization=False),
    "a zip with a pickle that runs code": lambda path: rezip(path, pickled=pickle.dumps({"model": RunsCode(path)}, 2)),
    "a zip with another thing in it": partial(rezip, pickled=pickle.dumps("hello", 2)),
    "a zip without its tensors": partial(rezip, without="/data/0"),
    "a compressed zip": partial(rezip, compression=zipfile.ZIP_DEFLATED),
    "a flipped bit where its zip ends": partial(edit_bytes, edit=lambda zipped: flip(zipped, zipped.rfind(b"PK\5\6"))),
    "a list": partial(torch.save, [1, 2]),
    "a tensor": partial(torch.save, torch.zeros(3)),
    "nothing": partial(torch.save, None),
    "an empty dict": partial(torch.save, {}),
}


def with_bias(value):
    """The function that puts another value in the place of a tensor of 10 numbers."""
    return lambda model: model | {"fc2.bias": value}


def with_attribute(name):
    def edit(model):
        forged = OrderedDict(model)
        setattr(forged, name, 5)
        return forged

    return edit


NOT_NUMBERS = with_bias(torch.full((10,), torch.nan))
MODEL_EDITS = {
    "another key": lambda model: model | {"fc3.bias": torch.zeros(10)},
    "a key too few": lambda model: {key: model[key] for key in model if key != "fc2.bias"},
    "keys that are numbers": lambda model: dict(enumerate(model.values())),
    "keys under a prefix": lambda model: {f"module.{key}": model[key] for key in model},
    "a whole module": lambda _: example.untrained(),
    "another shape": with_bias(torch.zeros(11)),
    "a shape that broadcasts": with_bias(torch.zeros(1)),
    "a tensor of 4 TB without contents": with_bias(torch.zeros(1).expand(2**40)),
    "float64": with_bias(torch.zeros(10, dtype=torch.float64)),
    "integers": with_bias(torch.zeros(10, dtype=torch.int32)),
    "a sparse tensor": with_bias(torch.zeros(10).to_sparse()),
    "a tensor without memory": with_bias(torch.zeros(10, device="meta")),
    "a number for a tensor": with_bias(5),
    "not a number": NOT_NUMBERS,
    "infinity": with_bias(torch.full((10,), torch.inf)),
    "a tensor with a false method": lambda model: setattr(model["fc2.bias"], "isfinite", 5) or model,
}
MODEL_FAULTS = each(edit_checkpoint, MODEL_EDITS)
MODEL_FAULTS["a zip bomb"] = partial(bomb, edit=with_bias(torch.zeros(2 * 10**7)))
FALSE = {"false keys()": with_attribute("keys"), "false metadata": with_attribute("_metadata")}
HARMLESS_MODELS = each(edit_checkpoint, FALSE)

# Pickles that take much memory or time, or that crash the unpickler ---------------------------------------------------


def push(*values):
    """The opcodes that put plain values on the unpickler's stack; bytes are opcodes already."""
    return b"".join(value if isinstance(value, bytes) else pickle.dumps(value, 2)[2:-1] for value in values)


def call(name, *values):
    """The opcodes that call what has a name, with the values."""
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n(".encode() + push(*values) + b"tR"


def new(name, *values):
    """The opcodes that make a new object of a class, without a call."""
    return call(name, *values)[:-1] + b"\x81"


def tensor(numbers):
    """The opcodes for a tensor on a storage that is said to have so many numbers."""
    storage = b"(" + push("storage", b"ctorch\nFloatStorage\n", "0", "cpu", numbers) + b"tQ"
    return call("torch._utils._rebuild_tensor_v2", storage, 0, (numbers,), (1,), False, call("collections.OrderedDict"))


SHARED = b")" + b"".join(b"q%ch%c\x86" % (place, place) for place in range(60))  # t = (t, t), 60 times
SPARSE_LAYOUT = call("torch.serialization._get_layout", "torch.sparse_coo")
SPARSE_PARTS = b"(" + push(tensor(1), tensor(1), (HUGE, HUGE)) + b"t"
FROM_TYPE = ("torch._tensor._rebuild_from_type_v2", b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n", (HUGE,), None)
PICKLES = {
    "many bytes": call("builtins.bytearray", HUGE),
    "many bytes by another way": call(*FROM_TYPE),
    "a key that is hashed for ever": b"}" + SHARED + b"K\x01s",
    "a set that is hashed for ever": b"cbuiltins\nset\n]" + SHARED + b"a\x85R",
    "a key that is 900,000 tuples deep": b"})" + b"\x85" * 900_000 + b"K\x01s",
    "100,000 lists in each other": b"]" * 100_000 + b"a" * 99_999,
    "a mark that never ends": b"(" * 500_000,
    "a long text that is not there": b"X\xff\xff\xff\x7fabc",
    "a storage larger than the file": tensor(HUGE),
    "a large tensor": new("torch.Tensor", HUGE),
    "an endless tensor": new("torch.FloatTensor", 10**15),
    "a parameter of no tensor": call("torch.nn.parameter.Parameter", HUGE),
    "a large sparse tensor": call("torch._utils._rebuild_sparse_tensor", SPARSE_LAYOUT, SPARSE_PARTS),
    "a counter": call("collections.Counter", "a" * 1000),
    "a function that is not allowed": call("torch.zeros", HUGE),
}
FORGED = {name: partial(rezip, pickled=b"\x80\x02" + codes + b".") for name, codes in PICKLES.items()}

# The record of a training ---------------------------------------------------------------------------------------------


def assign(value, *keys):
    """The function that puts another value at a place of a record."""

    def edit(record):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return edit


def edit_json(path, edit):
    path.write_text(stages.edited(path.read_text(), edit))


def edit_saved_record(path, edit):
    edit_checkpoint(path, lambda saved: saved | {"results": stages.edited(saved["results"], edit)})


SAVED_EDITS = {
    "a model that is none": lambda saved: saved | {"model": 5},
    "no model": lambda saved: {"velocities": saved["velocities"], "results": saved["results"]},
    "a model that is not numbers": lambda saved: saved | {"model": NOT_NUMBERS(saved["model"])},
    "no velocities": lambda saved: saved | {"velocities": None},
    "velocities left out": lambda saved: {"model": saved["model"], "results": saved["results"]},
    "velocities of 64 workers": lambda saved: saved | {"velocities": torch.zeros(64, 21_840)},
    "velocities that are not numbers": lambda saved: saved | {"velocities": torch.full((2, 21_840), torch.nan)},
    "no sum": lambda saved: saved | {"sum": None},
    "a sum of another network": lambda saved: saved | {"sum": torch.zeros(21_840)},
    "a sum that is not numbers": lambda saved: saved | {"sum": torch.full((21_841,), torch.nan)},
    "results that are no text": lambda saved: saved | {"results": 5},
    "results that are no JSON": lambda saved: saved | {"results": "{"},
}
SAVED_RECORD_EDITS = {
    "another training": assign("another", "run"),
    "another learning rate": assign(0.2, "settings", "lr"),
    "more batches than its history": assign(10**9, "batches"),
    "an epoch that is not in its history": lambda record: record.update(history=[], batches=600),
    "a worker too few": lambda record: (record["workers"].pop(), record["settings"].update(num_processes=1)),
    "a start after its progress": lambda record: (record.update(start=10**12), record["settings"].update(epochs=9999)),
}
TRAINING_FAULTS = each(edit_checkpoint, SAVED_EDITS) | each(edit_saved_record, SAVED_RECORD_EDITS)
TRAINING_FAULTS["a zip bomb"] = partial(bomb, edit=lambda saved: saved | {"velocities": torch.zeros(2 * 10**7)})

JSON_FAULTS = {
    "no JSON": b"{'finished': True}",
    "null": b"null",
    "a list": b"[]",
    "an empty object": b"{}",
    "settings that are a number": b'{"settings": 5}',
    "100,000 lists in each other": b"[" * 100_000 + b"]" * 100_000,
    "a number of 100,000 digits": b"1" * 100_000,
    "no UTF-8": b'{"finished": "\xff\xfe"}',
    "10 MB of empty lists": b"[" + b"[]," * 3_300_000 + b"[]]",
}

RECORD_FAULTS = {
    "a learning rate that is not a number": assign(float("nan"), "settings", "lr"),
    "a worker too few": assign(3, "settings", "num_processes"),
    "half an epoch": assign(0.5, "settings", "epochs"),
    "no settings": lambda record: record.pop("settings"),
    "settings that are a list": assign([], "settings"),
    "a setting with a line break": assign(1, "settings", "a\nb"),
    "negative batches": assign(-1, "batches"),
    "2^80 batches": assign(2**80, "batches"),
    "endless seconds": assign(float("inf"), "seconds"),
    "a history that is a text": assign("", "history"),
    "a history that is an object": assign({}, "history"),
    "a history of nothing": assign([None], "history"),
    "a history of 20,000 epochs": lambda record: record.update(history=record["history"] * 20_000),
    "no workers": assign([], "workers"),
    "a worker that is a number": assign([1, 2], "workers"),
    "finished by a text": assign("yes", "finished"),
    "a run that is a number": assign(5, "run"),
    "a host of two lines": assign("two\nlines", "host"),
    "lost workers that are a number": assign(5, "lost_workers"),
    "a model's sha256 that is a number": assign(5, "model_sha256"),
    "an empty sha256 of the model": assign("", "model_sha256"),
    "no sha256 of the model": lambda record: record.pop("model_sha256"),
}
HARMLESS_RECORDS = {
    "another model's sha256": assign("0" * 64, "model_sha256"),
    "one more key": assign([1, 2], "surprise"),
}

# The corpus -----------------------------------------------------------------------------------------------------------

TRAIN_ON = ("--epochs", "9999")  # has train go on where it would say that it is finished: it reads data and checkpoint
TRAINING_IMAGES, TRAINING_LABELS, TEST_IMAGES, TEST_LABELS = (f"{stages.RAW}/{name}" for name in stages.RAW_FILES)
# A failure is to name one of these commands.
FIXES = ("--fresh", "make data", "rm ", "chmod ", "run --rm train", "train.py --data")


def cases():
    """All broken files. The volume is to hold what the three stages have left."""
    some = ("missing", "empty", "cut in half", "a FIFO")
    code, general = "a torch file that runs code", FAULTS | CHECKPOINT_FAULTS
    texts = {name: partial(Path.write_bytes, data=content) for name, content in JSON_FAULTS.items()}
    return [
        *cases_of(TRAINING_IMAGES, DATA_FAULTS, "train", flags=TRAIN_ON),
        *cases_of(TRAINING_LABELS, DATA_FAULTS, "train", "a flipped bit", *some, flags=TRAIN_ON),
        *cases_of(TEST_IMAGES, DATA_FAULTS, "evaluate", "a flipped bit", "a byte too many", "100 GB", *some),
        *cases_of(TEST_LABELS, DATA_FAULTS, "infer", "a flipped bit", "a byte too many", *some),
        *cases_of("mnist_cnn.pt", general | MODEL_FAULTS | FORGED, "evaluate"),
        *cases_of("mnist_cnn.pt", HARMLESS_MODELS, "evaluate", status=0),
        *cases_of("mnist_cnn.pt", FAULTS, "train", "100 GB", "a folder", "a FIFO"),
        *cases_of("mnist_cnn.pt", general, "train", "empty", "cut in half", code, status=0),
        *cases_of("mnist_cnn.pt", general, "infer", *some, code),
        *cases_of("checkpoint.pt", general | TRAINING_FAULTS, "train", flags=TRAIN_ON),
        *cases_of("train_results.json", FAULTS | texts | each(edit_json, RECORD_FAULTS), "train"),
        *cases_of("train_results.json", each(edit_json, HARMLESS_RECORDS), "train", status=0),
        *cases_of("train_results.json", FAULTS, "evaluate", "a FIFO", status=0),
        *cases_of("eval_results.json", FAULTS, "infer", "a folder", *some, status=0),
        *cases_of("eval_results.json", FAULTS, "evaluate", "100 GB", "a FIFO", status=0),
        *cases_of("eval_results.json", FAULTS, "evaluate", "a folder"),
    ]


def cases_of(file, faults, stage, *names, flags=(), status=1):
    """A case of a file for each of the faults, or for those that have the names."""
    return [Case(file, name, faults[name], stage, flags, status) for name in names or faults]


def check(case, good, folder, run):
    """Breaks a file in a copy of a good volume, or of the data, and has a function run the stage: as stages.call()."""
    volume, data = shutil.copytree(good, folder / "volume"), stages.DATA
    if case.file.startswith(stages.RAW):
        data = shutil.copytree(data / "MNIST", folder / "data" / "MNIST").parent
    broken = (volume if data == stages.DATA else data) / case.file
    case.breaks(broken)
    before = stages.contents(volume, but=broken)
    result = run(case.stage, *case.flags, model=volume, data=data)
    after = stages.contents(volume, but=broken)
    assert MARKER not in after
    if case.status:
        stages.assert_fails(result, case.status, broken.name)
        assert any(fix in result.stderr for fix in FIXES), result.stderr
        assert after == before
    else:
        assert result.returncode == 0, result.stderr


def run_in_container(stage, *flags, model, data):
    """Runs a stage in a container without a network, with twice the memory that it takes, for half a minute at most."""
    options = {"environment": {"MNIST_MEMORY": "600m"}, "train": {"network_mode": "none"}}
    with Pipeline(model, data, **options) as project:
        result = project.run(stage, *flags, seconds=30)
        assert ".venv" not in result.stderr  # that is how a stage is run without containers
        return result
