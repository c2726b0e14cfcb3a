"""Decides what train has to do, from its flags and the volume's train_results.json, before torch is imported.

docs/operations.md has the table of all cases. While another training has the volume's lock, train is refused; but if
nothing is requested and there is a finished model, it does nothing, and the next stages use that model.
"""

import hashlib
import math
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from stage import code, files
from stage.dataset import DATA_SET
from stage.files import CHECKPOINT, CURVES, FRESH_HINT, TRAIN_RESULTS, WEIGHTS
from stage.process import Failure
from training.details.lock import Busy
from training.record import Record, read_record
from training.settings import Settings, flag

MAY_CHANGE = ("epochs", "num_processes")  # settings that may differ when a training goes on


class Plan(Struct):
    """What to do, and the message about it for the user."""

    action: Literal["nothing", "start", "resume"]
    message: str
    settings: Settings
    images: int | None = None  # of a dry run: train on the first ones, at most so many
    nodes: int = 1  # machines that train together
    run: str = ""  # of the record to resume
    data_sha256: dict[str, str] | None = None  # of the training in the volume, if any


def dry_run(requested: dict[str, Any], nodes: int = 1) -> Plan:
    """Return the plan of a dry run, on one batch per worker; it neither reads nor changes the volume."""
    wanted = Settings(**requested | {"epochs": 1})
    return Plan("start", "dry run", wanted, images=nodes * wanted.num_processes * wanted.batch_size, nodes=nodes)


def decide(requested: dict[str, Any], fresh: bool, folder: Path) -> Plan:
    """Return the plan for the settings given on the command line and the files in the volume's folder.

    Raise Failure with status 2 if the request conflicts with the volume, with status 1 if the volume cannot be read.
    """
    files.check_destinations(folder, WEIGHTS, CHECKPOINT, TRAIN_RESULTS, CURVES)
    if fresh:
        return Plan("start", "starting over", Settings(**requested))
    record, model = read_record(folder), folder / WEIGHTS
    if record is not None:
        return decide_on(record, requested, folder)
    if (folder / CHECKPOINT).exists():
        raise Failure(f"found {folder / CHECKPOINT} but no {TRAIN_RESULTS}. {FRESH_HINT}")
    if not model.exists():
        return Plan("start", "starting", Settings(**requested))
    if requested:
        raise Failure(f"{model} has no {TRAIN_RESULTS}, so its settings are unknown. {FRESH_HINT}", status=2)
    message = f"{model} has no {TRAIN_RESULTS}, so it comes from elsewhere; leaving it unchanged. {FRESH_HINT}"
    return Plan("nothing", message, Settings())


def decide_on(record: Record, requested: dict[str, Any], folder: Path) -> Plan:
    """Return the plan if there is the record of a training, finished or not."""
    wanted = replace(record.settings, **{name: requested[name] for name in MAY_CHANGE if name in requested})
    model, hint = folder / WEIGHTS, fresh_hint_for(record.settings)
    done, is_finished = len(record.history), record.finished and model.exists()
    trains = wanted.epochs > done or not is_finished
    check_same_training(record, requested, folder, MAY_CHANGE if trains else ("epochs",))
    plan_of = partial(Plan, settings=wanted, run=record.run, data_sha256=record.data_sha256)
    if not is_finished:  # a deleted model is published again from the checkpoint
        check_epochs(record, wanted.epochs, folder)
        if not record.batches:
            return Plan("start", "starting again: the last run ended before its first checkpoint", wanted)
        return plan_of("resume", f"resuming after {done} of {wanted.epochs} epochs")
    content = files.read_limited(model, files.MAX_MODEL_BYTES, hint)
    if hashlib.sha256(content).hexdigest() != record.model_sha256:
        message = f"{model} does not match the sha256 in {TRAIN_RESULTS}"
        if trains:
            raise Failure(f"{message}, so it cannot be trained on. {hint}", status=2)
        return plan_of("nothing", f"{message}; leaving it unchanged. {hint}")
    if trains:
        return plan_of("resume", f"continuing from {done} to {wanted.epochs} epochs")
    message = f"{model} is already trained for {done} epochs; nothing to do. To train longer: --epochs N. {hint}"
    return plan_of("nothing", message)


def fresh_hint_for(wanted: Settings) -> str:
    """Return the advice to start over with these settings: without flags, it would be with the defaults."""
    return files.fresh_hint(*wanted.changed_flags())


def check_same_training(record: Record, requested: dict[str, Any], folder: Path, may_change: tuple[str, ...]) -> None:
    """Raise Failure if the training in the volume used other code than this, or other settings than requested.

    Those named in may_change may be other ones.
    """
    now = code.sha256_by_part()
    changed = [name for name in sorted(now.keys() | record.code.keys()) if now.get(name) != record.code.get(name)]
    if changed:
        since = f"{', '.join(changed)} changed since the training in {folder}"
        raise Failure(f"{since}: undo that, or train anew. {fresh_hint_for(record.settings)}", status=2)
    names = [name for name in requested if name not in may_change and requested[name] != getattr(record.settings, name)]
    if names:
        has = ", ".join(f"{flag(name)} {getattr(record.settings, name)}" for name in names)
        wants = ", ".join(f"{flag(name)} {requested[name]}" for name in names)
        hint = fresh_hint_for(replace(record.settings, **requested))
        raise Failure(f"the training in {folder} uses {has}, not {wants}. {hint}", status=2)


def check_data(plan: Plan, data_sha256: dict[str, str], folder: Path | None) -> None:
    """Raise Failure with status 2 if the training in the volume used other data than this."""
    if plan.data_sha256 not in (None, data_sha256):
        hint = fresh_hint_for(plan.settings)
        raise Failure(f"the training in {folder} used other data than this {DATA_SET.name}. {hint}", status=2)


def check_epochs(record: Record, epochs: int, folder: Path) -> None:
    """Raise Failure if an unfinished training has already done the number of epochs that is requested now.

    Stopping a long training early is not the same as a short training: its learning rate has not decayed to 0.
    """
    done = math.floor(10 * record.epochs_done()) / 10
    if epochs != record.settings.epochs and epochs <= done:
        has = f"the training in {folder} has already done {done} of {record.settings.epochs} epochs"
        hint = f"give a larger number than that, or omit it. {fresh_hint_for(replace(record.settings, epochs=epochs))}"
        raise Failure(f"{has}, so --epochs {epochs} is too few: {hint}", status=2)


def beside_another(busy: Busy, requested: dict[str, Any], fresh: bool, folder: Path) -> Plan:
    """Return the plan while another training has the lock: do nothing, if nothing is requested and there is a model.

    Otherwise raise the Failure. The other stages check the model themselves, so here it need only be a zip to its end.
    """
    model = folder / WEIGHTS
    if requested or fresh or not (model.is_file() and zipfile.is_zipfile(model)):
        raise busy
    return Plan("nothing", f"{model} stays in use until {busy.holder} has finished", Settings())
