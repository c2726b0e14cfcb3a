"""The network, its input, and how its weights are loaded: what the three images must agree on.

All three images contain identical copies of this file. Edit the one in model-train, then run `make copies`.
"""

import gc
import hashlib
import io
import os
import pickletools
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# torch's objects live until the process ends, so the garbage collector need not scan them: this saves 0.3 s.
gc.disable()
import torch
import torch.nn as nn
import torch.nn.functional as F

gc.freeze()
gc.enable()

from artifacts import DATA_SET, MAX_MODEL_BYTES, WEIGHTS, read_limited, read_raw
from process import Failure, command


class Net(nn.Module):
    """The network of PyTorch's mnist_hogwild example: 21,840 parameters, and the same state-dict keys.

    Dropout is active in training mode only. `train --dropout` sets its probability, 0 by default; 0.5 is the example's.
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities, float32 [N, 10], for x, float32 [N, 1, 28, 28], as made by to_input()."""
        return self.classify(self.convolve(x))

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the convolutions make of x: float32 [N, 20, 4, 4]."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        return F.relu(F.max_pool2d(F.dropout2d(self.conv2(x), self.dropout, self.training), 2))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities for what convolve() has returned."""
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.dropout(x, self.dropout, self.training)
        return F.log_softmax(self.fc2(x), dim=1)


def to_input(images: torch.Tensor) -> torch.Tensor:
    """Normalise images, uint8 [N, 28, 28] with background 0, to the network's input, float32 [N, 1, 28, 28]."""
    mean, std = DATA_SET.pixel_mean, DATA_SET.pixel_std
    return images.float().div_(255 * std).sub_(mean / std).unsqueeze(1)


def read_split(data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the images, uint8 [N, 28, 28], and labels, int64 [N], of a split: "train", or "t10k", the test images.

    Raise Failure if a file is missing or has the wrong sha256.
    """
    return to_tensors(read_raw(data, f"{split}-images-idx3-ubyte"), read_raw(data, f"{split}-labels-idx1-ubyte"))


def to_tensors(images: bytearray, labels: bytearray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, uint8 [N, 28, 28], and labels, int64 [N], in the contents of two raw files."""
    # The headers, 16 and 8 bytes, need no parsing: the sha256 of the files is known.
    pixels = torch.frombuffer(images, dtype=torch.uint8, offset=16)
    return pixels.view(-1, 28, 28), torch.frombuffer(labels, dtype=torch.uint8, offset=8).long()


def predict(model: Net, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """Return the model's log-probabilities, float32 [N, 10], for images, uint8 [N, 28, 28]; sets evaluation mode."""
    model.eval()

    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

    @torch.inference_mode()  # per thread
    def predict_batch(batch: torch.Tensor) -> torch.Tensor:
        x = to_input(batch)
        if not has_onednn:
            return model.forward(x)
        return model.classify(model.convolve(x.to_mkldnn()).to_dense())  # in this layout, pooling is 3 times as fast

    # One thread per batch. Splitting a batch across threads moves activations between cores after every layer, which
    # made two threads no faster than one where cores share no cache.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.cat([*pool.map(predict_batch, torch.split(images, batch_size))])


# Loading weights. A file in the volume may have been replaced by somebody else's, so it is not trusted ----------------

# The globals and opcodes of the pickle in a file of plain float32 tensors.
PICKLE_GLOBALS = ("collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2")
PICKLE_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "SETITEM", "SETITEMS"),
    *("EMPTY_DICT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NEWTRUE", "NEWFALSE", "BINUNICODE"),
    *("BININT", "BININT1", "BININT2", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}
MAX_PICKLE_OPCODES = 2_000  # checkpoint.pt has 300


def load_model(folder: Path) -> tuple[Net, str]:
    """Load the model from the volume, and return it with the sha256 of its file.

    The file is a state dict of Net, or of a module with the same keys. Raise Failure if it is missing, damaged, of
    another network, not finite, or would run code when it is loaded.
    """
    path, hint = folder / WEIGHTS, f"Train a new one with: {command('train', '--fresh')}"
    if not os.path.lexists(path):  # perhaps of an unfinished training, which --fresh would discard
        raise Failure(f"{path} does not exist. Train or resume with: {command('train')}")
    content = read_limited(path, MAX_MODEL_BYTES, hint)
    model = Net()
    load_weights(model, load_tensors(content, path, hint), path, hint)
    return model, hashlib.sha256(content).hexdigest()


def load_weights(model: Net, state_dict: Any, path: Path, hint: str) -> None:
    """Copy a state dict into the model. Raise Failure unless its keys, shapes and dtypes fit and it is finite."""
    expected = model.state_dict()
    # A plain copy: attributes of a loaded dict could shadow its methods.
    tensors = dict(dict.items(state_dict)) if isinstance(state_dict, dict) else {}
    if tensors.keys() != expected.keys():
        raise Failure(f"{path} is not a state_dict of this network (different keys). {hint}")
    for key, tensor in tensors.items():
        check_tensor(tensor, key, expected[key].shape, path, hint)
    model.load_state_dict(tensors, strict=True)


def check_tensor(tensor: Any, name: str, shape: torch.Size, path: Path, hint: str) -> None:
    """Raise Failure unless this is a plain float32 tensor of the given shape with finite values."""
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.shape != shape or tensor.dtype != torch.float32:
        raise Failure(f"{path} does not fit this network ({name}: expected float32 {[*shape]}). {hint}")
    if not torch.isfinite(tensor).all():
        raise Failure(f"{path} contains values that are not finite (in {name}). {hint}")


def load_tensors(content: bytes | bytearray, path: Path, hint: str) -> Any:
    """Load what torch.save wrote: dicts of float32 tensors, numbers and text. Raise Failure if it is anything else.

    No code in it is run, and it takes no more memory than a few times its size.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # odd but valid files are accepted
            return torch.load(repack(content), map_location="cpu", weights_only=True)
    except Exception:  # damaged files raise exceptions of many kinds
        raise Failure(f"{path} is damaged, or not a file of plain float32 tensors. {hint}") from None


def repack(content: bytes | bytearray) -> io.BytesIO:
    """Check the contents of a zip, and return a new zip with the same contents. Raise an exception if a check fails.

    torch reads the new one: in a forged zip, its own reader may find other entries than Python's.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(checked, "w") as new:
        entries = old.infolist()
        # torch.save does not compress. Compressed or duplicate entries could take any amount of memory.
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("compressed")
        for name in dict.fromkeys(entry.filename for entry in entries):
            content_of_entry = old.read(name)
            if name.lower().endswith(".pkl"):
                check_pickle(content_of_entry)
            new.writestr(zipfile.ZipInfo(name), content_of_entry)  # fixed date: zip cannot store one before 1980
    checked.seek(0)
    return checked


def check_pickle(content: bytes) -> None:
    """Raise ValueError unless a pickle is what torch.save writes for dicts of tensors. Nothing is unpickled here.

    weights_only=True alone allows bytearray(5_000_000_000), and nested or shared containers that take the unpickler
    exponential time or overflow its stack.
    """
    memo: dict[Any, str] = {}  # the opcode that made each object; only strings and globals may be used again
    previous = ""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if name not in PICKLE_OPCODES or number > MAX_PICKLE_OPCODES:
            raise ValueError(name)
        if name == "GLOBAL" and argument not in PICKLE_GLOBALS:
            raise ValueError(argument)
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = previous
        elif name in ("BINGET", "LONG_BINGET") and memo.get(argument) not in ("BINUNICODE", "GLOBAL"):
            raise ValueError("a shared container")
        previous = name
