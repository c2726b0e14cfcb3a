"""Predicts one image: the classes' probabilities, and whether the prediction is sure, unsure, or "no digit".

Reads   MODEL/mnist_cnn.pt: the model; MODEL/eval_results.json, if it exists; DATA/MNIST/raw: the raw training files

Images are predicted one at a time, on one thread. So the same pixels get the same probabilities, to the last bit,
whether they come from the test images, a file or an HTTP request.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch

import net
from stage import code, files, weights
from stage.dataset import DATA_SET
from stage.files import EVAL_RESULTS
from stage.images import read_images, split_validation
from stage.process import Failure, percent

MAX_RESULTS_BYTES = 1_000_000  # eval_results.json takes 4 kB
FLAGGED_FRACTION = 0.01  # of the validation images, at most, are predicted as UNLIKE
SURE_PROBABILITY = 0.9  # a prediction is sure from this probability on

Confidence = Literal["sure", "unsure", "no digit", "out of distribution"]
# Of an image unlike those that the network was trained on.
UNLIKE: Confidence = "no digit" if DATA_SET.preparation == "digit" else "out of distribution"


class Prediction(TypedDict):
    """The prediction of an image."""

    prediction: int | None  # the class; None for UNLIKE
    probabilities: list[float]  # of the classes, in their order
    confidence: Confidence


@dataclass
class Predictor:
    """A model, ready to predict."""

    model: net.Net
    sha256: str  # of the model's file
    accuracy: float | None = None  # on the test images, in percent; None if it has not been evaluated
    threshold: float | None = None  # an image with a lower energy is UNLIKE; None: no image is

    def __post_init__(self) -> None:
        self.model.eval()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities, float32 [N, classes], and energies, float32 [N], of images, uint8 [N, H, W...].

        Raise Failure if they are not finite: huge weights, finite themselves, overflow.
        """
        torch.set_num_threads(1)  # applies to the calling thread; with more, the last bits differ, and it is slower
        with torch.inference_mode():
            logits = self.model.logits(net.to_input(images))
            log_probabilities = logits.log_softmax(1)
        if not log_probabilities.isfinite().all():
            raise Failure(f"the model's output is not finite. {files.FRESH_HINT}")
        return log_probabilities, energy(logits)

    def predict(self, image: torch.Tensor) -> Prediction:
        """Predict an image, uint8 [H, W] or [H, W, C]."""
        log_probabilities, energies = self.forward(image[None])
        probabilities = log_probabilities[0].exp().tolist()
        prediction = probabilities.index(max(probabilities))
        confidence: Confidence = "sure" if probabilities[prediction] >= SURE_PROBABILITY else "unsure"
        if self.threshold is not None and energies.item() < self.threshold:
            return {"prediction": None, "probabilities": probabilities, "confidence": UNLIKE}
        return {"prediction": prediction, "probabilities": probabilities, "confidence": confidence}

    def evaluation(self) -> str:
        """Return a sentence on how good the model is."""
        if self.accuracy is None:
            return "this model has not been evaluated"
        return f"this model has {percent(self.accuracy)} accuracy on the test images"

    def as_json(self, predictions: Sequence[Mapping[str, object]]) -> bytes:
        """Return predictions as JSON, with the sha256 and the accuracy (percent) of the model."""
        content = {"model_sha256": self.sha256, "evaluated_accuracy": self.accuracy, "predictions": predictions}
        return json.dumps(content, indent=1).encode()


def energy(logits: torch.Tensor) -> torch.Tensor:
    """Return the energies, float32 [N], for logits, float32 [N, classes]: high for images like the training images.

    This is the negative free energy, at temperature 1, of Liu et al. (2020), "Energy-based Out-of-distribution
    Detection".
    """
    return logits.logsumexp(1)


def load_predictor(model_folder: Path, data_folder: Path | None = None) -> Predictor:
    """Load the model from the volume; with a data folder, find its threshold on the validation images.

    Raise Failure if the model is missing, damaged or of another network, or if the training images cannot be read.
    """
    model = net.Net()
    sha256 = weights.load_model(model, model_folder)
    code.check_same(model_folder, sha256)
    predictor = Predictor(model, sha256, read_accuracy(model_folder / EVAL_RESULTS, sha256))
    if data_folder is not None:
        _, (validation, _) = split_validation(*read_images(data_folder, "train"))
        predictor.threshold = find_threshold(predictor, validation)
    return predictor


def find_threshold(predictor: Predictor, images: torch.Tensor) -> float:
    """Return the energy below which fewer than FLAGGED_FRACTION of the images, uint8 [N, H, W] or [N, H, W, C], lie."""
    energies = torch.cat([predictor.forward(batch)[1] for batch in torch.split(images, 500)])
    # One image fewer than the fraction: in batches, energies differ in the last bits from those of single images.
    return energies.sort().values[max(0, int(FLAGGED_FRACTION * len(images)) - 1)].item()


def read_accuracy(path: Path, sha256: str) -> float | None:
    """Return the accuracy, in percent, from eval_results.json; None unless it is that of the model with this sha256."""
    try:
        results = json.loads(files.read_limited(path, MAX_RESULTS_BYTES, ""))
        if results["model_sha256"] == sha256 and 0 <= results["Accuracy"] <= 100:
            return float(results["Accuracy"])
    except (Failure, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
