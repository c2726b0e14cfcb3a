"""The settings of a training, with the type, default, range and help of each, and the command line of train."""

import argparse
import os
import typing
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from stage import flags
from stage.dataset import DATA_SET

MAX_WORKERS = 64

PASSES = "passes over the training images in total, earlier runs included"
IMAGES_PER_STEP = "images per step, at most all training images"
AVERAGED = "part of the epochs, at the end, over which the parameters are averaged; 0 is none"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a training. The names, with dashes, are the flags of train."""

    epochs: Annotated[int, Meta(ge=1, le=10_000, description=PASSES)] = 15
    batch_size: Annotated[int, Meta(ge=1, le=1_000_000, description=IMAGES_PER_STEP)] = 96
    lr: Annotated[float, Meta(ge=1e-9, le=1e3, description="peak learning rate")] = 0.1
    momentum: Annotated[float, Meta(ge=0, le=0.9999, description="SGD momentum of each worker")] = 0.8
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1, description="seed of initial weights, shuffles and augmentation")] = 1
    num_processes: Annotated[int, Meta(ge=1, le=MAX_WORKERS, description="Hogwild workers, one thread each")] = 2
    schedule: Annotated[
        Literal["linear", "constant"], Meta(description="learning rate schedule: linear warm-up and decay, or constant")
    ] = "linear"
    averaging: Annotated[float, Meta(ge=0, le=0.8, description=AVERAGED)] = 0.0
    weight_decay: Annotated[float, Meta(ge=0, le=1, description="weight decay (L2 penalty) coefficient")] = 7e-4
    max_grad_norm: Annotated[float, Meta(ge=1e-6, le=1e9, description="clip gradients to this norm")] = 2.0
    augmentation: Annotated[
        float, Meta(ge=0, le=4, description="strength of random rotation, scaling and shift; 0 is none")
    ] = 1.0
    dropout: Annotated[
        float, Meta(ge=0, le=0.99, description="dropout probability of the network's two dropout layers")
    ] = 0.0
    sync_every: Annotated[
        int, Meta(ge=1, le=10_000, description="batches of a node between averagings; only with several nodes")
    ] = 20

    def changed_flags(self) -> list[str]:
        """Return the settings that are not defaults, each as a command-line flag with its value."""
        values = msgspec.structs.asdict(self)
        return [f"{flag(name)} {value}" for name, value in values.items() if value != SETTINGS[name].default]

    def as_flags(self) -> str:
        """Return the settings that are not defaults, as command-line flags, for messages."""
        return " ".join(self.changed_flags()) or "default settings"


SETTINGS = {item.name: item for item in msgspec.structs.fields(Settings)}


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def values_of(name: str) -> str:
    """Return what a setting may be, such as "an integer from 1 to 64"."""
    kind, meta = typing.get_args(SETTINGS[name].type)
    if typing.get_origin(kind) is Literal:
        return " or ".join(typing.get_args(kind))
    return f"{'an integer' if kind is int else 'a number'} from {meta.ge:,} to {meta.le:,}"


def parse(name: str, text: str) -> Any:
    """Return the value of a setting from its text on the command line."""
    try:
        return msgspec.convert(text, SETTINGS[name].type, strict=False)
    except msgspec.ValidationError:
        raise argparse.ArgumentTypeError(f"{text} must be {values_of(name)}") from None


def is_node() -> bool:
    """Return whether torchrun has started this process, as one of several nodes."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def parse_args() -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the command line of train; return it, and the settings in it that were given, by name."""
    omitted = "Settings that you omit are those of the training in the volume or, without one or with --fresh, defaults"
    parser = flags.new_parser("train", f"Trains a classifier of {DATA_SET.name}. {omitted}.")
    for name, item in SETTINGS.items():  # an omitted one is None
        kind, meta = typing.get_args(item.type)
        metavar = {int: "N", float: "X"}.get(kind, "NAME")
        text = f"{meta.description} ({values_of(name)}; default: {item.default})"
        parser.add_argument(flag(name), type=partial(parse, name), metavar=metavar, help=text)
    text = "print a line every N batches (default: every 5 seconds, or a bar on a terminal)"
    parser.add_argument("--log-interval", type=flags.integer(1), metavar="N", help=text)
    text = "train one epoch on one batch per worker, neither reading nor writing the volume"
    parser.add_argument("--dry-run", action="store_true", help=text)
    text = "start over; the old model stays until the new one is finished"
    parser.add_argument("--fresh", action="store_true", help=text)
    flags.add_folder_flags(parser)
    args = parser.parse_args()
    if args.dry_run:
        args.model = None  # it neither reads nor writes the volume
    return args, {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
