"""The settings of a training: type, default, range and help of each, in one place."""

import argparse
import contextlib
from dataclasses import Field, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import artifacts
import process
from artifacts import DATA_SET

VALIDATION_IMAGES = 5_000  # the last of the training images; no worker ever sees them
TRAINING_IMAGES = DATA_SET.training_images - VALIDATION_IMAGES


def number_field(default: float, text: str, smallest: float, largest: float) -> Any:
    """Return a field of Settings: a number of its default's type, int or float, in a range."""
    return field(default=default, metadata={"help": text, "range": (smallest, largest)})


def choice_field(default: str, text: str, *others: str) -> Any:
    """Return a field of Settings: one of several words."""
    return field(default=default, metadata={"help": text, "choices": (default, *others)})


@dataclass(frozen=True)
class Settings:
    """The settings of a training. The names, with dashes, are the flags of train."""

    epochs: int = number_field(
        15, f"passes over the {TRAINING_IMAGES:,} training images in total, earlier runs included", 1, 10_000
    )
    batch_size: int = number_field(96, "images per step", 1, TRAINING_IMAGES)
    lr: float = number_field(0.1, "peak learning rate", 1e-9, 1e3)
    momentum: float = number_field(0.8, "SGD momentum of each worker", 0, 0.9999)
    seed: int = number_field(1, "seed of initial weights, shuffles and augmentation", 0, 2**32 - 1)
    num_processes: int = number_field(2, "Hogwild workers, one thread each", 1, 64)
    schedule: str = choice_field("linear", "learning rate schedule: linear warm-up and decay, or constant", "constant")
    averaging: float = number_field(
        0.0, "part of the epochs, at the end, over which the parameters are averaged; 0 is none", 0, 0.8
    )
    weight_decay: float = number_field(7e-4, "weight decay (L2 penalty) coefficient", 0, 1)
    max_grad_norm: float = number_field(2.0, "clip gradients to this norm", 1e-6, 1e9)
    augmentation: float = number_field(1.0, "strength of random rotation, scaling and shift; 0 is none", 0, 4)
    dropout: float = number_field(0.0, "dropout probability of the network's two dropout layers", 0, 0.99)
    sync_every: int = number_field(20, "batches of a node between averagings; only with several nodes", 1, 10_000)

    def as_flags(self) -> str:
        """Return the settings that are not defaults, as command-line flags."""
        given = [f"{flag(item.name)} {getattr(self, item.name)}" for item in fields(self) if not self.is_default(item)]
        return " ".join(given) or "default settings"

    def is_default(self, item: Field[Any]) -> bool:
        """Return whether a setting has its default."""
        return bool(getattr(self, item.name) == item.default)

    def differences(self, requested: dict[str, Any]) -> list[str]:
        """Return the names of requested settings that differ."""
        settings = asdict(self)
        return [name for name, value in requested.items() if value != settings[name]]


SETTINGS = {item.name: item for item in fields(Settings)}


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def check(name: str, value: Any) -> Any:
    """Return the value of a setting. Raise ValueError if it has the wrong type or is out of range."""
    item = SETTINGS[name]
    if "choices" in item.metadata:
        if value not in item.metadata["choices"]:
            raise ValueError(f"must be one of {', '.join(item.metadata['choices'])}")
        return value
    smallest, largest = item.metadata["range"]
    kind = type(item.default)
    if type(value) is not kind or not smallest <= value <= largest:
        raise ValueError(f"must be {'an integer' if kind is int else 'a number'} from {smallest:,} to {largest:,}")
    return value


def parse(name: str, text: str) -> Any:
    """Return the value of a setting from its text on the command line."""
    kind: Any = type(SETTINGS[name].default)
    value: Any = text
    with contextlib.suppress(ValueError):
        value = kind(text)
    try:
        return check(name, value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} {error}") from None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting. An omitted flag is None: the value comes from the volume."""
    for name, item in SETTINGS.items():
        if "choices" in item.metadata:
            values, metavar = " or ".join(item.metadata["choices"]), "NAME"
        else:
            values, metavar = "{:,} to {:,}".format(*item.metadata["range"]), "N" if item.type is int else "X"
        text = f"{item.metadata['help']} ({values}; default: {item.default})"
        parser.add_argument(flag(name), type=partial(parse, name), metavar=metavar, help=text)


def parse_args() -> argparse.Namespace:
    """Parse the command line of train."""
    parser = argparse.ArgumentParser(
        prog="train",
        description="Trains the digit classifier. Settings that you omit are taken from the training in the volume or, "
        "without one, from the defaults.",
        allow_abbrev=False,
    )
    parser.error = partial(process.refuse_flags, "train")  # type: ignore[method-assign]
    add_flags(parser)
    text = "print a line every N batches (default: every 5 seconds, or a bar on a terminal)"
    parser.add_argument("--log-interval", type=parse_count, metavar="N", help=text)
    text = "train one epoch on one batch per worker, neither reading nor writing the volume"
    parser.add_argument("--dry-run", action="store_true", help=text)
    text = "start over; the old model stays until the new one is finished"
    parser.add_argument("--fresh", action="store_true", help=text)
    text = "folder of the data (default: %(default)s)"
    parser.add_argument("--data", type=Path, default=artifacts.DATA, help=text)
    text = "folder of the volume's files (default: %(default)s)"
    parser.add_argument("--model", type=Path, default=artifacts.MODEL, help=text)
    return parser.parse_args()


def parse_count(text: str) -> int:
    """Return a positive integer."""
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} must be a positive integer")
