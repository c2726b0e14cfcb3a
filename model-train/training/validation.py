"""The validation of a model: its loss and accuracy on images that no worker trains on."""

import torch
from torch.nn.functional import nll_loss

import net
from stage.files import FRESH_HINT
from stage.process import Failure


def validate(model: net.Net, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the losses, the number of correct predictions, and that of images: float64 [3].

    Raise Failure if the outputs of the model are not finite.
    """
    log_probabilities = net.predict(model, images)
    if not log_probabilities.isfinite().all():
        raise Failure(f"the model's outputs are not finite: try a smaller --lr. {FRESH_HINT}")
    loss = nll_loss(log_probabilities, labels, reduction="sum")
    correct = (log_probabilities.argmax(1) == labels).sum()
    return torch.tensor([loss, correct, len(labels)], dtype=torch.float64)
