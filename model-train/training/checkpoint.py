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
from training.plan import Plan
from training.record import Record, parse_record

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
        """Return the contents of a checkpoint. The workers must be idle."""
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


def start_or_resume(
    plan: Plan, images: torch.Tensor, labels: torch.Tensor, folder: Path | None
) -> tuple[Record, SharedState]:
    """Return the record and the shared state of the planned training, new or from the checkpoint in the folder.

    Raise Failure if the checkpoint is missing, damaged, or of another training.
    """
    images, labels = images[: plan.images], labels[: plan.images]
    old, tensors, path = Record.new(plan.settings, len(images), plan.data_sha256), None, folder and folder / CHECKPOINT
    if path and plan.action == "resume":
        old, tensors = parse_checkpoint(read_limited(path, MAX_CHECKPOINT_BYTES, FRESH_HINT), path)
        if old.run != plan.run:
            raise Failure(f"{path} and {TRAIN_RESULTS} belong to different trainings. {FRESH_HINT}")
    record = updated(old, plan)
    shared = SharedState(record, images, labels)
    if path and tensors:
        restore(shared, old, tensors, path)
        say_what_changes(old, record)
    if folder:
        record.publish(folder)  # if train is killed before the first checkpoint, the settings are known
    return record, shared


def parse_checkpoint(file: bytes | bytearray, path: Path) -> tuple[Record, dict[str, Any]]:
    """Return what a checkpoint's bytes contain: the record, and tensors, still unchecked, by name.

    Raise Failure if it is damaged.
    """
    content = weights.unpickle(file, path, FRESH_HINT)
    try:
        parts = dict(dict.items(content))  # a TypeError if it is no dict; its attributes could shadow its methods
        return parse_record(parts["results"]), parts
    except (KeyError, TypeError, ValueError):
        raise Failure(f"{path} is damaged. {FRESH_HINT}") from None


def updated(record: Record, plan: Plan) -> Record:
    """Return the record, updated for what is planned and for this machine."""
    now = Record.new(plan.settings)
    for place, worker in enumerate(record.workers):  # what those have done that are no longer there goes to the others
        now.workers[place % len(now.workers)].add(worker.images, worker.steps, worker.loss_sum, worker.waited_seconds)
    restarts = plan.settings.epochs > record.settings.epochs == len(record.history)  # the learning rate is down to 0
    return replace(
        record,
        settings=plan.settings,
        workers=now.workers,
        start=record.batches if restarts else record.start,
        version=now.version,
        host=now.host,
        began=now.began,
        finished=False,
        # The network's own layers, which compute the gradients with dropout, are float32.
        precision="float32" if plan.settings.dropout else str(PRECISION).removeprefix("torch."),
        nodes=plan.nodes,
        versions=now.versions,
    )


def restore(shared: SharedState, old: Record, tensors: dict[str, Any], path: Path) -> None:
    """Load the parameters, the velocities, and the sum of parameters of a checkpoint with this record.

    Raise Failure if they are not those of this network.
    """
    weights.load_weights(shared.model, tensors.get("model"), path, FRESH_HINT)
    shapes = {"velocities": [len(old.workers), len(shared.parameters)], "sum": [len(shared.parameters) + 1]}
    velocities, total = (
        weights.check_tensor(tensors.get(name), name, torch.Size(shape), path, FRESH_HINT)
        for name, shape in shapes.items()
    )
    kept = min(len(velocities), len(shared.velocities))
    shared.velocities[:kept].copy_(velocities[:kept])
    if old.settings.epochs == shared.settings.epochs:  # else the schedule is another, and so are the averaged batches
        shared.sums[0].copy_(total)


def say_what_changes(old: Record, record: Record) -> None:
    """Tell the user what becomes of the velocities if there are other nodes or workers than before."""
    before, now = (old.nodes, len(old.workers)), (record.nodes, len(record.workers))
    if before != now:
        kept = min(before[1], now[1])
        others = ", the others with 0" if now[1] > kept else ""
        say(
            "train: nodes x workers were {} x {} and now are {} x {}: ".format(*before, *now)
            + f"on each node, the first {kept} start with velocities of the checkpoint{others}"
        )
