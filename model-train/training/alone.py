"""What nodes do together, for a machine that trains alone: nothing, or almost. cluster/nodes.py has it for several."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import nll_loss

import net
from hogwild import SharedState
from stage.files import FRESH_HINT
from stage.process import Failure
from training.record import Record
from training.stopping import RESUME_HINT, Stopped, StopRequest

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

    def leave(self, stop: StopRequest) -> None:
        """End this node, since one was asked to stop; the progress must be saved. Raise Stopped."""
        raise Stopped(stop.number, saved=True)

    def average_last_batches(self, workers: "Workers") -> None:
        """Replace the parameters by their mean over the last batches, if these are averaged."""
        self.shared.load_mean()

    def validate(self, workers: "Workers") -> tuple[float, float]:
        """Return loss and accuracy (percent) of the current model on the validation images."""
        return validate(self.record, self.shared, self.validation)

    def publish(self, publish_model: Callable[[], None]) -> None:
        """Publish the model."""
        publish_model()


def validate(record: Record, shared: SharedState, validation: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Return loss and accuracy (percent) of the current model on images, uint8 [N, 28, 28], and their labels.

    Raise Failure if the outputs of the model are not finite.
    """
    images, labels = validation
    log_probabilities = net.predict(shared.model, images)
    if not log_probabilities.isfinite().all():
        raise Failure(f"the model's outputs are not finite. Settings: {record.settings.as_flags()}. {FRESH_HINT}")
    accuracy = 100 * (log_probabilities.argmax(1) == labels).float().mean().item()
    return nll_loss(log_probabilities, labels).item(), accuracy
