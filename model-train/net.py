"""What the three images must agree on: the network, its input, and how files are read and published.

This file stands in every image, byte for byte the same. The original is model-train/net.py; `make net` copies it.
"""

import contextlib
import errno
import fcntl
import gc
import hashlib
import io
import os
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# What torch's import makes stays to the end. The garbage collector need not look through it again and again, neither
# while it grows nor at the program's end: that saves 0.3 s of a stage's time.
gc.disable()
import torch
import torch.nn as nn
import torch.nn.functional as F

gc.freeze()
gc.enable()

DATA = Path("/opt/mount/data")
MODEL = Path("/opt/mount/model")

# Mean and standard deviation of all pixels of the 60,000 training images, on the scale from 0 to 1.
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081

# MNIST's raw files, in the folder where torchvision keeps them: size in bytes and sha256.
RAW_FOLDER = "MNIST/raw"
RAW_FILES = {
    "train-images-idx3-ubyte": (47040016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (60008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (7840016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (10008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}

WRITE_REMEDIES = {
    errno.ENOSPC: "Free some disk space (docker system df shows what Docker holds), then run it again.",
    errno.EROFS: "Mount the folder writable, then run it again.",
    errno.EACCES: f"Make the folder writable for uid {os.getuid()}, who owns the data folder, then run it again.",
}

# A checkpoint of this network takes 90 kB. What is ten times as large is not one, and is not read at all.
LARGEST_CHECKPOINT = 1_000_000


class Failure(Exception):
    """Work that cannot go on. Its text is one line for a person: what is wrong, where, and what mends it."""


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
        # In oneDNN's own memory layout pooling is several times as fast; the network's to_dense() ends it.
        return model(to_input(batch).to_mkldnn())

    # Each thread has batches of its own. Were every batch divided among them, what one core has computed would go to
    # another after every layer; where cores share no cache, two threads were then no faster than one.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.cat([*pool.map(predict_batch, images.split(batch_size))])


def read_split(data, split):
    """The `train` (60,000) or `t10k` (10,000) images, uint8 [N, 28, 28], and labels, int64 [N], from the folder data.

    Raises Failure if a file is missing or is not, to the byte, the one that MNIST consists of.
    """
    # The files' own headers (16 and 8 bytes) need no parsing: the sha256 has vouched for them.
    images = torch.frombuffer(read_raw(data, f"{split}-images-idx3-ubyte"), dtype=torch.uint8, offset=16)
    labels = torch.frombuffer(read_raw(data, f"{split}-labels-idx1-ubyte"), dtype=torch.uint8, offset=8)
    return images.view(-1, 28, 28), labels.long()


def read_raw(data, name):
    """The verified contents of one of RAW_FILES, as a bytearray."""
    path = data / RAW_FOLDER / name
    size, sha256 = RAW_FILES[name]
    content = bytearray(read_limited(path, size, "Put the data set there with: make data"))
    if len(content) < size:
        raise Failure(f"{path} has {len(content):,} bytes instead of {size:,}. Replace it with: make data")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Failure(f"{path} is altered (its sha256 is wrong). Replace it with: make data")
    return content


def read_limited(path, limit, remedy):
    """The contents of a file, as bytes. Raises Failure with the remedy if that fails or is more than the limit."""
    try:
        if path.exists() and not path.is_file():
            raise Failure(f"{path} is not a file. {remedy}")  # a pipe, to name one, would never end
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise Failure(f"there is no {path}. {remedy}") from None
    except OSError as error:
        raise Failure(f"{path} cannot be read ({error.strerror}). {remedy}") from None
    if len(content) > limit:
        raise Failure(f"{path} is larger than the {limit:,} bytes that it may have. {remedy}")
    return content


def load_tensors(content, path, remedy):
    """What torch.save wrote, from its bytes, with no code run: tensors, numbers, text, lists and dicts only."""
    try:
        entries = zipfile.ZipFile(io.BytesIO(content)).infolist()
        # torch.save compresses nothing. What is compressed, or named twice, could take any amount of memory.
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(content):
            raise ValueError
        with warnings.catch_warnings(action="ignore"):  # of what is odd in a file; what matters is checked
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # a damaged file ends the unpickler in any of a dozen ways
        raise Failure(f"{path} is damaged, or not a checkpoint of plain tensors. {remedy}") from None


def load_model(path):
    """The model of a checkpoint (a state_dict of Net, or of a module with the same keys), and the file's sha256.

    Raises Failure if it is missing, damaged, of another network, not finite, or would run code on loading.
    """
    remedy = "Train a new one with: docker compose run --rm train --fresh"
    content = read_limited(path, LARGEST_CHECKPOINT, remedy)
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


def publish(path, content):
    """Writes bytes to a file whole or not at all: beside its name, flushed to disk, mode 0644, then renamed over it."""
    # One name for all who write this file: a crash leaves one behind at most, and the next writer takes it over.
    part = path.with_name(f".{path.name}.part")
    try:
        with opened_alone(part) as file:
            try:
                file.truncate(0)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
                part.rename(path)
            except OSError:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        remedy = WRITE_REMEDIES.get(error.errno, "Run it again when that is mended.")
        raise Failure(f"cannot write {path} ({error.strerror}); what was there is unchanged. {remedy}") from None


@contextlib.contextmanager
def opened_alone(part):
    """Opens a file to write to, once nobody else has it open this way: two runs of a stage may publish at once."""
    while True:
        with open(part, "ab", opener=open_strictly) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # While this one waited, the other may have renamed it: then it is the published file now.
            if part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno())):
                yield file
                return


def open_strictly(path, flags):
    """Opens a file itself, neither what a link points to nor, without end, a pipe that nobody reads."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)


@contextlib.contextmanager
def plain_errors(stage):
    """Turns what goes wrong into one line on standard error and exit status 1."""
    try:
        yield
    except Failure as failure:
        sys.exit(f"{stage}: {failure}")
