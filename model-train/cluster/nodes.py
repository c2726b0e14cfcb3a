"""The training on one of several nodes: what train does when launch.py has started it.

Batches are numbered as on one machine, and node r of N takes those whose number is r modulo N: the nodes' shares of an
epoch are disjoint and together complete, and a training may resume on another number of nodes. All nodes pause for each
averaging (network.py) at the same batch number. After it they have the same parameters and the same record.

Node 0 alone locks and writes the volume; it decides what is to be done, and sends the others its record and parameters.
The others only look whether the volume is the same: after a restart, each of them may become node 0.
"""

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import astuple, replace

from cluster.environment import HAS_BEGUN
from cluster.network import LostNode, Node, SharedFailure
from hogwild import SharedState
from stage.dataset import batches_per_epoch
from stage.files import FRESH_HINT, TRAIN_RESULTS
from stage.images import Images, split_validation, to_tensors
from stage.output import print_error, say
from stage.process import Failure
from training import plan, settings
from training.checkpoint import parse_checkpoint, restore, serialize
from training.data import read_data
from training.details.lock import volume_lock
from training.details.needs import check_limits
from training.record import LostWorker, Record
from training.start import start_or_resume
from training.stopping import SAVED, Stopped, StopRequest
from training.workers import Workers

SIGNALS_SECONDS = 5  # from the first to the last of the signals that stop all nodes


def train_on_node(args: argparse.Namespace, requested: dict[str, Any], train: Callable[..., int]) -> int:
    """Train together with the other nodes, by train.train(); return the exit status, which is the same on all nodes.

    Raise Failure for what torchrun is to try again: another node is lost, or the training fails on this one.
    """
    if HAS_BEGUN not in os.environ:
        raise Failure("torchrun must start launch.py, not train.py: see docs/cluster.md", status=2)
    node = Node()
    with contextlib.ExitStack() as lock:  # of the volume, until the end
        try:
            preparation = Preparation(node, args, requested, lock)
            started = preparation.prepare()
            return train(*started, preparation.validation, Nodes(node, *started), args) if started else 0
        except SharedFailure as failure:
            print_error(f"train: {failure}")
            return failure.status


class Preparation:
    """What a node does until all are ready to train. Each step ends on all nodes before the next one begins."""

    def __init__(
        self, node: Node, args: argparse.Namespace, requested: dict[str, Any], lock: contextlib.ExitStack
    ) -> None:
        self.node, self.args, self.requested, self.lock = node, args, requested, lock
        self.has_begun = Path(os.environ[HAS_BEGUN])
        self.dry_run = plan.dry_run(requested, node.world) if args.dry_run else None
        self.data_sha256: dict[str, str] = {}
        self.training: Images
        self.validation: Images
        self.started: tuple[Record, SharedState] | None = None

    def prepare(self) -> tuple[Record, SharedState] | None:
        """Return the record and the shared state of this node, or None if there is nothing to do.

        Raise SharedFailure if the nodes cannot train together.
        """
        leads = self.node.rank == 0
        descriptions = [json.loads(text) for text in self.node.exchange("description", self.describe)]
        self.node.exchange("comparison", lambda: check_same(descriptions, self.node.rank))
        fresh = all(description["starts over"] for description in descriptions)
        start, *_ = self.node.exchange("start", lambda: self.decide(fresh) if leads else b"")
        if start:
            self.node.exchange("following", lambda: b"" if leads else self.follow(start))
            self.has_begun.write_bytes(b"1")
        return self.started

    def describe(self) -> bytes:
        """Read the data, and return what must be the same on all nodes: flags, and the sha256 of data and programs."""
        data = read_data(self.args.data)
        self.data_sha256 = data.sha256
        self.training, self.validation = split_validation(*to_tensors(data))
        flags = {settings.flag(name): str(value) for name, value in self.requested.items()}
        flags |= {settings.flag(name): "given" for name in ("dry_run", "fresh") if getattr(self.args, name)}
        top = Path(__file__).parents[1]
        files = {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*.py")}
        programs = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        parts = {"flags": flags, "data": self.data_sha256, "programs": programs}
        starts_over = self.args.fresh and not self.has_begun.stat().st_size
        return json.dumps(parts | {"starts over": starts_over}).encode()

    def decide(self, fresh: bool) -> bytes:
        """On node 0: decide what to do, as on one machine; return the checkpoint to start from, empty for nothing."""
        folder, world = self.args.model, self.node.world
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock.enter_context(volume_lock(folder))
        todo = self.dry_run or replace(plan.decide(self.requested, fresh, folder), nodes=world)
        if todo.action == "nothing":
            plan.check_data(todo, self.data_sha256, folder)
            say(f"train: {todo.message}")
            return b""
        check_limits(todo.settings)
        batches = batches_per_epoch(todo.settings.batch_size, len(self.training[0][: todo.images]))
        if world > batches:
            hint = "Use fewer nodes, or a smaller --batch-size"
            raise Failure(f"an epoch has {batches} batches, too few for {world} nodes. {hint}", status=2)
        record, shared = self.started = start_or_resume(todo, self.data_sha256, *self.training, folder)
        say(f"train: {todo.message} on {world} node{'s' * (world > 1)} ({todo.settings.as_flags()})")
        return serialize(shared, record)

    def follow(self, start: bytes) -> bytes:
        """On the other nodes: start from the checkpoint of node 0, which must be in the volume of this node too."""
        checkpoint = parse_checkpoint(start, Path("the checkpoint that node 0 has sent"))
        record = checkpoint.record
        check_limits(record.settings)
        if self.args.model:
            check_volume(self.args.model, record, self.node)
        count = self.dry_run.images if self.dry_run else None
        shared = SharedState(record, *(part[:count] for part in self.training))
        restore(shared, checkpoint)
        shared.parameter_sums.zero_()  # node 0 has the sum of the parameters
        self.started = record, shared
        return b""


def check_same(descriptions: list[dict[str, Any]], rank: int) -> bytes:
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


def check_volume(folder: Path, record: Record, node: Node) -> None:
    """Raise Failure if train_results.json is not what node 0 has just written."""
    path, deadline = folder / TRAIN_RESULTS, time.monotonic() + node.timeout
    while not (path.exists() and path.read_bytes() == record.to_json().encode()):
        if time.monotonic() > deadline:
            hint = "Mount one volume on all nodes"
            raise Failure(f"{path} on node {node.rank} is not what node 0 has written to its volume. {hint}")
        time.sleep(0.1)


# The training ---------------------------------------------------------------------------------------------------------


class Nodes:
    """One node among those of a training; alone.py has the same for one machine.

    Its workers train on its share of the batches, and pause to synchronise, after which all nodes have the same
    parameters, and records with the same progress.
    """

    def __init__(self, node: Node, record: Record, shared: SharedState) -> None:
        self.node, self.record, self.shared = node, record, shared
        self.rank, self.world = node.rank, node.world
        self.name, self.resume_hint = f"train: node {node.rank}", ""  # launch.py says how to resume
        shared.peak_lr = record.settings.lr * node.world
        # What all nodes know since the last time: what the workers have done, and how many were killed.
        self.known, self.known_lost = [replace(worker) for worker in record.workers], len(record.lost_workers)
        # What is summed: the parameters; six numbers for each worker of each node, where each node fills in its own, so
        # that all nodes get all; and how many nodes are asked to stop.
        self.sizes = [len(shared.parameters), node.world * len(record.workers) * 6, 1]
        self.sums = torch.zeros(sum(self.sizes))

    def next_sync(self, end_of_epoch: int) -> int:
        """Return the batch before which the nodes synchronise next."""
        return min(end_of_epoch, self.record.batches + self.record.settings.sync_every * self.world)

    def sync(self, workers: Workers) -> bool:
        """Wait for the other nodes, average the parameters, bring the record up to date.

        Return whether a node is asked to stop. Raise Stopped if this one is, and that takes too long, LostNode if
        another node does not come.
        """
        parameters, numbers, stopping = torch.split(self.sums, self.sizes)
        parameters.copy_(self.shared.parameters)
        numbers = numbers.zero_().view(self.world, -1, 6)
        numbers[self.rank] = self.news()
        told = len(self.record.lost_workers)
        stopping.fill_(bool(workers.stop.number))
        self.node.sum(self.sums, workers.watch)
        self.shared.parameters.copy_(parameters.div_(self.world))
        late = self.record.lost_workers[told:]  # killed while this node waited: told next time
        del self.record.lost_workers[told:]
        for rank, rows in enumerate(numbers.tolist()):
            if rank != self.rank:
                add_to_record(self.record, rank, rows)
        self.known, self.known_lost = [replace(worker) for worker in self.record.workers], len(self.record.lost_workers)
        self.record.lost_workers += late
        return bool(stopping.item())

    def news(self) -> torch.Tensor:
        """Return what each worker of this node has done since the last time: float32 [workers, 6].

        Renumber killed ones among those of all nodes. The numbers are images, steps, sum of losses, seconds waited, and
        the signal that killed it and the batch that it had, if it was killed. The batch, from 1, is counted from then,
        since float32 has no large integers.
        """
        now, known = (
            torch.tensor([astuple(worker)[1:] for worker in each], dtype=torch.float64)
            for each in (self.record.workers, self.known)
        )
        numbers = torch.zeros(len(now), 6)
        numbers[:, :4] = now - known
        for lost in self.record.lost_workers[self.known_lost :]:
            batch = 0 if lost.batch is None else lost.batch - self.record.batches + 1
            numbers[lost.rank, 4:] = torch.tensor([lost.signal, batch])
            lost.rank += self.rank * len(numbers)
        return numbers

    def sum(self, values: torch.Tensor, workers: Workers) -> torch.Tensor:
        """Return the sums of the values over the nodes."""
        self.node.sum(values, workers.watch)
        return values

    def stopped(self, stop: StopRequest) -> Exception:
        """Return what ends this node, since one was asked to stop: Stopped if this one is asked too, else LostNode."""
        deadline = time.monotonic() + SIGNALS_SECONDS
        while not stop.number and time.monotonic() < deadline:
            time.sleep(0.01)
        return Stopped(stop.number, SAVED) if stop.number else LostNode("another node was stopped")

    def publish(self, publish_model: Callable[[], None]) -> None:
        """Check that all nodes have the same parameters, publish the model of node 0, and disconnect.

        Raise SharedFailure, on all nodes, if they differ or if the model cannot be published.
        """
        node, digest = self.node, hashlib.sha256(self.shared.parameters.numpy().tobytes()).hexdigest()
        took = f"{node.sums} averagings took {node.seconds:.2f} s"
        say(f"train: node {node.rank} of {node.world}: {took}; sha256 {digest}")

        def publish() -> bytes:
            if len({*digests}) > 1:
                raise Failure(f"the parameters of the nodes differ. {FRESH_HINT}")
            if self.rank == 0:
                publish_model()
            return b""

        try:
            digests = node.exchange("parameters", digest.encode)
            node.exchange("publication", publish)
        finally:
            node.end_group()


def add_to_record(record: Record, rank: int, rows: list[list[float]]) -> None:
    """Add what the workers of another node have done since the last time. Those of equal rank share a line."""
    for worker, (images, steps, loss_sum, waited, number, batch) in zip(record.workers, rows, strict=True):
        worker.add(int(images), int(steps), loss_sum, waited)
        if number:
            at = record.batches + int(batch) - 1 if batch else None
            record.lost_workers.append(LostWorker(rank * len(rows) + worker.rank, int(number), at))
