"""How the nodes of a training talk to each other: PyTorch's torch.distributed, with gloo, over TCP.

Within a node, Hogwild workers update the parameters in shared memory (hogwild.py). Between nodes there is no shared
memory: each has parameters of its own, and every `--sync-every` batches of a node they are replaced by their mean over
the nodes. This is local SGD (Stich 2019, "Local SGD Converges Fast and Communicates Little").

- Averaged are the parameters, 21,840 float32. The velocities of the workers stay local: averaging or clearing them
  brought nothing.
- The learning rate is multiplied by the number of nodes, N. Each node takes 1/N of the batches, and the mean divides
  its steps by N; at N times the rate the nodes together move the parameters as far as one node would.
- The workers must be forked before the first sum(): gloo starts threads, and a process with threads cannot be forked
  safely. Until then, the nodes exchange what they need through the store, a dictionary in the process of node 0.
- Every wait has a time limit, and is left at once when the training is asked to stop.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from cluster.environment import JOIN_TIMEOUT, TIMEOUT
from stage.process import Failure
from training.stopping import RunningClock


class LostNode(Failure):
    """Another node has ended or cannot be reached. torchrun then starts the nodes again, from the last checkpoint."""


class SharedFailure(Failure):
    """A failure that all nodes know of, and that trying again would not change."""


class Node:
    """One node among the others: its `rank`, from 0, and their number, `world`, as torchrun has set them."""

    def __init__(self) -> None:
        self.timeout, self.limit = (int(os.environ.get(*name)) for name in (TIMEOUT, JOIN_TIMEOUT))  # in seconds
        self.sums, self.seconds = 0, 0.0  # calls of sum(), and the time they took
        with self.network():
            found = next(rendezvous("env://", timeout=timedelta(seconds=self.timeout)))
        self.store, self.rank, self.world = found[0], int(found[1]), int(found[2])

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Turn torch's errors of the network, which are RuntimeErrors, into LostNode."""
        try:
            yield
        except RuntimeError:
            raise LostNode("another node has ended, or cannot be reached") from None

    # Until the workers are forked ------------------------------------------------------------------------------------

    def exchange(self, step: str, work: Callable[[], bytes]) -> list[bytes]:
        """Do this node's part of a step, tell the others what came of it, and return what came of it on each node.

        Raise SharedFailure on all nodes if the part of one has raised Failure or OSError.
        """
        try:
            message = b"+" + work()
        except (Failure, OSError) as failure:
            message = b"-" + json.dumps([str(failure), getattr(failure, "status", 1)]).encode()
        self.tell(step, message)
        messages = [self.hear(step, rank) for rank in range(self.world)]
        self.tell(f"{step}, heard", b"+")
        for rank in range(self.world if self.rank == 0 else 0):  # node 0 has the store, so it may not end before
            self.hear(f"{step}, heard", rank)
        for rank, message in enumerate(messages):
            if message.startswith(b"-"):
                text, status = json.loads(message[1:])
                raise SharedFailure(text if rank == self.rank else f"node {rank} failed: {text}", status)
        return [message[1:] for message in messages]

    def tell(self, step: str, message: bytes) -> None:
        """Put this node's message into the store."""
        with self.network():
            self.store.set(f"{step}/{self.rank}", message)

    def hear(self, step: str, rank: int) -> bytes:
        """Wait for a node's message, and return it."""
        key, clock = f"{step}/{rank}", RunningClock()
        # If the network is cut, C++ code may wait for the store forever. Then this signal ends the process.
        signal.alarm(self.limit + self.timeout)
        with self.network():
            while not self.is_there(key):
                if clock.seconds() > self.limit:
                    raise LostNode(f"node {rank} did not get ready within {self.limit} s")
            message = self.store.get(key)
        signal.alarm(0)
        return bytes(message)

    def is_there(self, key: str) -> bool:
        """Return whether the store has a key, after waiting for a moment; Python handles signals in between."""
        try:
            self.store.wait([key], timedelta(seconds=0.5))
        except dist.DistStoreError:
            return False
        return True

    # From then on ----------------------------------------------------------------------------------------------------

    def end_group(self) -> None:
        """Disconnect from the other nodes, or gloo's threads might abort this process at its end."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, values: torch.Tensor, while_waiting: Callable[[], None]) -> None:
        """Replace the values by their sums over all nodes. They must be copies: a lost node leaves them torn.

        Call while_waiting() again and again until the other nodes have come here too.
        """
        began, clock = time.monotonic(), RunningClock()
        with self.network():
            if not dist.is_initialized():
                self.limit = self.timeout  # of hear() at the end: no node is still reading its data
                limit = timedelta(seconds=self.timeout)
                dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.world, timeout=limit)
            work = dist.all_reduce(values, async_op=True)
            while not work.is_completed():
                while_waiting()
                if clock.seconds() > self.timeout:
                    raise LostNode(f"another node did not answer within {self.timeout} s")
                time.sleep(0.0002)
            work.wait()  # raises what went wrong
        self.sums, self.seconds = self.sums + 1, self.seconds + time.monotonic() - began
