"""The start of a training: new, or from the checkpoint; checked before anything is written."""

from pathlib import Path

import torch
from msgspec.structs import replace

from hogwild import PRECISION, SharedState
from stage.files import CHECKPOINT, FRESH_HINT, TRAIN_RESULTS
from stage.process import Failure, say
from training.checkpoint import read_checkpoint, restore
from training.details import checks
from training.details.limits import check_memory
from training.plan import MAY_CHANGE, Plan
from training.record import Record

AUTOGRAD_NOTE = (
    "net.py differs from layers.py, so autograd computes the gradients: for MNIST's network in 10 ms a batch, not 4"
)


def start_or_resume(
    plan: Plan, images: torch.Tensor, labels: torch.Tensor, folder: Path | None
) -> tuple[Record, SharedState]:
    """Return the record and the shared state of the planned training, new or from the checkpoint in the folder.

    Raise Failure if the checkpoint is missing, damaged, or of another training, or if net.py cannot be trained.
    """
    check_memory(plan.settings, checks.count_parameters(plan.settings.dropout))
    images, labels = images[: plan.images], labels[: plan.images]
    old, tensors, path = Record.new(plan.settings, len(images), plan.data_sha256), None, folder and folder / CHECKPOINT
    if path and plan.action == "resume":
        old, tensors = read_checkpoint(path)
        changed = {name: getattr(plan.settings, name) for name in MAY_CHANGE}
        if old.run != plan.run or replace(old.settings, **changed) != plan.settings:
            raise Failure(f"{path} and {TRAIN_RESULTS} belong to different trainings. {FRESH_HINT}")
    record = updated(old, plan)
    shared = SharedState(record, images, labels)
    checks.check_training(record, shared)
    if path and tensors:
        restore(shared, old, tensors, path)
        say_what_changes(old, record)
    record.precision = str(PRECISION if shared.uses_layers else torch.float32).removeprefix("torch.")
    if not (shared.uses_layers or plan.settings.dropout):
        say(f"train: {AUTOGRAD_NOTE}")
    if folder:
        record.publish(folder)  # if train is killed before the first checkpoint, the settings are known
    return record, shared


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
        nodes=plan.nodes,
        versions=now.versions,
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
