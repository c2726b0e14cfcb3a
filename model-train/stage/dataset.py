"""The data set: its name, files, pixels and classes, and reading its files, verified."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from stage.files import read_limited
from stage.process import Failure, command

if TYPE_CHECKING:
    import torch

Images: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # uint8 [N, 28, 28], and their labels, int64 [N]

DATA_HINT = f"Download it again with: {command('train')}, or: make data"


@dataclass(frozen=True)
class DataSet:
    """A data set in MNIST's format: its name in torchvision, its files, pixels and classes."""

    name: str
    sha256: dict[str, str]  # of each raw file
    pixel_mean: float  # of the training images, with pixels scaled to 0..1
    pixel_std: float
    classes: tuple[str, ...]
    shape: tuple[int, int, int] = (1, 28, 28)  # channels, height and width of an image
    min_accuracy: float = 95.0  # percent of the test images; evaluate fails below it, unless it is told another
    preparation: Literal["digit", "resize"] = "resize"  # of a user's picture: as MNIST's digits were made, or resized
    training_images: int = 60_000
    test_images: int = 10_000

    @property
    def folder(self) -> str:
        """Where torchvision expects the raw files, relative to the data folder."""
        return f"{self.name}/raw"

    def size(self, name: str) -> int:
        """Size of a raw file in bytes: a header of 16 and 28 x 28 per image, or a header of 8 and 1 per label."""
        count = self.training_images if name.startswith("train") else self.test_images
        return 16 + 28 * 28 * count if "images" in name else 8 + count


DATA_SET = DataSet(
    name="MNIST",
    sha256={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    pixel_mean=0.1307,
    pixel_std=0.3081,
    classes=tuple("0123456789"),
    preparation="digit",
)

VALIDATION_IMAGES = 5_000  # the last of the training images: no worker trains on them
TRAINING_IMAGES = DATA_SET.training_images - VALIDATION_IMAGES


def batches_per_epoch(batch_size: int, images: int = TRAINING_IMAGES) -> int:
    """Return the number of batches in a pass over the images; the last one may be smaller."""
    return math.ceil(images / batch_size)


def read_raw(data: Path, name: str, hint: str = DATA_HINT) -> bytearray:
    """Read and verify one raw file of the data set. Raise Failure if it is missing or has the wrong sha256."""
    path, size = data / DATA_SET.folder / name, DATA_SET.size(name)
    content = read_limited(path, size, hint)
    if len(content) < size:
        raise Failure(f"{path} has {len(content):,} bytes instead of {size:,}. {hint}")
    if not has_right_sha256(name, content):
        raise Failure(f"{path} has the wrong sha256. {hint}")
    return content


def has_right_sha256(name: str, content: bytes | bytearray) -> bool:
    """Return whether this is the content of the raw file with this name."""
    return hashlib.sha256(content).hexdigest() == DATA_SET.sha256[name]


def read_split(data: Path, split: str) -> Images:
    """Read the images, uint8 [N, 28, 28], and labels, int64 [N], of a split: "train", or "t10k", the test images.

    Raise Failure if a file is missing or has the wrong sha256.
    """
    return to_tensors(read_raw(data, f"{split}-images-idx3-ubyte"), read_raw(data, f"{split}-labels-idx1-ubyte"))


def split(raw: dict[str, bytearray]) -> tuple[Images, Images]:
    """Return the training images and the validation images, with labels, in the contents of the raw files."""
    images, labels = to_tensors(raw["train-images-idx3-ubyte"], raw["train-labels-idx1-ubyte"])
    return (images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES]), (images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:])


def to_tensors(images: bytearray, labels: bytearray) -> Images:
    """Return the images, uint8 [N, 28, 28], and labels, int64 [N], in the contents of two raw files."""
    import torch  # here, since it takes a second, and train reads the files before

    # The headers, 16 and 8 bytes, need no parsing: the sha256 of the files is known.
    pixels = torch.frombuffer(images, dtype=torch.uint8, offset=16)
    return pixels.view(-1, 28, 28), torch.frombuffer(labels, dtype=torch.uint8, offset=8).long()
