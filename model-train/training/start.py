"""The start of a training: new, or from the checkpoint; checked before anything is written."""

from pathlib import Path

import torch
from msgspec.structs import replace

from hogwild import PRECISION, SharedState
from stage.files import CHECKPOINT, FRESH_HINT, TRAIN_RESULTS
from stage.output import say
from stage.process import Failure
from training.checkpoint import Checkpoint, read_checkpoint, restore
from training.details import checks
from training.details.needs import check_training_memory
from training.plan import MAY_CHANGE, Plan, check_data, check_epochs
from training.record import Record


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
    # Again, since the size of the network is known now.
    check_training_memory(plan.settings, checks.count_parameters(plan.settings.dropout))
    images, labels = images[: plan.images], labels[: plan.images]
    record = Record.new(plan.settings, len(images), data_sha256, plan.nodes)
    old = read_old(plan, folder) if folder and plan.action == "resume" else None
    if old:
        record = resumed(old.record, record)
    shared = SharedState(record, images, labels)
    checks.check_training(record, shared)
    if old:
        restore(shared, old)
        say_what_becomes_of_velocities(old.record, record)
    record.precision = str(PRECISION if shared.uses_layers else torch.float32).removeprefix("torch.")
    if not (shared.uses_layers or plan.settings.dropout):
        slower = "autograd computes the gradients: a batch takes two to three times as long"
        say(f"train: net.py differs from layers.py, so {slower}")
    if folder:
        record.publish(folder)  # if train is killed before the first checkpoint, the settings are known
    return record, shared


def read_old(plan: Plan, folder: Path) -> Checkpoint:
    """Read the checkpoint to resume from. Raise Failure if it is not of the planned training."""
    old = read_checkpoint(folder / CHECKPOINT)
    changed = {name: getattr(plan.settings, name) for name in MAY_CHANGE}
    if old.record.run != plan.run or replace(old.record.settings, **changed) != plan.settings:
        raise Failure(f"{old.path} and {TRAIN_RESULTS} belong to different trainings. {FRESH_HINT}")
    check_epochs(old.record, plan.settings.epochs, folder)  # it may have done more than train_results.json says
    return old


def resumed(old: Record, new: Record) -> Record:
    """Return the record of a training that goes on: its progress is that of its checkpoint, all else is new."""
    for place, worker in enumerate(old.workers):  # the counts of workers that no longer exist go to the remaining ones
        new.workers[place % len(new.workers)].add(worker.images, worker.steps, worker.loss_sum, worker.waited_seconds)
    # A training that had ended is continued: its learning rate is down to 0, and starts again.
    has_ended = len(old.history) == old.settings.epochs < new.settings.epochs
    kept = ("run", "batches", "seconds", "images_per_second", "history", "lost_workers")
    start = old.batches if has_ended else old.start
    return replace(new, start=start, **{name: getattr(old, name) for name in kept})


def say_what_becomes_of_velocities(old: Record, record: Record) -> None:
    """Tell the user what becomes of the velocities if there are other nodes or workers than before."""
    before, now = (f"{each.nodes} x {len(each.workers)}" for each in (old, record))
    if before != now:
        kept = min(len(old.workers), len(record.workers))
        others = ", the others with 0" if len(record.workers) > kept else ""
        velocities = f"on each node, the first {kept} start with velocities of the checkpoint{others}"
        say(f"train: nodes x workers were {before} and now are {now}: {velocities}")
