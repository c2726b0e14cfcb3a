"""Reads the images and labels of the data set from its files, verified. The files are read without torch."""

import hashlib
import io
import math
import random
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from stage.dataset import DATA_SET
from stage.files import check_links, read_limited
from stage.process import Failure, command

if TYPE_CHECKING:
    import torch
    from PIL import Image

Images: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # uint8 [N, H, W] or [N, H, W, C], and their labels, int64 [N]

DATA_HINT = f"Download it again with: {command('train')}, or: make data"
EDIT_HINT = "Edit model-train/stage/dataset.py, then run: make copies"
REMOVE_HINT = "Remove it, or put another picture in its place."
MAX_FILE_BYTES = 500_000_000  # of a raw file; EMNIST's largest has 98 MB
VALIDATION_PART, TEST_PART = 12, 7  # one in so many images of a class, where a data set has no such split of its own
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # as torchvision's ImageFolder


class Split(NamedTuple):
    """The images of a split as they are read: their pixels, their labels from 0, and the sha256 of their files."""

    pixels: bytearray | memoryview  # uint8 [N, H, W, C]; of transposed data sets [N, W, H, C]
    labels: list[int]
    sha256: dict[str, str]


def read_images(data: Path, split: Literal["train", "test"]) -> Images:
    """Read the images, uint8 [N, H, W] or, of C channels, [N, H, W, C], and the labels, int64 [N], of a split.

    Raise Failure if a file is missing or invalid.
    """
    return to_tensors(read_split(data, split))


def read_all(data: Path, hint: str = DATA_HINT) -> Split:
    """Read the training images, with the sha256 of all files. Raise Failure if a file is missing or invalid."""
    training, test = read_split(data, "train", hint), read_split(data, "test", hint)
    if not test.labels:
        raise Failure(f"{DATA_SET.name} in {data} has no test images. {hint if DATA_SET.sha256 else EDIT_HINT}")
    counts = Counter(training.labels)
    few = [name for label, name in enumerate(DATA_SET.classes) if counts[label] < 2]
    if few:  # one to train on, one for validation
        raise Failure(f"{DATA_SET.training_path(data)} has fewer than 2 images of: {', '.join(few)}. {EDIT_HINT}")
    return training._replace(sha256=training.sha256 | test.sha256)


def read_split(data: Path, split: Literal["train", "test"], hint: str = DATA_HINT) -> Split:
    """Read a split, from raw files or pictures. Raise Failure if a file is missing or invalid."""
    if not DATA_SET.sha256:
        return read_pictures(data, split)
    names = [*DATA_SET.sha256][:2] if split == "train" else [*DATA_SET.sha256][2:]
    images, labels = (read_raw(data, name, hint) for name in names)
    path, first = data / DATA_SET.folder / names[1], DATA_SET.first_label
    sha256 = {
        name: DATA_SET.sha256[name] or hashlib.sha256(content).hexdigest()
        for name, content in zip(names, (images, labels), strict=True)
    }
    result = Split(memoryview(images)[16:], [label - first for label in labels[8:]], sha256)
    if len(result.pixels) != len(result.labels) * math.prod(DATA_SET.shape):
        raise Failure(f"{path} has {len(result.labels):,} labels, which is not the number of images. {hint}")
    if result.labels and not 0 <= min(result.labels) <= max(result.labels) < len(DATA_SET.classes):
        found = f"{min(result.labels) + first} to {max(result.labels) + first}"
        wanted = f"{first} to {len(DATA_SET.classes) - 1 + first}, one for each of DATA_SET.classes"
        raise Failure(f"{path} has the labels {found}, not {wanted}. {EDIT_HINT}")
    return result


# Raw files, in MNIST's format -----------------------------------------------------------------------------------------


def read_raw(data: Path, name: str, hint: str = DATA_HINT) -> bytearray:
    """Read and verify one raw file of the data set. Raise Failure if it is missing or invalid."""
    path = data / DATA_SET.folder / name
    content = read_limited(path, MAX_FILE_BYTES, hint)
    if problem := problem_of(name, content):
        raise Failure(f"{path} {problem}. {hint}")
    return content


def problem_of(name: str, content: bytes | bytearray) -> str:
    """Return what is wrong with the content of the raw file with this name, or "".

    Where its sha256 is not known, only the header can be checked.
    """
    if len(content) != size_by_header(name, content):
        return f"has {len(content):,} bytes, which is not what its header says"
    if DATA_SET.sha256[name]:
        return "" if hashlib.sha256(content).hexdigest() == DATA_SET.sha256[name] else "has the wrong sha256"
    height, width = DATA_SET.shape[1:]
    is_right = "images" not in name or struct.unpack_from(">2I", content, 8) == (height, width)
    return "" if is_right else f"has no images of {height} x {width} pixels"


def size_by_header(name: str, content: bytes | bytearray) -> int:
    """Return the size of a raw file, by its first bytes: 0, 0, 8 for bytes, and the lengths of 3 dimensions, or of 1.

    It is 0 if there is no such header.
    """
    dimensions = 3 if "images" in name else 1
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < 4 + 4 * dimensions:
        return 0
    lengths: tuple[int, ...] = struct.unpack_from(f">{dimensions}I", content, 4)
    return 4 + 4 * dimensions + math.prod(lengths)


# Pictures in folders --------------------------------------------------------------------------------------------------


def read_pictures(data: Path, split: Literal["train", "test"]) -> Split:
    """Read the pictures of a split, converted to the size and the colours of the data set."""
    pixels, labels, digest = bytearray(), [], hashlib.sha256()
    for path, label in list_pictures(data, split):
        content = read_limited(path, MAX_FILE_BYTES, REMOVE_HINT)
        try:
            pixels += convert(content).tobytes()
        except Exception as error:  # damaged pictures raise exceptions of many kinds
            raise Failure(f"{path} is not a picture that can be read ({error}). {REMOVE_HINT}") from None
        labels.append(label)
        digest.update(f"{path.relative_to(data)}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return Split(pixels, labels, {f"{DATA_SET.name}/{split}": digest.hexdigest()})


def list_pictures(data: Path, split: Literal["train", "test"]) -> list[tuple[Path, int]]:
    """Return the pictures of a split, by path, with their labels. Without a folder for tests, a part of each class is.

    Raise Failure if the folders are not named after the classes.
    """
    has_test = (data / DATA_SET.name / "test").is_dir()
    folder = data / DATA_SET.name / (split if has_test else "train")
    check_links(folder)
    if not folder.is_dir():
        raise Failure(f"{folder} does not exist. Put the pictures of each class into a folder: {folder / 'CLASS'}")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if {*found} != {*DATA_SET.classes}:
        raise Failure(f"{folder} has folders named {found}, but DATA_SET.classes is {DATA_SET.classes}. {EDIT_HINT}")
    pictures = [
        (path, label)
        for label, name in enumerate(DATA_SET.classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    if has_test:
        return pictures
    chosen = choose([label for _, label in pictures], TEST_PART)
    return [picture for index, picture in enumerate(pictures) if (index in chosen) == (split == "test")]


def convert(content: bytes | bytearray) -> "Image.Image":
    """Return a picture in the size and the colours of the data set. Raise an exception if it is damaged."""
    from PIL import Image, ImageOps  # imported here: only pictures need it

    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if picture.mode.startswith(("I", "F")):  # whose levels Pillow would cut off at 255
        raise ValueError("it has more than 8 bits a channel")
    return fit(picture)


def fit(picture: "Image.Image") -> "Image.Image":
    """Return a picture in the size and the colours of the data set: itself if it has them."""
    from PIL import Image

    channels, height, width = DATA_SET.shape
    mode = "L" if channels == 1 else "RGB"
    picture = picture if picture.mode == mode else picture.convert(mode)
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BILINEAR)


# Splits and tensors ---------------------------------------------------------------------------------------------------


def choose(labels: Sequence[int], part: int) -> set[int]:
    """Return the indices of one in `part` of each class, rounded up: at random, but the same every time."""
    indices: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        indices.setdefault(label, []).append(index)
    generator = random.Random(0)
    return {
        index
        for label in sorted(indices)
        for index in generator.sample(indices[label], -(-len(indices[label]) // part))
    }


def to_tensors(split: Split) -> Images:
    """Return the images, uint8 [N, H, W] or [N, H, W, C], and labels, int64 [N], of a split."""
    import torch  # here, since it takes a second, and train reads the files before

    channels, *size = DATA_SET.shape
    images = torch.frombuffer(split.pixels, dtype=torch.uint8).view(-1, *size, *([channels] if channels > 1 else []))
    return images.transpose(1, 2).contiguous() if DATA_SET.transposed else images, torch.tensor(split.labels)


def split_validation(images: "torch.Tensor", labels: "torch.Tensor") -> tuple[Images, Images]:
    """Return the images to train on and those for validation, with their labels."""
    import torch

    if DATA_SET.validation_images:
        count = len(images) - DATA_SET.validation_images
        return (images[:count], labels[:count]), (images[count:], labels[count:])
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[sorted(choose(labels.tolist(), VALIDATION_PART))] = True
    return (images[~chosen], labels[~chosen]), (images[chosen], labels[chosen])
