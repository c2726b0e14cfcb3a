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
from training.details.needs import check_training_memory
from training.plan import MAY_CHANGE, Plan, check_data, check_epochs
from training.record import Record

AUTOGRAD_NOTE = (
    "net.py differs from layers.py, so autograd computes the gradients: a batch takes two to three times as long"
)


def start_or_resume(
    plan: Plan, data_sha256: dict[str, str], images: torch.Tensor, labels: torch.Tensor, folder: Path | None
) -> tuple[Record, SharedState]:
    """Return the record and the shared state of the planned training, new or from the checkpoint in the folder.

    The images, uint8 [N, H, W] or [N, H, W, C], and labels, int64 [N], are all that there are to train on. Raise
    Failure if they do not fit the plan; if the checkpoint is missing, damaged, or of another training; or if net.py
    cannot be trained.
    """
    check_data(plan, data_sha256, folder)
    if plan.settings.batch_size > len(images):
        problem = f"--batch-size {plan.settings.batch_size:,} is larger than the {len(images):,} training images"
        raise Failure(f"{problem}: give a smaller one", status=2)
    check_training_memory(plan.settings, checks.count_parameters(plan.settings.dropout))
    images, labels = images[: plan.images], labels[: plan.images]
    record, old = Record.new(plan.settings, len(images), data_sha256, plan.nodes), None
    if folder and plan.action == "resume":
        path = folder / CHECKPOINT
        old, tensors = read_checkpoint(path)
        changed = {name: getattr(plan.settings, name) for name in MAY_CHANGE}
        if old.run != plan.run or replace(old.settings, **changed) != plan.settings:
            raise Failure(f"{path} and {TRAIN_RESULTS} belong to different trainings. {FRESH_HINT}")
        check_epochs(old, plan.settings.epochs, folder)  # it may have done more than train_results.json says
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
    """Return the record of a training that goes on: its progress is that of its checkpoint, all else is new."""
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
