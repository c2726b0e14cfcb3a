"""checkpoint.pt: everything needed to resume a training, saved during it and loaded to resume it."""

import io
import time
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from hogwild import PRECISION, SharedState
from stage import weights
from stage.files import CHECKPOINT, FRESH_HINT, TRAIN_RESULTS, publish, read_limited
from stage.process import Failure, say
from training.plan import MAY_CHANGE, Plan, check_epochs, check_same_training
from training.record import Record, package_versions, parse_record, read_record

CHECKPOINT_SECONDS = 3  # between two checkpoints; saving takes 1 to 2 % of the time
MAX_CHECKPOINT_BYTES = 16_000_000  # the parameters, a velocity for each of 64 workers, and the record


class Checkpoints:
    """Saves the checkpoints of a training; without a folder, nothing is saved."""

    def __init__(self, folder: Path | None, shared: SharedState, record: Record) -> None:
        self.folder, self.shared, self.record = folder, shared, record
        self.last_saved = time.monotonic()

    def is_due(self) -> bool:
        """Return whether it is time for the next checkpoint."""
        return time.monotonic() > self.last_saved + CHECKPOINT_SECONDS

    def serialize(self) -> bytes:
        """Return the contents of a checkpoint. The workers must be idle. Raise Failure if a parameter is not finite."""
        if not self.shared.parameters.isfinite().all():
            flags = self.record.settings.as_flags()
            raise Failure(f"the parameters are not finite. Settings: {flags}. {FRESH_HINT}")
        shared, buffer = self.shared, io.BytesIO()
        parts = {"model": shared.state_dict(), "velocities": shared.velocities, "sum": shared.sums.sum(0)}
        torch.save(parts | {"results": self.record.to_json()}, buffer)
        return buffer.getvalue()

    def write(self, content: bytes) -> None:
        """Publish a checkpoint, then the record: if train is killed in between, the record is older, never newer."""
        if self.folder:
            publish(self.folder / CHECKPOINT, content)
            self.record.publish(self.folder)
        self.last_saved = time.monotonic()

    def save(self) -> None:
        """Publish a checkpoint now. The workers must be idle."""
        self.write(self.serialize())


def load_checkpoint(path: Path) -> tuple[dict[str, Any], Record]:
    """Return the tensors and the record of a checkpoint. Raise Failure if it is missing or damaged."""
    return parse_checkpoint(read_limited(path, MAX_CHECKPOINT_BYTES, FRESH_HINT), path)


def parse_checkpoint(file: bytes | bytearray, path: Path) -> tuple[dict[str, Any], Record]:
    """Return what a checkpoint's bytes contain: tensors, still unchecked, by name, and the record.

    Raise Failure if it is damaged.
    """
    content = weights.unpickle(file, path, FRESH_HINT)
    try:
        parts = dict(dict.items(content))  # a TypeError if it is no dict; its attributes could shadow its methods
        return parts, parse_record(parts["results"])
    except (KeyError, TypeError, ValueError):
        raise Failure(f"{path} is damaged. {FRESH_HINT}") from None


def start_or_resume(
    plan: Plan, images: torch.Tensor, labels: torch.Tensor, folder: Path | None
) -> tuple[Record, SharedState]:
    """Return the record and the shared state of the planned training, new or from its checkpoint."""
    if folder and plan.action == "resume":
        record, shared = resume(plan, images, labels, folder)
    else:
        record = Record.new(plan.settings)
        record.precision, record.nodes = precision_of(plan), plan.nodes
        shared = SharedState(record, images, labels)
    if folder:
        record.publish(folder)  # if train is killed before the first checkpoint, the settings are known
    return record, shared


def resume(plan: Plan, images: torch.Tensor, labels: torch.Tensor, folder: Path) -> tuple[Record, SharedState]:
    """Return record and shared state from the checkpoint.

    Raise Failure if the checkpoint is missing, damaged, or of another training.
    """
    published, path = read_record(folder), folder / CHECKPOINT
    tensors, record = load_checkpoint(path)
    if published is None or record.run != published.run:
        raise Failure(f"{path} and {TRAIN_RESULTS} belong to different trainings. {FRESH_HINT}")
    check_progress(record, plan, path)
    workers, epochs = len(record.workers), record.settings.epochs
    say_what_changes(record, plan)
    record = record_for_resuming(record, plan)
    shared = SharedState(record, images, labels)
    restore(shared, tensors, workers, path)
    if record.settings.epochs != epochs:
        shared.sums.zero_()  # with another schedule, other batches are averaged
    return record, shared


def restore(shared: SharedState, tensors: dict[str, Any], workers: int, path: Path) -> None:
    """Load the parameters, the velocities of that many workers, and the sum of parameters of a checkpoint.

    Raise Failure if they are not those of this network.
    """
    weights.load_weights(shared.model, tensors.get("model"), path, FRESH_HINT)
    velocities: Any = tensors.get("velocities")
    weights.check_tensor(velocities, "velocities", torch.Size([workers, len(shared.parameters)]), path, FRESH_HINT)
    kept = min(workers, len(shared.velocities))
    shared.velocities[:kept].copy_(velocities[:kept].detach())
    summed: Any = tensors.get("sum")
    weights.check_tensor(summed, "sum", shared.sums[0].shape, path, FRESH_HINT)
    shared.sums[0].copy_(summed.detach())


def say_what_changes(record: Record, plan: Plan) -> None:
    """Tell the user what becomes of the velocities if there are other nodes or workers than before."""
    before, now = (record.nodes, len(record.workers)), (plan.nodes, plan.settings.num_processes)
    if before == now:
        return
    kept = min(before[1], now[1])
    others = ", the others with 0" if now[1] > kept else ""
    say(
        "train: nodes x workers were {} x {} and now are {} x {}: ".format(*before, *now)
        + f"on each node, the first {kept} start with velocities of the checkpoint{others}"
    )


def check_progress(record: Record, plan: Plan, path: Path) -> None:
    """Raise Failure if a checkpoint is inconsistent, or has other settings than the published record."""
    if replace(record.settings, **{name: getattr(plan.settings, name) for name in MAY_CHANGE}) != plan.settings:
        raise Failure(f"{path} and {TRAIN_RESULTS} have different settings. {FRESH_HINT}")
    if not 0 <= record.epochs_done() - len(record.history) <= 1 or record.start > record.batches:
        raise Failure(f"{path} is damaged (progress and history are inconsistent). {FRESH_HINT}")
    check_same_training(record, {}, path.parent, MAY_CHANGE)
    check_epochs(record, plan.settings.epochs, path.parent)


def record_for_resuming(record: Record, plan: Plan) -> Record:
    """Return the record of a checkpoint, updated for the planned number of epochs and for this machine."""
    is_longer = plan.settings.epochs > record.settings.epochs
    if is_longer and len(record.history) == record.settings.epochs:
        record.start = record.batches  # the learning rate has decayed to 0: restart its schedule
    record.set_workers(plan.settings.num_processes)
    now = Record.new(plan.settings)
    return replace(
        record,
        settings=plan.settings,
        version=now.version,
        host=now.host,
        began=now.began,
        finished=False,
        precision=precision_of(plan),
        nodes=plan.nodes,
        versions=package_versions(),
    )


def precision_of(plan: Plan) -> str:
    """Return the dtype of the convolutions in training; the network's own layers, used with dropout, are float32."""
    return "float32" if plan.settings.dropout else str(PRECISION).removeprefix("torch.")
