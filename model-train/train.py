"""Trains the digit classifier: Hogwild on the CPU, the network and technique of PyTorch's mnist_hogwild example.

Reads   DATA: the data set that stage/dataset.py chooses; MNIST's four raw files are downloaded if they are missing
Writes  MODEL/mnist_cnn.pt: the state_dict of the finished model
        MODEL/checkpoint.pt: everything needed to resume
        MODEL/train_results.json: settings, progress, history per epoch, workers, versions, sha256 sums
        MODEL/training.png: the curves

    docker compose run --rm train
    docker compose run --rm train --epochs 20
    python model-train/train.py --data data --model model

What MODEL contains decides what train does: docs/operations.md has the table. This process trains nothing itself: it
hands out batches to the workers (hogwild.py), validates, saves and publishes.
"""

from stage import process

if __name__ == "__main__":
    # Before the other imports: a signal during them would end in a traceback.
    process.prepare_process()
    from training import first_look

    first_look.end_unless_there_is_work()

import argparse
import contextlib
import hashlib
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hogwild import SharedState
from stage.files import CURVES, WEIGHTS, publish
from stage.images import Images, split_validation, to_tensors
from stage.output import percent, print_error, say
from stage.process import Failure, exit_on_failure
from training import plan, settings
from training.alone import Alone
from training.checkpoint import CheckpointWriter, serialize
from training.data import read_data
from training.details.curves import draw_curves
from training.details.lock import Busy, volume_lock
from training.details.progress import Progress
from training.record import Record
from training.start import start_or_resume
from training.stopping import Stopped, StopRequest
from training.validation import validate
from training.workers import Workers

if TYPE_CHECKING:
    from cluster.nodes import Nodes

# A model is published if it corrects this part of the mistakes that always predicting the commonest class makes.
MIN_LEARNED = 0.1


def main() -> int:
    """Run the stage and return its exit status."""
    args, requested = settings.parse_args()  # again: the first look is only for train.py as the program
    with exit_on_failure("train"):
        if settings.is_node():
            from cluster.nodes import train_on_node

            return train_on_node(args, requested, train)
        if args.dry_run:
            return train_alone(plan.dry_run(requested), args)
        try:
            with volume_lock(args.model):
                # Decided again: another training may have ended, or begun, since the first look.
                todo = plan.decide(requested, args.fresh, args.model)
                if todo.action != "nothing":
                    return train_alone(todo, args)
        except Busy as busy:
            todo = plan.beside_another(busy, requested, args.fresh, args.model)
        say(f"train: {todo.message}")
    return 0


def train_alone(todo: plan.Plan, args: argparse.Namespace) -> int:
    """Train on this machine alone, from the start or from a checkpoint, and return the exit status."""
    data = read_data(args.data)
    training, validation = split_validation(*to_tensors(data))
    sha256 = data.sha256
    del data  # its pixels; those of transposed data sets have been copied
    record, shared = start_or_resume(todo, sha256, *training, args.model)
    say(f"train: {todo.message} ({todo.settings.as_flags()})")
    return train(record, shared, validation, Alone(), args)


def train(
    record: Record, shared: SharedState, validation: Images, nodes: "Alone | Nodes", args: argparse.Namespace
) -> int:
    """Train, publish the model, and return the exit status.

    `nodes` is what the machines do together: alone.py for a single one, cluster/nodes.py for several.
    """
    process.imports_done()  # before the workers are forked, which share what there is
    folder = args.model if nodes.rank == 0 else None  # only node 0 writes; None too in a dry run
    checkpoints = CheckpointWriter(folder, shared, record)
    stop = StopRequest()
    process.handle_stop_signals(stop.handle)
    try:
        with (
            Workers(shared, record, stop, nodes.rank, nodes.world) as workers,
            contextlib.closing(Progress(record, args.log_interval, quiet=nodes.rank > 0)) as progress,
        ):
            train_epochs(validation, workers, nodes, checkpoints, progress)
    except Stopped as stopped:
        outcome = "a dry run saves nothing" if args.dry_run else f"{stopped.progress}{nodes.resume_hint}"
        print_error(f"{nodes.name}: stopped by {process.signal_name(stopped.number)}; {outcome}")
        return 128 + stopped.number
    nodes.publish(lambda: publish_model(record, shared, folder, validation[1]))
    if stop.number:
        outcome = "a dry run publishes nothing" if args.dry_run else "the model is published"
        signal = process.signal_name(stop.number)
        print_error(f"{nodes.name}: stopped by {signal}, but the training had finished: {outcome}")
        return 128 + stop.number
    return 0


def train_epochs(
    validation: Images, workers: Workers, nodes: "Alone | Nodes", checkpoints: CheckpointWriter, progress: Progress
) -> None:
    """Loop over the epochs: train, save checkpoints, validate. Raise Stopped if a signal ends the training."""
    record, shared = workers.record, workers.shared
    images, labels = (each[nodes.rank :: nodes.world] for each in validation)  # each node validates on a part
    began = time.monotonic() - record.seconds  # earlier runs count too
    for epoch in range(len(record.history), record.settings.epochs):
        end_of_epoch = (epoch + 1) * shared.batches_per_epoch
        while record.batches < end_of_epoch:
            done = train_until_pause(nodes.next_sync(end_of_epoch), workers, nodes, checkpoints, progress)
            is_stopping = nodes.sync(workers)
            record.update(done, time.monotonic() - began)
            if is_stopping:
                checkpoints.save()
                raise nodes.stopped(workers.stop)
            if checkpoints.is_due():
                checkpoint = serialize(shared, record)
                workers.hand_out(nodes.next_sync(end_of_epoch))  # to train on while it is written
                checkpoints.write(checkpoint)
        if epoch + 1 == record.settings.epochs:
            shared.load_mean(nodes.sum(shared.parameter_sums.sum(0), workers))  # with --averaging
        sums = nodes.sum(validate(shared.model, images, labels), workers)
        record.update(end_of_epoch, time.monotonic() - began)
        record.add_epoch(sums.tolist())
        progress.print_epoch()
    checkpoints.save()


def train_until_pause(
    limit: int, workers: Workers, nodes: "Alone | Nodes", checkpoints: CheckpointWriter, progress: Progress
) -> int:
    """Train on the batches below the limit, or fewer if it is time to stop or to save; return the first not done.

    Then the workers are idle. Several nodes must all pause at the same batch: they stop and save at the limit only.
    """
    while workers.poll(limit):
        progress.update()
        if nodes.world == 1 and (workers.stop.number or checkpoints.is_due()):
            limit = workers.next_to_send  # send no more: the loop ends when the batches that are sent are done
    return limit


def publish_model(record: Record, shared: SharedState, folder: Path | None, labels: torch.Tensor) -> None:
    """Publish the curves, the model, and the record that marks the training as finished, if there is a folder.

    Raise Failure if the model has not learned anything: its validation accuracy is not well above that of always
    predicting the commonest of the labels of the validation images, int64 [N].
    """
    if not folder:
        return
    chance = 100 * labels.bincount().max().item() / len(labels)
    accuracy = record.history[-1].validation_accuracy
    if accuracy < chance + MIN_LEARNED * (100 - chance):
        raise Failure(
            f"the validation accuracy after the last epoch is only {accuracy:.2f} % (chance is {chance:.0f} %); the "
            f"model is not published. Try a smaller --lr. {plan.fresh_hint_for(record.settings)}"
        )
    buffer = io.BytesIO()
    torch.save(shared.state_dict(), buffer)
    publish(folder / CURVES, draw_curves(record.history))
    publish(folder / WEIGHTS, buffer.getvalue())
    # The record comes last: if train is killed in between, the next run resumes and publishes again.
    record.finished, record.model_sha256 = True, hashlib.sha256(buffer.getvalue()).hexdigest()
    record.publish(folder)
    say(f"train: finished in {record.seconds:.1f} s: {percent(accuracy)} validation accuracy")


if __name__ == "__main__":
    process.end_process(main())
