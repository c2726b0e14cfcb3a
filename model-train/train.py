"""Trains the digit classifier: Hogwild on the CPU, the network and technique of PyTorch's mnist_hogwild example.

Reads   DATA/MNIST/raw: the four raw files, downloaded if they are missing
Writes  MODEL/mnist_cnn.pt: the state_dict of the finished model
        MODEL/checkpoint.pt: everything needed to resume
        MODEL/train_results.json: settings, progress, history per epoch, workers, versions, sha256 sums
        MODEL/training.png: the curves

    docker compose run --rm train
    docker compose run --rm train --epochs 20
    python model-train/train.py --data data --model model

What MODEL contains decides what train does: see plan.py. This process does not train itself: it hands out batches to
the workers, which train as hogwild.py describes, and it validates, saves and publishes.
"""

import process

if __name__ == "__main__":
    # Before the other imports: a signal during them would end in a traceback. check_limits() checks the memory.
    process.prepare_process("train")

import argparse
import hashlib
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import artifacts
import plan
import settings
from artifacts import CURVES, FRESH_HINT, WEIGHTS, publish
from dataset import read_data
from process import Failure, exit_on_failure, percent, print_error, say
from record import Record
from settings import TRAINING_IMAGES

if TYPE_CHECKING:  # imported where used: torch takes a second to import, and a finished training does not need it
    import torch
    from checkpoint import Checkpoints
    from hogwild import SharedState
    from progress import Progress
    from workers import Workers

POLL_SECONDS = 0.01  # between checks on the workers
MIN_VALIDATION_ACCURACY = 20  # percent; chance is 10
# The memory that train needs, in bytes: for torch and the images, per worker for torch's buffers, and per image of a
# batch for what a step keeps of it (float32; measured with 1 to 64 workers and batches of 96 to 10,000).
PARENT_MEMORY, WORKER_MEMORY, IMAGE_MEMORY = 225_000_000, 32_000_000, 150_000


def main() -> int:
    """Run the stage and return its exit status."""
    args = parse_args()
    requested = {name: getattr(args, name) for name in settings.SETTINGS if getattr(args, name) is not None}
    decide = partial(plan.decide, requested, fresh=args.fresh, folder=args.model)
    with exit_on_failure("train"):
        if "TORCHELASTIC_RUN_ID" in os.environ:  # this is one of several nodes
            import cluster

            return cluster.train_on_node(args, requested)
        if args.dry_run:
            return run(plan.dry_run(requested), args)
        args.model.mkdir(parents=True, exist_ok=True)
        todo = decide()
        if todo.action != "nothing":
            try:
                with plan.volume_lock(args.model):
                    todo = decide()  # again: another training may have ended between the first look and the lock
                    if todo.action != "nothing":
                        return run(todo, args)
            except plan.Busy as busy:
                todo = plan.beside(busy, bool(requested or args.fresh), args.model)
        try:
            read_data(args.data)  # the next stages need the data but cannot write to its folder
        except Failure as failure:
            print_error(f"train: warning: {failure}")
        say(f"train: {todo.message}")
    return 0


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="train",
        description="Trains the digit classifier. Settings that you omit are taken from the training in the volume or, "
        "without one, from the defaults.",
        allow_abbrev=False,
    )
    parser.error = partial(process.refuse_flags, "train")  # type: ignore[method-assign]
    settings.add_flags(parser)
    text = "print a line every N batches (default: every 5 seconds, or a bar on a terminal)"
    parser.add_argument("--log-interval", type=parse_count, metavar="N", help=text)
    text = "train one epoch on one batch per worker, neither reading nor writing the volume"
    parser.add_argument("--dry-run", action="store_true", help=text)
    text = "start over; the old model stays until the new one is finished"
    parser.add_argument("--fresh", action="store_true", help=text)
    artifacts.add_folder_flags(parser)
    return parser.parse_args()


def parse_count(text: str) -> int:
    """Return a positive integer. It may have nine digits: Python refuses to convert thousands of them."""
    if text.isdecimal() and len(text) < 10 and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not an integer from 1 to 999999999")


def run(todo: plan.Plan, args: argparse.Namespace) -> int:
    """Train according to the plan, publish the model, and return the exit status."""
    check_limits(todo.settings)
    with ThreadPoolExecutor(1) as executor:  # verifying the data takes 0.1 s, and importing torch leaves a core idle
        reading = executor.submit(read_data, args.data)
        import net  # these import torch
        from checkpoint import Checkpoints, start_or_resume
        from progress import Progress
        from workers import Stopped, StopRequest, Workers
    raw = reading.result()

    images, labels = net.to_tensors(raw["train-images-idx3-ubyte"], raw["train-labels-idx1-ubyte"])
    validation = images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:]
    folder, count = args.model, TRAINING_IMAGES
    if args.dry_run:
        folder, count = None, todo.settings.num_processes * todo.settings.batch_size
    record, shared = start_or_resume(todo, images[:count], labels[:count], folder)  # publishes the record
    checkpoints = Checkpoints(folder, shared, record)
    progress = Progress(todo.settings.epochs * len(shared.images), shared.queue.totals(), args.log_interval)
    stop = StopRequest()
    process.handle_stop_signals(stop.handle)
    say(f"train: {todo.message} ({todo.settings.as_flags()})")
    try:
        with Workers(shared, record, stop) as workers:
            train_epochs(record, shared, validation, workers, checkpoints, progress)
    except Stopped as stopped:
        print_error(f"train: {stopped}" if folder else f"train: stopped by {process.signal_name(stopped.number)}")
        return 128 + stopped.number
    finally:
        progress.close()
    if folder:
        publish_model(record, shared, folder)
    if stop.number:
        name = process.signal_name(stop.number)
        outcome = "the model is published" if folder else "a dry run publishes nothing"
        print_error(f"train: stopped by {name}, but the training had finished: {outcome}")
        return 128 + stop.number
    return 0


def train_epochs(
    record: Record,
    shared: "SharedState",
    validation: "tuple[torch.Tensor, torch.Tensor]",
    workers: "Workers",
    checkpoints: "Checkpoints",
    progress: "Progress",
) -> None:
    """Loop over the epochs: train, save checkpoints, validate.

    Workers take batches up to the queue's limit: set_limit() moves it to the end of the epoch; drain() stops handing
    out, waits until all are idle, and updates the record. Raise Stopped if a signal asks the training to stop, Failure
    if it cannot go on.
    """
    for epoch in range(len(record.history), record.settings.epochs):
        end_of_epoch = (epoch + 1) * shared.batches_per_epoch
        shared.queue.set_limit(end_of_epoch)
        while not shared.queue.all_handed_out():
            time.sleep(POLL_SECONDS)
            workers.watch()
            progress.update(*shared.queue.totals())
            if workers.stop.number or checkpoints.is_due():
                workers.drain()
                checkpoint = checkpoints.serialize()
                shared.queue.set_limit(end_of_epoch)  # train on while it is written; after a stop, this is lost
                checkpoints.write(checkpoint)
                workers.stop.raise_if_requested()
        workers.drain()
        if end_of_epoch == shared.schedule_end:
            shared.load_mean()
        record.add_epoch(*validate(record, shared, validation), len(shared.images))
        progress.print_epoch(record.history[-1], record.settings.epochs)
    checkpoints.save()


def validate(
    record: Record, shared: "SharedState", validation: "tuple[torch.Tensor, torch.Tensor]"
) -> tuple[float, float]:
    """Return loss and accuracy (percent) of the current model on the validation images, uint8 [N, 28, 28], and labels.

    Raise Failure if the outputs of the model are not finite.
    """
    import net
    from torch.nn.functional import nll_loss

    images, labels = validation
    log_probabilities = net.predict(shared.model, images)
    if not log_probabilities.isfinite().all():
        raise Failure(f"the model's outputs are not finite. Settings: {record.settings.as_flags()}. {FRESH_HINT}")
    accuracy = 100 * (log_probabilities.argmax(1) == labels).float().mean().item()
    return nll_loss(log_probabilities, labels).item(), accuracy


def publish_model(record: Record, shared: "SharedState", folder: Path) -> None:
    """Publish the curves, the model, and the record that marks the training as finished.

    Raise Failure if the model has not learned anything.
    """
    import torch
    from progress import draw_curves

    accuracy = record.history[-1].validation_accuracy
    if accuracy < MIN_VALIDATION_ACCURACY:
        raise Failure(
            f"the validation accuracy after the last epoch is only {accuracy:.2f} % (chance is 10 %); the model is not "
            f"published. Settings: {record.settings.as_flags()}. {FRESH_HINT}"
        )
    buffer = io.BytesIO()
    torch.save(shared.state_dict(), buffer)
    publish(folder / CURVES, draw_curves(record.history))
    publish(folder / WEIGHTS, buffer.getvalue())
    # The record comes last: if train is killed in between, the next run resumes and publishes again.
    record.finished, record.model_sha256 = True, hashlib.sha256(buffer.getvalue()).hexdigest()
    record.publish(folder)
    say(f"train: finished in {record.seconds:.1f} s: {percent(accuracy)} validation accuracy")


def check_limits(wanted: settings.Settings) -> None:
    """Raise Failure if the container lacks memory or processes for the settings; warn if it has too few cores."""
    workers, batch_size = wanted.num_processes, wanted.batch_size
    needed = PARENT_MEMORY + workers * (WORKER_MEMORY + batch_size * IMAGE_MEMORY)
    process.check_memory(needed, f"training with {workers} workers and batches of {batch_size:,} images")
    process.check_threads(2 * workers + 2)  # the workers, as many threads for validation, and a margin
    cores = process.count_cores()
    if workers > cores:
        say(f"train: warning: {workers} workers share {cores} core{'s' * (cores > 1)}, which slows training down")


if __name__ == "__main__":
    process.end_process(main())
