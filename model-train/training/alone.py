"""What the nodes of a training do together, for a machine that trains alone: almost nothing."""

from collections.abc import Callable

import torch

from stage.process import command
from training.stopping import SAVED, Stopped, StopRequest
from training.workers import Workers


class Alone:
    """A machine that trains alone; cluster/nodes.py has the same for one of several."""

    rank, world = 0, 1  # its number, and how many there are
    name, resume_hint = "train", f". Resume with: {command('train')}"  # in messages

    def next_sync(self, end_of_epoch: int) -> int:
        """Return the batch before which the nodes synchronise next."""
        return end_of_epoch

    def sync(self, workers: Workers) -> bool:
        """Synchronise the nodes, whose workers are idle; return whether one of them is asked to stop."""
        return bool(workers.stop.number)

    def sum(self, values: torch.Tensor, workers: Workers) -> torch.Tensor:
        """Return the sums of the values over the nodes; the workers are watched until all nodes have come here."""
        return values

    def stopped(self, stop: StopRequest) -> Exception:
        """Return what ends this node, since one was asked to stop; the progress has been saved."""
        return Stopped(stop.number, SAVED)

    def publish(self, publish_model: Callable[[], None]) -> None:
        """Publish the model."""
        publish_model()
