"""What the three images must agree on: the network, its input, and how its weights are loaded.

This file stands in every image, byte for byte the same. The original is model-train/net.py; `make net` copies it.
"""

import gc
import hashlib
import io
import pickletools
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

# What torch's import makes stays to the end. The garbage collector need not look through it again and again, neither
# while it grows nor at the program's end: that saves 0.3 s of a stage's time.
gc.disable()
import torch
import torch.nn as nn
import torch.nn.functional as F

gc.freeze()
gc.enable()

from artifacts import Failure, read_limited, read_raw

# Mean and standard deviation of all pixels of the 60,000 training images, on the scale from 0 to 1.
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081

MAX_MODEL_BYTES = 1_000_000  # a checkpoint of this network takes 90 kB
# What the pickle in a checkpoint of plain float32 tensors consists of: these globals and these opcodes.
PICKLE_GLOBALS = ("collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2")
PICKLE_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "SETITEM", "SETITEMS"),
    *("EMPTY_DICT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NEWTRUE", "NEWFALSE", "BINUNICODE"),
    *("BININT", "BININT1", "BININT2", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}
MAX_PICKLE_OPCODES = 2_000  # a checkpoint of training takes 300


class Net(nn.Module):
    """The network of PyTorch's mnist_hogwild example: 21,840 parameters, and the same state-dict keys."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        """float32 [N, 1, 28, 28] as to_input() makes it -> log-probabilities, float32 [N, 10]."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(F.dropout2d(self.conv2(x), training=self.training), 2))
        x = F.relu(self.fc1(x.to_dense().flatten(1)))
        x = F.dropout(x, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


def to_input(images):
    """Images, uint8 [N, 28, 28] with 0 as background, as the network's input: float32 [N, 1, 28, 28], normalised."""
    return images.float().div_(255 * PIXEL_STD).sub_(PIXEL_MEAN / PIXEL_STD).unsqueeze(1)


def predict(model, images, batch_size=250):
    """The model's log-probabilities, float32 [N, 10], of images, uint8 [N, 28, 28]."""
    model.eval()

    @torch.inference_mode()  # which holds in the thread that asks for it only
    def predict_batch(batch):
        x = to_input(batch)
        # In oneDNN's own memory layout pooling is several times as fast; the network's to_dense() ends it.
        return model(x.to_mkldnn() if torch.backends.mkldnn.is_available() else x)

    # Each thread has batches of its own. Were every batch divided among them, what one core has computed would go to
    # another after every layer; where cores share no cache, two threads were then no faster than one.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.cat([*pool.map(predict_batch, images.split(batch_size))])


def read_split(data, split):
    """The `train` (60,000) or `t10k` (10,000) images, uint8 [N, 28, 28], and labels, int64 [N], from the folder data.

    Raises Failure if a file is missing or is not, to the byte, the one that MNIST consists of.
    """
    return parse_split(read_raw(data, f"{split}-images-idx3-ubyte"), read_raw(data, f"{split}-labels-idx1-ubyte"))


def parse_split(images, labels):
    """Images, uint8 [N, 28, 28], and labels, int64 [N], from the contents of two raw files."""
    # The files' own headers (16 and 8 bytes) need no parsing: the sha256 has vouched for them.
    images = torch.frombuffer(images, dtype=torch.uint8, offset=16)
    labels = torch.frombuffer(labels, dtype=torch.uint8, offset=8)
    return images.view(-1, 28, 28), labels.long()


def load_tensors(content, path, remedy):
    """What torch.save wrote, from its bytes: float32 tensors, numbers and text, in dicts. Raises Failure otherwise.

    Nothing that the bytes say is run, and they take no more memory than a few times their own size.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is odd in a file; what matters is checked
            return torch.load(repack(content), map_location="cpu", weights_only=True)
    except Exception:  # a damaged file ends the unpickler in any of a dozen ways
        raise Failure(f"{path} is damaged, or not a checkpoint of plain float32 tensors. {remedy}") from None


def repack(content):
    """A zip of what is in a zip, a file-like object, with everything checked. Raises ValueError or others if it is not.

    torch reads this one, since its own reader may find other entries than Python's in a forged zip.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(checked, "w") as new:
        entries = old.infolist()
        # torch.save compresses nothing. What is compressed, or named twice, could take any amount of memory.
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("compressed")
        for name in dict.fromkeys(entry.filename for entry in entries):
            record = old.read(name)
            if name.lower().endswith(".pkl"):
                check_pickle(record)
            new.writestr(zipfile.ZipInfo(name), record)  # its date is fixed: a clock may be before 1980
    checked.seek(0)
    return checked


def check_pickle(content):
    """Raises ValueError unless a pickle is what torch.save makes of dicts of tensors, before anything is built from it.

    weights_only alone lets bytearray(5_000_000_000) through, and values that contain each other take the unpickler
    for ever or overflow its stack.
    """
    memo, previous = {}, None
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if name not in PICKLE_OPCODES or number > MAX_PICKLE_OPCODES:
            raise ValueError(name)
        if name == "GLOBAL" and argument not in PICKLE_GLOBALS:
            raise ValueError(argument)
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = previous
        elif name in ("BINGET", "LONG_BINGET") and memo.get(argument) not in ("BINUNICODE", "GLOBAL"):
            raise ValueError("a container that is used twice")
        previous = name


def load_model(path):
    """The model of a checkpoint (a state_dict of Net, or of a module with the same keys), and the file's sha256.

    Raises Failure if it is missing, damaged, of another network, not finite, or would run code on loading.
    """
    remedy = "Train a new one with: docker compose run --rm train --fresh"
    content = read_limited(path, MAX_MODEL_BYTES, remedy)
    model = Net()
    fill_model(model, load_tensors(content, path, remedy), path, remedy)
    return model, hashlib.sha256(content).hexdigest()


def fill_model(model, state_dict, path, remedy):
    """Copies the state_dict into the model; raises Failure unless keys, shapes, types and finiteness are right."""
    expected = model.state_dict()
    # A plain dict: a loaded one may have attributes of its own that hide its methods.
    tensors = dict(dict.items(state_dict)) if isinstance(state_dict, dict) else {}
    if tensors.keys() != expected.keys():
        raise Failure(f"{path} is not a state_dict of this network (its keys differ). {remedy}")
    for key, tensor in tensors.items():
        check_tensor(tensor, key, expected[key].shape, path, remedy)
    model.load_state_dict(tensors, strict=True)


def check_tensor(tensor, name, shape, path, remedy):
    """Raises Failure unless this is a plain float32 tensor of the shape, with finite numbers."""
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.shape != shape or tensor.dtype != torch.float32:
        raise Failure(f"{path} is of another network ({name} is not float32 {[*shape]}). {remedy}")
    if not torch.isfinite(tensor).all():
        raise Failure(f"{path} holds numbers that are not finite (in {name}). {remedy}")
