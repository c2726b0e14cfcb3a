"""Checkpoints that are damaged, forged or of another network: refused in one line, and nothing in them is run."""

import io
import os
import pickle
import resource
import signal
import zipfile
from pathlib import Path

import checkpoint
import example
import net
import pytest
import stages
import torch
from process import Failure

MEMORY = 500_000_000  # the most bytes that reading a file may take
SECONDS = 10  # far more than any of them needs
REFUSED = 7  # the exit status of a process in which a file was refused as it should be
HUGE = 2_000_000_000  # bytes or numbers


class RunsCode:
    """A pickle of this makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def altered(**tensors):
    """A state dict of an untrained network, with other tensors in the place of some; `_` in a name stands for a dot."""
    return example.untrained().state_dict() | {name.replace("_", "."): tensor for name, tensor in tensors.items()}


def saved(content, **options):
    """What torch.save makes of it."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(pickled, compression=zipfile.ZIP_STORED):
    """The bytes of a good checkpoint with another pickle in it (None: its own)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(altered()))) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, pickled if pickled and name.endswith("/data.pkl") else old.read(name))
    return buffer.getvalue()


# Of another network, or damaged ---------------------------------------------------------------------------------------

WRONG = {
    "an empty file": b"",
    "text": b"no checkpoint",
    "a truncated checkpoint": saved(altered())[:40_000],
    "a checkpoint that lost its end": saved(altered())[:-1],
    "a list": saved([1, 2]),
    "a tensor": saved(torch.zeros(3)),
    "no keys at all": saved({}),
    "a key too many": saved(altered(conv3_weight=torch.zeros(1))),
    "keys under a prefix": saved({f"module.{key}": tensor for key, tensor in altered().items()}),
    "another shape": saved(altered(fc2_bias=torch.zeros(11))),
    "a shape that broadcasts": saved(altered(fc2_bias=torch.zeros(1))),
    "a tensor of 4 TB without contents": saved(altered(fc2_bias=torch.zeros(1).expand(2**40))),
    "another type": saved(altered(fc2_bias=torch.zeros(10, dtype=torch.float64))),
    "a number for a tensor": saved(altered(fc2_bias=0.0)),
    "a sparse tensor": saved(altered(fc2_bias=torch.zeros(10).to_sparse())),
    "a tensor without memory": saved(altered(fc2_bias=torch.zeros(10, device="meta"))),
    "not a number": saved(altered(fc2_bias=torch.full((10,), torch.nan))),
    "infinity": saved(altered(conv1_weight=torch.full((10, 1, 5, 5), torch.inf))),
    "a whole module": saved(example.untrained()),
    "a compressed checkpoint": zipped(None, zipfile.ZIP_DEFLATED),
    "a file that is far too large": saved(altered()) + bytes(2_000_000),
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_checkpoint_of_this_network_is_refused(tmp_path, content):
    (tmp_path / "mnist_cnn.pt").write_bytes(content)
    with pytest.raises(Failure, match=r"mnist_cnn\.pt .*--fresh"):
        net.load_model(tmp_path)


@pytest.mark.parametrize("make", [lambda path: None, os.mkdir, os.mkfifo], ids=["missing", "a folder", "a pipe"])
def test_a_model_that_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "mnist_cnn.pt")
    with pytest.raises(Failure, match=r"mnist_cnn\.pt"):
        net.load_model(tmp_path)


def test_a_checkpoint_of_the_examples_network_loads(tmp_path):
    torch.save(example.untrained(seed=5).state_dict(), tmp_path / "mnist_cnn.pt")
    model, _ = net.load_model(tmp_path)
    for key, tensor in example.untrained(seed=5).state_dict().items():
        assert model.state_dict()[key].equal(tensor)


# Forged ---------------------------------------------------------------------------------------------------------------


def put(*values):
    """The opcodes that put plain values on the unpickler's stack; bytes are opcodes already."""
    return b"".join(value if isinstance(value, bytes) else pickle.dumps(value, 2)[2:-1] for value in values)


def call(name, *values):
    """The opcodes that call what has a name, with the values."""
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n(".encode() + put(*values) + b"tR"


def new(name, *values):
    """The opcodes that make a new object of a class, without a call."""
    return call(name, *values)[:-1] + b"\x81"


def tensor(numbers):
    """The opcodes for a tensor on a storage that is said to have so many numbers."""
    storage = b"(" + put("storage", b"ctorch\nFloatStorage\n", "0", "cpu", numbers) + b"tQ"
    return call("torch._utils._rebuild_tensor_v2", storage, 0, (numbers,), (1,), False, call("collections.OrderedDict"))


SHARED = b")" + b"".join(b"q%ch%c\x86" % (place, place) for place in range(60))  # t = (t, t), 60 times
SPARSE_LAYOUT = call("torch.serialization._get_layout", "torch.sparse_coo")
SPARSE_PARTS = b"(" + put(tensor(1), tensor(1), (HUGE, HUGE)) + b"t"
FROM_TYPE = ("torch._tensor._rebuild_from_type_v2", b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n", (HUGE,), None)
FORGED = {
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


@pytest.mark.parametrize("pickled", FORGED.values(), ids=FORGED.keys())
def test_a_forged_checkpoint_is_refused_soon_and_without_much_memory(tmp_path, pickled):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(zipped(b"\x80\x02" + pickled + b"."))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    process = os.fork()
    if not process:
        load_and_exit(path)
    _, status, usage = os.wait4(process, 0)
    assert os.waitstatus_to_exitcode(status) == REFUSED
    assert 1024 * usage.ru_maxrss - before < MEMORY


def load_and_exit(path):
    """The life of a process of its own: loads a checkpoint, and ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    status = 0
    try:
        checkpoint.load_checkpoint(path)
    except Failure as failure:
        status = REFUSED if str(path) in str(failure) and len(str(failure).splitlines()) == 1 else 1
    finally:
        os._exit(status)


@pytest.mark.parametrize(
    "save",
    [
        saved,
        pickle.dumps,
        lambda value: saved(value, _use_new_zipfile_serialization=False),
        lambda value: zipped(pickle.dumps(value, 2)),
    ],
    ids=["by torch", "a plain pickle", "torch's old format", "in a good checkpoint"],
)
def test_code_in_a_checkpoint_is_not_run(tmp_path, save):
    (tmp_path / "mnist_cnn.pt").write_bytes(save({"conv1.weight": RunsCode(tmp_path / "ran")}))
    with pytest.raises(Failure):
        net.load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("stage", "flags", "name"),
    [("evaluate", (), "mnist_cnn.pt"), ("infer", (), "mnist_cnn.pt"), ("train", ("--epochs", "9999"), "checkpoint.pt")],
)
@pytest.mark.parametrize("content", [b"", b"garbage", zipped(b"\x80\x02" + FORGED["many bytes"] + b".")])
def test_a_stage_that_is_given_a_bad_checkpoint_fails_and_changes_no_file(volume, stage, flags, name, content):
    (volume / name).write_bytes(content)
    before = stages.contents(volume)
    stages.assert_fails(stages.call(stage, *flags, model=volume), 1, volume / name, "--fresh")
    assert stages.contents(volume) == before
