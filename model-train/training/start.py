"""The start of a training: new, or from the checkpoint; checked before anything is written."""

from pathlib import Path

import torch
from msgspec.structs import replace

from hogwild import PRECISION, SharedState
from stage.files import CHECKPOINT, FRESH_HINT, TRAIN_RESULTS
from stage.output import say
from stage.process import Failure
from training.checkpoint import read_checkpoint, restore
from training.details import checks
from training.details.limits import check_memory
from training.plan import MAY_CHANGE, Plan
from training.record import Record

AUTOGRAD_NOTE = (
    "net.py differs from layers.py, so autograd computes the gradients: a batch takes two to three times as long"
)


def start_or_resume(
    plan: Plan, images: torch.Tensor, labels: torch.Tensor, folder: Path | None
) -> tuple[Record, SharedState]:
    """Return the record and the shared state of the planned training, new or from the checkpoint in the folder.

    Raise Failure if the checkpoint is missing, damaged, or of another training, or if net.py cannot be trained.
    """
    check_memory(plan.settings, checks.count_parameters(plan.settings.dropout))
    images, labels = images[: plan.images], labels[: plan.images]
    old, path = None, (folder or Path()) / CHECKPOINT
    if plan.action == "resume":
        old, tensors = read_checkpoint(path)
        changed = {name: getattr(plan.settings, name) for name in MAY_CHANGE}
        if old.run != plan.run or replace(old.settings, **changed) != plan.settings:
            raise Failure(f"{path} and {TRAIN_RESULTS} belong to different trainings. {FRESH_HINT}")
    record = Record.new(plan.settings, len(images), plan.data_sha256, plan.nodes)
    if old:
        record = resumed(old, record)
    shared = SharedState(record, images, labels)
    checks.check_training(record, shared)
    if old:
        restore(shared, old, tensors, path)
        say_what_changes(old, record)
    record.precision = str(PRECISION if shared.uses_layers else torch.float32).removeprefix("torch.")
    if not (shared.uses_layers or plan.settings.dropout):
        say(f"train: {AUTOGRAD_NOTE}")
    if folder:
        record.publish(folder)  # if train is killed before the first checkpoint, the settings are known
    return record, shared


def resumed(old: Record, new: Record) -> Record:
    """Return the record of a training that goes on, from its checkpoint's and a new one, of this run and machine."""
    for place, worker in enumerate(old.workers):  # the counts of workers that no longer exist go to the remaining ones
        new.workers[place % len(new.workers)].add(worker.images, worker.steps, worker.loss_sum, worker.waited_seconds)
    # A training that had ended is continued: its learning rate is down to 0, and starts again.
    has_ended = len(old.history) == old.settings.epochs < new.settings.epochs
    return replace(
        new,
        run=old.run,
        batches=old.batches,
        start=old.batches if has_ended else old.start,
        seconds=old.seconds,
        images_per_second=old.images_per_second,
        history=old.history,
        lost_workers=old.lost_workers,
        model_sha256=old.model_sha256,
    )


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
