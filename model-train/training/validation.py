"""The validation of a model: its loss and accuracy on images that no worker trains on."""

import torch
from torch.nn.functional import nll_loss

import net
from hogwild import SharedState
from stage.files import FRESH_HINT
from stage.process import Failure
from training.record import Record


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
