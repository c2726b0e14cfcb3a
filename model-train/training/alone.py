"""What nodes do together, for a machine that trains alone: nothing, or almost. cluster/nodes.py has it for several."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from hogwild import SharedState
from training.record import Record
from training.stopping import RESUME_HINT, Stopped, StopRequest
from training.validation import validate

if TYPE_CHECKING:
    from training.workers import Workers


class Alone:
    """A machine that trains alone. Its workers may pause at any batch."""

    leads = True  # writes to the volume, and says what happens
    world, may_pause = 1, True
    name, resume_hint = "", f". {RESUME_HINT}"  # before and after a message

    def __init__(self, record: Record, shared: SharedState, validation: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.record, self.shared, self.validation = record, shared, validation
        self.own_record, self.first_batch = record, record.batches

    def connect(self) -> None:
        """Connect to the other nodes, once the workers are forked."""

    def next_meeting(self, end_of_epoch: int) -> int:
        """Return the batch before which the nodes meet next."""
        return end_of_epoch

    def meet(self, workers: "Workers") -> bool:
        """Bring the nodes together; the workers must be idle. Return whether a node is asked to stop."""
        return bool(workers.stop.number)

    def stopped(self, stop: StopRequest) -> Stopped:
        """Return what ends this node, since one was asked to stop; the progress must be saved."""
        return Stopped(stop.number, saved=True)

    def average_last_batches(self, workers: "Workers") -> None:
        """Replace the parameters by their mean over the last batches, if these are averaged."""
        self.shared.load_mean()

    def validate(self, workers: "Workers") -> tuple[float, float]:
        """Return loss and accuracy (percent) of the current model on the validation images."""
        return validate(self.record, self.shared, self.validation)

    def publish(self, publish_model: Callable[[], None]) -> None:
        """Publish the model."""
        publish_model()
