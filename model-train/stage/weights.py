"""Loading weights. A file in the volume may have been replaced by somebody else's, so it is not trusted."""

import hashlib
import io
import os
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stage import code
from stage.files import WEIGHTS, read_limited
from stage.process import Failure, command

# The globals and opcodes of the pickle in a file of plain float32 tensors.
PICKLE_GLOBALS = ("collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2")
PICKLE_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "SETITEM", "SETITEMS"),
    *("EMPTY_DICT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NEWTRUE", "NEWFALSE", "BINUNICODE"),
    *("BININT", "BININT1", "BININT2", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}


def max_file_bytes(model: nn.Module, copies: int = 1) -> int:
    """Return the size that a file may have with so many copies of a model's numbers, their names, and little else."""
    sizes: list[int] = [tensor.numel() for tensor in model.state_dict().values()]
    return 1_000_000 + 1_000 * len(sizes) + 4 * copies * sum(sizes)


def load_model(model: nn.Module, folder: Path) -> str:
    """Load the weights in the volume into a model, and return the sha256 of their file.

    The file is a state dict of the model, or of a module with the same keys. Raise Failure if it is missing, damaged,
    of another network, trained with other code than this, not finite, or would run code when it is loaded.
    """
    path, hint = folder / WEIGHTS, f"Train a new one with: {command('train', '--fresh')}"
    if not os.path.lexists(path):  # perhaps of an unfinished training, which --fresh would discard
        raise Failure(f"{path} does not exist. Train or resume with: {command('train')}")
    content = read_limited(path, max_file_bytes(model), hint)
    sha256 = hashlib.sha256(content).hexdigest()
    code.check_same(folder, sha256)  # first: weights of another network than this copy of net.py do not fit it
    load_weights(model, unpickle(content, model, path, hint), path, hint)
    return sha256


def load_weights(model: nn.Module, state_dict: Any, path: Path, hint: str) -> None:
    """Copy a state dict into the model. Raise Failure unless its keys, shapes and dtypes fit and it is finite."""
    expected = model.state_dict()
    # A plain copy: attributes of a loaded dict could shadow its methods.
    tensors = dict(dict.items(state_dict)) if isinstance(state_dict, dict) else {}
    if tensors.keys() != expected.keys():
        raise Failure(f"{path} is not a state_dict of this network (different keys). {hint}")
    for key, tensor in tensors.items():
        check_tensor(tensor, key, expected[key].shape, path, hint)
    model.load_state_dict(tensors, strict=True)


def check_tensor(tensor: Any, name: str, shape: torch.Size, path: Path, hint: str) -> torch.Tensor:
    """Return the tensor, or raise Failure unless it is a plain one, float32, of the given shape, and finite."""
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.shape != shape or tensor.dtype != torch.float32:
        raise Failure(f"{path} does not fit this network ({name}: expected float32 {[*shape]}). {hint}")
    if not torch.isfinite(tensor).all():
        raise Failure(f"{path} contains values that are not finite (in {name}). {hint}")
    return torch.Tensor.detach(tensor)


def unpickle(content: bytes | bytearray, model: nn.Module, path: Path, hint: str) -> Any:
    """Load what torch.save wrote: dicts of float32 tensors, numbers and text. Raise Failure if it is anything else.

    No code in it is run, and it takes no more memory than a few times its size.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # odd but valid files are accepted
            max_opcodes = 2_000 + 50 * len(model.state_dict())  # a tensor takes about 30 of them
            return torch.load(repack(content, max_opcodes), map_location="cpu", weights_only=True)
    except Exception:  # damaged files raise exceptions of many kinds
        raise Failure(f"{path} is damaged, or not a file of plain float32 tensors. {hint}") from None


def repack(content: bytes | bytearray, max_opcodes: int) -> io.BytesIO:
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
                check_pickle(content_of_entry, max_opcodes)
            new.writestr(zipfile.ZipInfo(name), content_of_entry)  # fixed date: zip cannot store one before 1980
    checked.seek(0)
    return checked


def check_pickle(content: bytes, max_opcodes: int) -> None:
    """Raise ValueError unless a pickle is what torch.save writes for dicts of tensors. Nothing is unpickled here.

    weights_only=True alone allows bytearray(5_000_000_000), and nested or shared containers that take the unpickler
    exponential time or overflow its stack.
    """
    memo: dict[Any, str] = {}  # the opcode that made each object; only strings and globals may be used again
    previous = ""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if name not in PICKLE_OPCODES or number > max_opcodes:
            raise ValueError(name)
        if name == "GLOBAL" and argument not in PICKLE_GLOBALS:
            raise ValueError(argument)
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = previous
        elif name in ("BINGET", "LONG_BINGET") and memo.get(argument) not in ("BINUNICODE", "GLOBAL"):
            raise ValueError("a shared container")
        previous = name
