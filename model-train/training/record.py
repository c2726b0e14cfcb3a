"""train_results.json: its contents, and how it is created, read, checked and written."""

import platform
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, field

from stage import VERSION, code
from stage.dataset import batches_per_epoch
from stage.files import FRESH_HINT, MAX_RECORD_BYTES, TRAIN_RESULTS, publish, read_limited
from stage.process import Failure
from training.settings import Settings

# Up to 2**62: sums of two stay in 64 bits.
Count = Annotated[int, Meta(ge=0, le=2**62)]
Number = Annotated[float, Meta(ge=0, le=2**62)]
Text = Annotated[str, Meta(pattern=r"^[ -~]*\Z")]  # messages may show it on a terminal


class EpochRecord(msgspec.Struct):
    """An epoch. Losses are mean negative log-likelihoods; the accuracy is in percent."""

    epoch: Count
    train_loss: Number  # on the augmented training images, during the epoch
    validation_loss: Number
    validation_accuracy: Number
    seconds: Number


class WorkerRecord(msgspec.Struct):
    """What a worker has done: steps, images, the sum of the images' losses, and the time it waited for batches."""

    rank: Count
    images: Count = 0
    steps: Count = 0
    loss_sum: Number = 0.0
    waited_seconds: Number = 0.0

    def add(self, images: int, steps: int, loss_sum: float, waited_seconds: float) -> None:
        """Add what has been done."""
        self.images, self.steps = self.images + images, self.steps + steps
        self.loss_sum, self.waited_seconds = self.loss_sum + loss_sum, self.waited_seconds + waited_seconds


class LostWorker(msgspec.Struct):
    """A killed worker: the signal, and the first of the batches that it had, if any (they are redone)."""

    rank: Count
    signal: Count
    batch: Count | None


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that training depends on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in ("torch", "torchvision")}


class Record(msgspec.Struct):
    """The record of a training: settings, progress, history. Saved as train_results.json and in checkpoints."""

    settings: Settings
    workers: list[WorkerRecord]
    training_images: Annotated[int, Meta(ge=1, le=2**62)]  # without those for validation
    data_sha256: dict[str, str]
    code: dict[str, str]  # sha256 of what is trained and how
    version: Text = VERSION  # of the pipeline that wrote it
    finished: bool = False
    run: Text = field(default_factory=lambda: uuid.uuid4().hex)  # identifies the training
    host: Text = field(default_factory=lambda: ascii(platform.node())[1:-1])
    began: Text = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))  # or last resumed
    batches: Count = 0  # finished, over all epochs
    start: Count = 0  # the batch at which the learning rate's schedule starts
    seconds: Number = 0.0  # of training and validation
    images_per_second: Number = 0.0
    history: list[EpochRecord] = field(default_factory=list)
    lost_workers: list[LostWorker] = field(default_factory=list)
    nodes: Count = 1  # machines that train together, or did so last; workers of the same rank share a WorkerRecord
    precision: Text = "float32"  # of the convolutions
    model_sha256: Text = ""
    versions: dict[str, str] = field(default_factory=package_versions)

    @classmethod
    def new(cls, wanted: Settings, images: int, data_sha256: dict[str, str], nodes: int = 1) -> "Record":
        """Return the record of a training that has not begun, on so many images."""
        workers = [WorkerRecord(rank) for rank in range(wanted.num_processes)]
        return cls(wanted, workers, images, data_sha256, code.sha256_by_part(), nodes=nodes)

    def to_json(self) -> str:
        """Return the text of train_results.json."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    def update(self, batches: int, seconds: float) -> None:
        """Note how many batches are finished, and after how many seconds of training."""
        self.batches, self.seconds = batches, seconds
        _, images, _ = self.totals()
        self.images_per_second = images / seconds

    def totals(self) -> tuple[int, int, float]:
        """Return the sums over all workers: steps, images, and the images' losses."""
        workers = self.workers
        return sum(w.steps for w in workers), sum(w.images for w in workers), sum(w.loss_sum for w in workers)

    def add_epoch(self, validation: list[float]) -> None:
        """Append an epoch. Its loss and time are the totals minus those of earlier epochs.

        The validation is the sum of the losses, the number of correct predictions, and that of validation images.
        """
        (loss, correct, count), (_, _, loss_sum) = validation, self.totals()
        number = len(self.history) + 1
        train_loss = loss_sum / self.training_images - sum(epoch.train_loss for epoch in self.history)
        seconds = self.seconds - sum(epoch.seconds for epoch in self.history)
        self.history.append(EpochRecord(number, train_loss, loss / count, 100 * correct / count, seconds))

    def publish(self, folder: Path) -> None:
        """Publish train_results.json."""
        publish(folder / TRAIN_RESULTS, self.to_json().encode())

    def epochs_done(self) -> float:
        """Return the number of epochs trained so far, including the fraction of the current one."""
        return self.batches / batches_per_epoch(self.settings.batch_size, self.training_images)


def read_record(folder: Path) -> Record | None:
    """Read train_results.json; return None if there is none. Raise Failure if it cannot be used."""
    path = folder / TRAIN_RESULTS
    if not path.exists():
        return None
    try:
        return parse_record(read_limited(path, MAX_RECORD_BYTES, FRESH_HINT))
    except ValueError as error:
        raise Failure(f"{path} cannot be used: {error}. {FRESH_HINT}") from None


def parse_record(text: str | bytes | bytearray) -> Record:
    """Return the record from its text. Raise ValueError unless everything that resuming needs is valid."""
    try:
        record = msgspec.json.decode(text, type=Record)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"it is damaged, or of another version than {VERSION} ({error})") from None
    is_consistent = (
        len(record.workers) == record.settings.num_processes
        and len(record.history) <= record.settings.epochs
        and record.start <= record.batches
        and bool(record.model_sha256 or not record.finished)
    )
    if not is_consistent:
        raise ValueError("its values are inconsistent")
    return record
