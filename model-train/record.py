"""train_results.json: its contents, and how it is created, read, checked and written."""

import json
import math
import platform
import types
import typing
import uuid
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import settings
from artifacts import DATA_SET, FRESH_HINT, TRAIN_RESULTS, publish, read_limited
from process import Failure
from settings import Settings

VERSION = "2.2"  # of the pipeline
MAX_BYTES = 10_000_000  # the file takes a few kB, and 200 bytes more with every epoch
RENAMED = {"held_out_loss": "validation_loss", "held_out_accuracy": "validation_accuracy"}  # since version 1


@dataclass
class EpochRecord:
    """An epoch. Losses are mean negative log-likelihoods; the accuracy is in percent."""

    epoch: int
    train_loss: float  # on the augmented training images, during the epoch
    validation_loss: float
    validation_accuracy: float
    seconds: float


@dataclass
class WorkerRecord:
    """What a worker has done: steps, images, the sum of the images' losses, and the time it waited for batches."""

    rank: int
    images: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    waited_seconds: float = 0.0

    def add(self, images: int, steps: int, loss_sum: float, waited_seconds: float) -> None:
        """Add what has been done."""
        self.images, self.steps = self.images + images, self.steps + steps
        self.loss_sum, self.waited_seconds = self.loss_sum + loss_sum, self.waited_seconds + waited_seconds


@dataclass
class LostWorker:
    """A killed worker: the signal, and the batch it was working on, if any (another worker redid it)."""

    rank: int
    signal: int
    batch: int | None


@dataclass
class Record:
    """The record of a training: settings, progress, history. Saved as train_results.json and in checkpoints."""

    settings: Settings
    workers: list[WorkerRecord]
    version: str = VERSION  # of the pipeline that wrote it
    finished: bool = False
    run: str = field(default_factory=lambda: uuid.uuid4().hex)  # identifies the training
    host: str = field(default_factory=platform.node)
    began: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))  # or last resumed
    batches: int = 0  # finished, over all epochs
    start: int = 0  # the batch at which the learning rate's schedule starts
    seconds: float = 0.0  # of training and validation
    images_per_second: float = 0.0
    history: list[EpochRecord] = field(default_factory=list)
    lost_workers: list[LostWorker] = field(default_factory=list)
    nodes: int = 1  # machines that train together, or did so last; workers of the same rank share a WorkerRecord
    precision: str = "float32"  # of the convolutions
    data_sha256: dict[str, str] = field(default_factory=lambda: dict(DATA_SET.sha256))
    model_sha256: str = ""
    versions: dict[str, str] = field(default_factory=lambda: package_versions())

    @classmethod
    def new(cls, wanted: Settings) -> "Record":
        """Return the record of a training that has not begun."""
        return cls(wanted, [WorkerRecord(rank) for rank in range(wanted.num_processes)])

    def to_json(self) -> str:
        """Return the text of train_results.json."""
        return json.dumps(asdict(self), indent=1)

    def set_workers(self, count: int) -> None:
        """Set the number of workers; what those that are no longer there have done is added to the others."""
        old, self.workers = self.workers, [WorkerRecord(rank) for rank in range(count)]
        for place, worker in enumerate(old):
            self.workers[place % count].add(worker.images, worker.steps, worker.loss_sum, worker.waited_seconds)

    def update(self, batches: int, seconds: float) -> None:
        """Note how many batches are finished, and after how many seconds of training."""
        self.batches, self.seconds = batches, seconds
        self.images_per_second = self.totals()[1] / seconds

    def totals(self) -> tuple[int, int, float]:
        """Return the sums over all workers: steps, images, and the images' losses."""
        workers = self.workers
        return sum(w.steps for w in workers), sum(w.images for w in workers), sum(w.loss_sum for w in workers)

    def add_epoch(self, validation_loss: float, validation_accuracy: float, images: int) -> None:
        """Append an epoch over `images` images. Its loss and time are the totals minus those of earlier epochs."""
        total_loss = sum(worker.loss_sum for worker in self.workers) / images
        self.history.append(
            EpochRecord(
                epoch=len(self.history) + 1,
                train_loss=total_loss - sum(epoch.train_loss for epoch in self.history),
                validation_loss=validation_loss,
                validation_accuracy=validation_accuracy,
                seconds=self.seconds - sum(epoch.seconds for epoch in self.history),
            )
        )

    def publish(self, folder: Path) -> None:
        """Publish train_results.json."""
        publish(folder / TRAIN_RESULTS, self.to_json().encode())

    def epochs_done(self) -> float:
        """Return the number of epochs trained so far, including the fraction of the current one."""
        return self.batches / math.ceil(settings.TRAINING_IMAGES / self.settings.batch_size)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that training depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "torchvision")}


def read_record(folder: Path) -> Record | None:
    """Read train_results.json; return None if there is none. Raise Failure if it is damaged or of a newer version."""
    path = folder / TRAIN_RESULTS
    if not path.exists():
        return None
    try:
        return parse_record(read_limited(path, MAX_BYTES, FRESH_HINT))
    except ValueError as error:
        raise Failure(f"{path} cannot be used: {error}. {FRESH_HINT}") from None


def parse_record(text: str | bytes | bytearray) -> Record:
    """Return the record from its text. Raise ValueError unless everything that resuming needs is valid.

    A missing key, which an older version did not write, gets its default.
    """
    try:
        content = json.loads(text, object_hook=rename_keys)
        unknown = [repr(name) for name in content["settings"] if name not in settings.SETTINGS]
        if unknown:
            writer = f"version {content['version']!r}" if "version" in content else "an unknown version"
            names = ", ".join(unknown)
            raise ValueError(f"it was written by {writer} and has settings that this version does not know: {names}")
        record = build(Record, content)
        for name, value in asdict(record.settings).items():
            settings.check(name, value)
        if not is_consistent(record):
            raise ValueError("its values are inconsistent")
        return typing.cast(Record, record)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is damaged ({error})") from None


def is_consistent(record: Record) -> bool:
    """Return whether the parts of a record agree.

    The workers' totals are at least those of the history, and at most what the batches allow, with a margin: a step for
    each killed worker, and an epoch of images, since the last batch of an epoch is smaller.
    """
    images, tolerance = settings.TRAINING_IMAGES, 1e-3  # of sums of floating-point numbers
    seconds = sum(epoch.seconds for epoch in record.history)
    loss_sum = sum(epoch.train_loss for epoch in record.history) * images
    return (
        len(record.workers) == record.settings.num_processes
        and len(record.history) <= record.settings.epochs
        and sum(worker.steps for worker in record.workers) <= record.batches + len(record.lost_workers)
        and sum(worker.images for worker in record.workers) <= (record.epochs_done() + 1) * images
        and sum(worker.loss_sum for worker in record.workers) >= loss_sum * (1 - tolerance)
        and record.seconds >= seconds * (1 - tolerance)
        and bool(record.model_sha256 or not record.finished)
    )


def rename_keys(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the current names of its keys."""
    return {RENAMED.get(name, name): value for name, value in content.items()}


def build(kind: Any, value: Any) -> Any:
    """Convert parsed JSON to a type: a dataclass, list, dict, number, string, or one of these or None.

    Raise ValueError if it does not match, if a number is negative or not finite, or if a string is not printable.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"it is damaged (no {kind.__name__})")
        hints = typing.get_type_hints(kind)
        return kind(
            **{item.name: build(hints[item.name], value[item.name]) for item in fields(kind) if item.name in value}
        )
    if origin is types.UnionType:
        return None if value is None else build(arguments[0], value)
    if not isinstance(value, origin or kind) or isinstance(value, bool) is not (kind is bool):  # a bool is an int
        raise ValueError(f"it is damaged ({str(value)[:20]!r} is not a {getattr(kind, '__name__', kind)})")
    if origin is list:
        return [build(arguments[0], item) for item in value]
    if origin is dict:
        return {build(arguments[0], key): build(arguments[1], item) for key, item in value.items()}
    if isinstance(value, str) and not value.isprintable():
        raise ValueError("it is damaged (unprintable text)")
    if isinstance(value, int | float) and not 0 <= value < 2**62:
        raise ValueError(f"it is damaged ({str(value)[:20]!r} is out of range)")
    return value
