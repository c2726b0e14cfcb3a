"""The training on one of several nodes: what train does when launch.py has started it.

Batches are numbered as on one machine, and node r of N takes those whose number is r modulo N: the nodes' shares of an
epoch are disjoint and together complete, and a training may resume on another number of nodes. All nodes pause for each
averaging (distributed.py) at the same batch number. After it they have the same parameters and the same record.

Node 0 alone locks and writes the volume; it decides what is to be done, and sends the others its record and parameters.
The others only look whether the volume is the same: after a restart, each of them may become node 0.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plan
import process
import train
from artifacts import DATA_SET, FRESH_HINT, TRAIN_RESULTS
from dataset import read_data
from process import Failure, print_error, say
from record import LostWorker, Record
from settings import TRAINING_IMAGES, Settings, flag

if TYPE_CHECKING:  # torch takes a second to import
    import torch
    from checkpoint import Checkpoints
    from distributed import Node
    from hogwild import SharedState
    from progress import Progress
    from workers import StopRequest, Workers

# Variables that launch.py sets. Two have defaults: seconds to wait for another node while training, and before.
TIMEOUT, JOIN_TIMEOUT = ("NODE_TIMEOUT", "30"), ("NODE_JOIN_TIMEOUT", "300")
HAS_BEGUN = "NODE_HAS_BEGUN"  # names a file that a node writes to once it trains: restarted, it resumes despite --fresh
STOP_SECONDS = 5  # from the first to the last of the signals that stop all nodes


def train_on_node(args: argparse.Namespace, requested: dict[str, Any]) -> int:
    """Train together with the other nodes; return the exit status, which is the same on all nodes.

    Raise Failure for what torchrun is to try again: another node is lost, or the training fails on this one.
    """
    from distributed import Node, SharedFailure

    if HAS_BEGUN not in os.environ:
        raise Failure("torchrun must start launch.py, not train.py: see docs/cluster.md", status=2)
    node = Node()
    with contextlib.ExitStack() as lock:  # of the volume, until the end
        try:
            preparation = Preparation(node, args, requested, lock)
            started = preparation.prepare()
            return run(node, preparation, *started) if started else 0
        except SharedFailure as failure:
            print_error(f"train: {failure}")
            return failure.status


class Preparation:
    """What a node does until all are ready to train. Each step ends on all nodes before the next one begins."""

    def __init__(
        self, node: "Node", args: argparse.Namespace, requested: dict[str, Any], lock: contextlib.ExitStack
    ) -> None:
        self.node, self.args, self.requested, self.lock = node, args, requested, lock
        self.folder = None if args.dry_run else args.model
        self.has_begun = Path(os.environ[HAS_BEGUN])
        self.raw: dict[str, bytearray] = {}
        self.started: tuple[Record, SharedState] | None = None

    def prepare(self) -> "tuple[Record, SharedState] | None":
        """Return the record and the shared state of this node, or None if there is nothing to do.

        Raise SharedFailure if the nodes cannot train together.
        """
        leads = self.node.rank == 0
        descriptions = [json.loads(text) for text in self.node.exchange("description", self.describe)]
        self.node.exchange("comparison", lambda: check_same(descriptions, self.node.rank))
        fresh = all(description["starts over"] for description in descriptions)
        start, *_ = self.node.exchange("start", (lambda: self.decide(fresh)) if leads else bytes)
        if start:
            self.node.exchange("following", bytes if leads else lambda: self.follow(start))
            self.has_begun.write_bytes(b"1")
        return self.started

    def describe(self) -> bytes:
        """Read the data, and return what must be the same on all nodes: flags, and the sha256 of data and programs."""
        self.raw = read_data(self.args.data)
        flags = {flag(name): str(value) for name, value in self.requested.items()}
        flags |= {"--dry-run": "given"} if self.args.dry_run else {}
        files = Path(__file__).parent.glob("*.py")
        programs = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        parts = {"flags": flags, "data": DATA_SET.sha256, "programs": programs}
        starts_over = self.args.fresh and not self.has_begun.stat().st_size
        return json.dumps(parts | {"starts over": starts_over}).encode()

    def images(self, first: int, last: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return some of the training images, uint8 [N, 28, 28], and their labels."""
        import net

        images, labels = net.to_tensors(self.raw["train-images-idx3-ubyte"], self.raw["train-labels-idx1-ubyte"])
        return images[first:last], labels[first:last]

    def decide(self, fresh: bool) -> bytes:
        """On node 0: decide what to do, as on one machine; return the checkpoint to start from, empty for nothing."""
        from checkpoint import Checkpoints, start_or_resume

        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.enter_context(plan.volume_lock(self.folder))
            todo = plan.decide(self.requested, fresh, self.folder)
        else:
            todo = plan.dry_run(self.requested)
        if todo.action == "nothing":
            say(f"train: {todo.message}")
            return b""
        todo = replace(todo, nodes=self.node.world)
        train.check_limits(todo.settings)
        record, shared = start_or_resume(todo, *self.images(0, self.count_images(todo.settings)), self.folder)
        nodes = f"{self.node.world} node{'s' * (self.node.world > 1)}"
        say(f"train: {todo.message} on {nodes} ({todo.settings.as_flags()})")
        self.started = record, shared
        return Checkpoints(None, shared, record).serialize()

    def count_images(self, settings: Settings) -> int:
        """Return the number of images to train on. Raise Failure with status 2 if there are not enough batches."""
        if self.args.dry_run:
            return settings.num_processes * settings.batch_size * int(self.node.world)
        batches = math.ceil(TRAINING_IMAGES / settings.batch_size)
        if self.node.world > batches:
            hint = "Use fewer nodes, or a smaller --batch-size"
            raise Failure(f"an epoch has {batches} batches, too few for {self.node.world} nodes. {hint}", status=2)
        return TRAINING_IMAGES

    def follow(self, start: bytes) -> bytes:
        """On the other nodes: start from the checkpoint of node 0, which must be in the volume of this node too."""
        from checkpoint import load_tensors, parse_checkpoint
        from hogwild import SharedState

        path = Path("the checkpoint that node 0 has sent")
        tensors, record = parse_checkpoint(start, path)
        train.check_limits(record.settings)
        if self.folder:
            check_volume(self.folder, record, self.node)
        shared = SharedState(record, *self.images(0, self.count_images(record.settings)))
        load_tensors(shared, tensors, len(record.workers), path)
        self.started = record, shared
        return b""


def check_same(descriptions: list[dict[str, dict[str, str]]], rank: int) -> bytes:
    """Raise Failure with status 2, naming what differs, unless a node has the flags, data and programs of node 0."""
    hints = {
        "flags": "Start all nodes with the same flags",
        "data": "Copy the data folder of node 0 to all nodes",
        "programs": "Build the train image from the same files for all nodes",
    }
    for kind, hint in hints.items():
        first, own = descriptions[0][kind], descriptions[rank][kind]
        for name in sorted(first.keys() | own.keys()):
            if own.get(name) != first.get(name):
                here, there = (values.get(name, "missing")[:12] for values in (own, first))
                what = f"{name} is {here} on node {rank} and {there} on node 0"
                raise Failure(f"the {kind} of the nodes differ: {what}. {hint}", status=2)
    return b""


def check_volume(folder: Path, record: Record, node: "Node") -> None:
    """Raise Failure if train_results.json is not what node 0 has just written."""
    path, deadline = folder / TRAIN_RESULTS, time.monotonic() + node.timeout
    while not (path.exists() and path.read_bytes() == record.to_json().encode()):
        if time.monotonic() > deadline:
            hint = "Mount one volume on all nodes"
            raise Failure(f"{path} on node {node.rank} is not what node 0 has written to its volume. {hint}")
        time.sleep(0.1)


# The training ---------------------------------------------------------------------------------------------------------


def run(node: "Node", preparation: Preparation, record: Record, shared: "SharedState") -> int:
    """Train from what was prepared, publish the model, and return the exit status."""
    from checkpoint import Checkpoints
    from progress import Progress
    from workers import RESUME_HINT, Stopped, StopRequest, Workers

    take_share(node, record, shared)
    folder = preparation.folder if node.rank == 0 else None
    checkpoints = Checkpoints(folder, shared, record)
    total = record.settings.epochs * len(shared.images)
    progress = Progress(total, shared.queue.totals(), preparation.args.log_interval) if node.rank == 0 else None
    images, labels = preparation.images(TRAINING_IMAGES, len(preparation.raw["train-labels-idx1-ubyte"]))
    stop = StopRequest()
    process.handle_stop_signals(stop.handle)
    try:
        with Workers(shared, record, stop) as workers:
            node.start_group()
            validation = images[node.rank :: node.world], labels[node.rank :: node.world]
            train_epochs(Averaging(node, record, shared, workers), validation, checkpoints, progress)
    except Stopped as stopped:
        print_error(f"train: node {node.rank}: {str(stopped).removesuffix(RESUME_HINT).strip()}")
        return 128 + stopped.number
    finally:
        if progress:
            progress.close()
    try:
        publish_together(node, record, shared, folder)
    finally:
        node.end_group()
    return 128 + stop.number if stop.number else 0


def take_share(node: "Node", record: Record, shared: "SharedState") -> None:
    """Give the workers of this node its share of the batches, and the learning rate of several nodes."""
    shared.peak_lr = record.settings.lr * node.world
    shared.queue.step = node.world
    first = record.batches + (node.rank - record.batches) % node.world
    shared.queue.next.value = shared.queue.limit.value = first


def train_epochs(
    averaging: "Averaging",
    validation: "tuple[torch.Tensor, torch.Tensor]",
    checkpoints: "Checkpoints",
    progress: "Progress | None",
) -> None:
    """Loop over the epochs: train, average, save checkpoints, validate; `validation` is this node's part of the images.

    Raise Stopped if a signal asks this node to stop, Failure if it cannot go on.
    """
    record, shared = averaging.record, averaging.shared
    for epoch in range(len(record.history), record.settings.epochs):
        end_of_epoch = (epoch + 1) * shared.batches_per_epoch
        averaging.train_on(end_of_epoch)
        while record.batches < end_of_epoch:
            is_stopping = averaging.average()
            if progress:
                progress.update(*averaging.totals())
            if is_stopping or checkpoints.is_due():
                checkpoint = checkpoints.serialize()
                averaging.train_on(end_of_epoch)  # while it is written; after a stop, this is lost
                checkpoints.write(checkpoint)
            if is_stopping:
                leave(averaging.workers.stop)
            averaging.train_on(end_of_epoch)
        if end_of_epoch == shared.schedule_end:
            averaging.add_sums()
            shared.load_mean()
        record.add_epoch(*averaging.validate(validation), len(shared.images))
        if progress:
            progress.print_epoch(record.history[-1], record.settings.epochs)
    checkpoints.save()


def leave(stop: "StopRequest") -> None:
    """End this node, since one was asked to stop: raise Stopped once this one is asked too, else LostNode."""
    from distributed import LostNode

    deadline = time.monotonic() + STOP_SECONDS
    while not stop.number and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.raise_if_requested()
    raise LostNode("another node was stopped")


class Averaging:
    """Trains a node's share of the batches, and brings parameters and record together with the other nodes."""

    def __init__(self, node: "Node", record: Record, shared: "SharedState", workers: "Workers") -> None:
        import torch

        self.node, self.record, self.shared, self.workers = node, record, shared, workers
        self.worker_records = shared.queue.worker_records()  # at the last averaging
        # How many of the lost workers in the record all nodes know of, and how many this one has told them of.
        self.known_losses = self.told_losses = len(record.lost_workers)
        # What is summed: the parameters; six numbers for each worker of each node, where each node fills in its own, so
        # that all nodes get all; and how many nodes are asked to stop.
        self.sizes = [len(shared.parameters), node.world * len(self.worker_records) * 6, 1]
        self.sums = torch.zeros(sum(self.sizes))

    def train_on(self, end_of_epoch: int) -> None:
        """Let the workers train up to the next averaging."""
        batches = self.record.settings.sync_every * self.node.world
        self.shared.queue.set_limit(min(end_of_epoch, self.record.batches + batches))

    def average(self) -> bool:
        """Wait for the workers and the other nodes, and average; return whether a node is asked to stop.

        Raise Stopped if this one is, and that takes too long, LostNode if another node does not come.
        """
        import torch

        self.workers.wait_until_idle()
        parameters, numbers, stopping = torch.split(self.sums, self.sizes)
        parameters.copy_(self.shared.parameters)
        numbers = numbers.zero_().view(self.node.world, -1, 6)
        numbers[self.node.rank] = self.progress_of_workers()
        stopping.fill_(bool(self.workers.stop.number))
        self.node.sum(self.sums, self.workers.watch_unless_overdue)
        self.shared.parameters.copy_(parameters.div_(self.node.world))
        self.update_record(numbers.tolist())
        return bool(stopping.item())

    def progress_of_workers(self) -> "torch.Tensor":
        """Return, for each worker of this node, what it has done since the last averaging, and how it died if it did.

        float32 [workers, 6]: images, steps, sum of losses, seconds waited, signal, batch it died at. The batch, from 1,
        is counted from the last averaging, since float32 has no large integers.
        """
        import torch

        before, self.worker_records = self.worker_records, self.shared.queue.worker_records()
        numbers = torch.zeros(len(before), 6)
        for row, old, new in zip(numbers, before, self.worker_records, strict=True):
            done = new.images - old.images, new.steps - old.steps, new.loss_sum - old.loss_sum
            row[:4] = torch.tensor([*done, new.waited_seconds - old.waited_seconds])
        self.told_losses = len(self.record.lost_workers)
        for lost in self.record.lost_workers[self.known_losses :]:
            batch = 0 if lost.batch is None else lost.batch - self.record.batches + 1
            numbers[lost.rank, 4:] = torch.tensor([lost.signal, batch])
        return numbers

    def add_sums(self) -> None:
        """Replace each node's sum of its parameters over the last batches by that of all nodes."""
        total = self.shared.sum.clone()
        self.node.sum(total, self.workers.watch_unless_overdue)
        self.shared.sum.copy_(total)

    def update_record(self, numbers: list[list[list[float]]]) -> None:
        """Add to the record what the workers of all nodes have done. Those of equal rank share a line in it."""
        untold = self.record.lost_workers[self.told_losses :]  # killed while this node waited for the others
        del self.record.lost_workers[self.known_losses :]
        for node, rows in enumerate(numbers):
            for worker, (images, steps, loss_sum, waited, number, batch) in zip(self.record.workers, rows, strict=True):
                worker.add(int(images), int(steps), loss_sum, waited)
                if number:
                    at = self.record.batches + int(batch) - 1 if batch else None
                    self.record.lost_workers.append(LostWorker(node * len(rows) + worker.rank, int(number), at))
        self.known_losses = len(self.record.lost_workers)
        self.record.lost_workers += untold
        self.record.update(self.shared.queue.limit.value, self.record.workers, self.workers.seconds())

    def totals(self) -> tuple[int, int, float]:
        """Return the sums over all workers of all nodes: steps, images, and the images' losses."""
        workers = self.record.workers
        return sum(w.steps for w in workers), sum(w.images for w in workers), sum(w.loss_sum for w in workers)

    def validate(self, part: "tuple[torch.Tensor, torch.Tensor]") -> tuple[float, float]:
        """Return loss and accuracy on the validation images, of which each node predicts a part."""
        import torch

        loss, accuracy = train.validate(self.record, self.shared, part)
        sums = torch.tensor([loss * len(part[0]), accuracy * len(part[0]), len(part[0])], dtype=torch.float64)
        self.node.sum(sums, self.workers.watch_unless_overdue)
        loss, accuracy, count = sums.tolist()
        return loss / count, accuracy / count


def publish_together(node: "Node", record: Record, shared: "SharedState", folder: Path | None) -> None:
    """Check that all nodes have the same parameters, and publish the model of node 0.

    Raise SharedFailure, on all nodes, if they differ or if the model cannot be published.
    """
    digest = hashlib.sha256(shared.parameters.numpy().tobytes()).hexdigest()
    say(f"train: node {node.rank} of {node.world}: {node.sums} averagings took {node.seconds:.2f} s; sha256 {digest}")
    digests = node.exchange("parameters", digest.encode)

    def publish() -> bytes:
        if len({*digests}) > 1:
            raise Failure(f"the parameters of the nodes differ. {FRESH_HINT}")
        if folder:
            train.publish_model(record, shared, folder)
        return b""

    node.exchange("publication", publish)
