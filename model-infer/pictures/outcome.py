"""What is found on a picture, as infer writes it and serve returns it."""

from typing import Literal, NotRequired, TypedDict

from stage.dataset import DATA_SET

MAX_DIGITS = 20  # on a picture; with more, it is a texture

Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are excluded
Confidence = Literal["sure", "unsure", "no digit", "out of distribution"]
# Of an image unlike those that the network was trained on.
UNLIKE: Confidence = "no digit" if DATA_SET.preparation == "digit" else "out of distribution"
CONFIDENCES: tuple[Confidence, ...] = (UNLIKE, "unsure", "sure")


class Prediction(TypedDict):
    """The prediction of an image."""

    prediction: int | None  # the class; None for UNLIKE
    probabilities: list[float]  # of the classes, in their order
    confidence: Confidence


class Digit(Prediction):
    """A digit, or something else that was written, which is predicted as UNLIKE."""

    box: Box  # in pixels of the picture, upright


class Reading(Prediction):
    """What is written on a picture.

    Of several digits, the prediction is None, probabilities and confidence are those of the digit that is least sure.
    """

    digits: NotRequired[list[Digit]]  # from left to right; only where the data set's images are digits
