"""checkpoint.pt: everything needed to resume a training, saved during it, and read to resume it."""

import io
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import net
from hogwild import OPTIMIZER_STATE, SharedState
from stage import weights
from stage.files import CHECKPOINT, FRESH_HINT, MAX_RECORD_BYTES, publish, read_limited
from stage.process import Failure
from training.record import Record, parse_record
from training.settings import MAX_WORKERS

CHECKPOINT_SECONDS = 3  # between two checkpoints; saving takes 1 to 2 % of the time


class CheckpointWriter:
    """Saves the checkpoints of a training; without a folder, nothing is saved."""

    def __init__(self, folder: Path | None, shared: SharedState, record: Record) -> None:
        self.folder, self.shared, self.record = folder, shared, record
        self.last_saved = time.monotonic()

    def is_due(self) -> bool:
        """Return whether it is time for the next checkpoint."""
        return self.folder is not None and time.monotonic() > self.last_saved + CHECKPOINT_SECONDS

    def write(self, content: bytes) -> None:
        """Publish a checkpoint, then the record: if train is killed in between, the record is older, never newer."""
        if self.folder:
            publish(self.folder / CHECKPOINT, content)
            self.record.publish(self.folder)
        self.last_saved = time.monotonic()

    def save(self) -> None:
        """Publish a checkpoint now. The workers must be idle."""
        self.write(serialize(self.shared, self.record))


def serialize(shared: SharedState, record: Record) -> bytes:
    """Return the contents of a checkpoint. The workers must be idle."""
    buffer = io.BytesIO()
    parts = {"model": shared.state_dict(), **shared.optimizer_state, "sum": shared.parameter_sums.sum(0)}
    torch.save(parts | {"results": record.to_json()}, buffer)
    return buffer.getvalue()


class Checkpoint(NamedTuple):
    """What a checkpoint contains: the record, and tensors, still unchecked, by name."""

    record: Record
    tensors: dict[str, Any]
    path: Path  # for messages


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raise Failure if it is missing or damaged."""
    copies = 2 + len(OPTIMIZER_STATE) * MAX_WORKERS  # the parameters, their sum, and what each worker keeps
    limit = weights.max_file_bytes(net.Net(), copies) + MAX_RECORD_BYTES
    return parse_checkpoint(read_limited(path, limit, FRESH_HINT), path)


def parse_checkpoint(file: bytes | bytearray, path: Path) -> Checkpoint:
    """Return what a checkpoint's bytes contain. Raise Failure if it is damaged."""
    content = weights.unpickle(file, net.Net(), path, FRESH_HINT)
    try:
        parts = dict(dict.items(content))  # a TypeError if it is no dict; its attributes could shadow its methods
        record = parse_record(parts["results"])
        if not 0 <= record.epochs_done() - len(record.history) <= 1:
            raise ValueError("progress and history are inconsistent")
        return Checkpoint(record, parts, path)
    except (KeyError, TypeError):
        raise Failure(f"{path} is damaged. {FRESH_HINT}") from None
    except ValueError as error:
        raise Failure(f"{path} cannot be used: {error}. {FRESH_HINT}") from None


def restore(shared: SharedState, checkpoint: Checkpoint) -> None:
    """Load the parameters, the optimizer state, and the sum of parameters of a checkpoint.

    Raise Failure if they are not those of this network.
    """
    old, tensors, path = checkpoint
    weights.load_weights(shared.model, tensors.get("model"), path, FRESH_HINT)

    def checked(name: str, *shape: int) -> torch.Tensor:
        return weights.check_tensor(tensors.get(name), name, torch.Size(shape), path, FRESH_HINT)

    total = checked("sum", len(shared.parameters) + 1)
    kept = min(len(old.workers), shared.settings.num_processes)
    for name, state in shared.optimizer_state.items():
        state[:kept].copy_(checked(name, len(old.workers), len(shared.parameters))[:kept])
    if old.settings.epochs == shared.settings.epochs:  # else the schedule is another, and so are the averaged batches
        shared.parameter_sums[0].copy_(total)
