"""Forged checkpoints, which ask their reader for more memory, depth or time than it has: one line, and soon."""

import os
import pickle
import resource
import signal
import subprocess

import corpus
import net
import pytest
import stages

SECONDS = 10  # far more than any of them needs
MOST_BYTES = 500_000_000  # what one may take besides what its reader has already
REFUSED = 7  # the exit status of a process in which a file was refused as it should be
HUGE = 2_000_000_000  # bytes or numbers


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
PICKLES = {
    "many bytes": call("builtins.bytearray", HUGE),
    "many bytes by another way": call(
        "torch._tensor._rebuild_from_type_v2", b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n", (HUGE,), None
    ),
    "a key that is hashed for ever": b"}" + SHARED + b"K\x01s",
    "a set that is hashed for ever": b"cbuiltins\nset\n]" + SHARED + b"a\x85R",
    "a key that is 900,000 tuples deep": b"})" + b"\x85" * 900_000 + b"K\x01s",
    "a storage larger than the file": tensor(HUGE),
    "a large tensor": new("torch.Tensor", HUGE),
    "an endless tensor": new("torch.FloatTensor", 10**15),
    "a parameter of no tensor": call("torch.nn.parameter.Parameter", HUGE),
    "a large sparse tensor": call("torch._utils._rebuild_sparse_tensor", SPARSE_LAYOUT, SPARSE_PARTS),
    "a counter": call("collections.Counter", "a" * 1000),
    "a function that is not allowed": call("torch.zeros", HUGE),
}


def forge(path, opcodes):
    """Gives a checkpoint another pickle."""
    corpus.rezip(path, compression=0, pickled=b"\x80\x02" + opcodes + b".")


def load_and_exit(path):
    """The life of a process of its own: loads a model, and ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    status = 0
    try:
        net.load_model(path)
    except net.Failure as failure:
        status = REFUSED if str(path) in str(failure) and len(str(failure).splitlines()) == 1 else 1
    finally:
        os._exit(status)


@pytest.mark.parametrize("forged", PICKLES)
def test_a_forged_model_is_refused_soon_and_without_much_memory(volume, forged):
    path = volume / "mnist_cnn.pt"
    forge(path, PICKLES[forged])
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    process = os.fork()
    if not process:
        load_and_exit(path)
    _, status, usage = os.wait4(process, 0)
    assert os.waitstatus_to_exitcode(status) == REFUSED
    assert 1024 * usage.ru_maxrss - before < MOST_BYTES


@pytest.mark.parametrize(
    ("stage", "flags", "name"),
    [("evaluate", (), "mnist_cnn.pt"), ("infer", (), "mnist_cnn.pt"), ("train", ("--epochs", "9999"), "checkpoint.pt")],
)
def test_a_stage_refuses_a_forged_checkpoint_in_one_line_and_takes_no_gigabyte(volume, stage, flags, name):
    forge(volume / name, PICKLES["many bytes"])
    before = stages.contents(volume)
    command = stages.command(stage, *flags, model=volume)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        stderr = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    stages.assert_fails(subprocess.CompletedProcess(command, process.returncode, "", stderr), 1, str(volume / name))
    assert usage.ru_maxrss < 1_000_000  # kB
    assert stages.contents(volume) == before
