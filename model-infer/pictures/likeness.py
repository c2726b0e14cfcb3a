"""How like the training images an image is: its distance from those that are predicted alike.

The distance is 1 minus the cosine of the angle between the features of the image and those of the nearest training
image, after Sun et al. (2022), "Out-of-Distribution Detection with Deep Nearest Neighbors". They compare with all
training images; comparing with those predicted alike takes a tenth of the time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

KNOWN_IMAGES = 11_000  # training images, at most, that an image is compared with
FLAGGED_FRACTION = 0.006  # of the validation images, at most, are predicted as UNLIKE
LIKE_FRACTION = 0.93  # of the validation images are so near to the training images that they may be sure


class Likeness(NamedTuple):
    """The training images' features, and the distances that are like and unlike."""

    known: Sequence[torch.Tensor]  # of each class: the features of the images predicted as it, float32 [F, N]
    squared_length: float  # of an image's features: the number of layers that they are from
    unlike: float = 1.0  # the cosine distance beyond which an image is UNLIKE: the unit of distances()
    like: float = 1.0  # the distance, in that unit, up to which a prediction may be sure

    def distances(self, log_probabilities: torch.Tensor, features: torch.Tensor) -> list[float]:
        """Return the distances of images from the training images: 1 is that beyond which they are UNLIKE.

        Images are given by what Predictor.forward() returns: float32 [N, classes] and float32 [N, F].
        """
        pairs = zip(features, log_probabilities.argmax(1).tolist(), strict=True)
        nearest = [(one @ self.known[n]).max().item() if self.known[n].numel() else 0.0 for one, n in pairs]
        return [(1 - cosine / self.squared_length) / self.unlike for cosine in nearest]


def learn_likeness(
    training: tuple[torch.Tensor, torch.Tensor], validation: tuple[torch.Tensor, torch.Tensor]
) -> Likeness:
    """Return the likeness to some training images, with the limits that the validation images give.

    Both are given as by Predictor.forward(): log-probabilities, float32 [N, classes], and features, float32 [N, F].
    """
    log_probabilities, features = training
    predictions, classes = log_probabilities.argmax(1), range(log_probabilities.shape[1])
    known = [features[predictions == number].T.contiguous() for number in classes]
    likeness = Likeness(known, (features[0] @ features[0]).item())
    distances = sorted(likeness.distances(*validation))  # in units of likeness.unlike, which is still 1
    # One image fewer than the fraction: in batches, distances differ in the last bits from those of single images.
    unlike = max(distances[-max(1, int(FLAGGED_FRACTION * len(distances)))], 1e-6)
    return likeness._replace(unlike=unlike, like=distances[int(LIKE_FRACTION * (len(distances) - 1))] / unlike)
