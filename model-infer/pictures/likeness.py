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
    unlike: float  # the cosine distance beyond which an image is UNLIKE: the unit of distances()
    like: float  # the distance, in that unit, up to which a prediction may be sure

    def distances(self, log_probabilities: torch.Tensor, features: torch.Tensor) -> list[float]:
        """Return the distances of images from the training images: 1 is that beyond which they are UNLIKE.

        Images are given by what Predictor.forward() returns: float32 [N, classes] and float32 [N, F].
        """
        pairs = zip(features, log_probabilities.argmax(1).tolist(), strict=True)
        largest = [largest_products(one[None], self.known[number]).item() for one, number in pairs]
        return [(1 - product / self.squared_length) / self.unlike for product in largest]


def learn_likeness(
    training: tuple[torch.Tensor, torch.Tensor], validation: tuple[torch.Tensor, torch.Tensor]
) -> Likeness:
    """Return the likeness to some training images, with the limits that the validation images give.

    Both are given as by Predictor.forward(): log-probabilities, float32 [N, classes], and features, float32 [N, F].
    """
    known, others = (by_class(*images) for images in (training, validation))
    known = [features.T.contiguous() for features in known]
    squared_length = (training[1][0] @ training[1][0]).item()
    largest = torch.cat([largest_products(*pair) for pair in zip(others, known, strict=True)])
    distances = sorted((1 - largest / squared_length).tolist())
    # One image fewer than the fraction: in batches, distances differ in the last bits from those of single images.
    unlike = max(distances[-max(1, int(FLAGGED_FRACTION * len(distances)))], 1e-6)
    return Likeness(known, squared_length, unlike, distances[int(LIKE_FRACTION * (len(distances) - 1))] / unlike)


def by_class(log_probabilities: torch.Tensor, features: torch.Tensor) -> list[torch.Tensor]:
    """Return the features, float32 [N, F], of the images that are predicted as each class."""
    predictions = log_probabilities.argmax(1)
    return [features[predictions == number] for number in range(log_probabilities.shape[1])]


def largest_products(features: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the largest scalar product of each image's features, float32 [N, F], with known ones, float32 [F, K]."""
    return (features @ known).amax(1) if known.numel() else features.new_zeros(len(features))
