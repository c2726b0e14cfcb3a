"""Predicts one image: the classes' probabilities, and whether the prediction is sure, unsure, or "no digit".

Reads   MODEL/mnist_cnn.pt: the model; DATA: the training images
        MODEL/train_results.json, eval_results.json, if they are there: the code it was trained with, its accuracy

Images are predicted one at a time, on one thread. So the same pixels get the same probabilities, to the last bit,
whether they come from the test images, a file or an HTTP request.
"""

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import normalize

import net
from pictures.likeness import KNOWN_IMAGES, Likeness, learn_likeness
from pictures.outcome import UNLIKE, Confidence, Prediction
from stage import files, weights
from stage.images import read_images, split_validation
from stage.limits import count_cores
from stage.output import percent
from stage.process import Failure

MAX_RESULTS_BYTES = 1_000_000  # eval_results.json takes 4 kB
MAX_FEATURES = 512  # of a layer that is compared
SURE_PROBABILITY = 0.9  # a prediction is sure from this probability on


class NotFinite(Failure):
    """The model's output is not finite, which is not the image's fault."""


@dataclass
class Predictor:
    """A model, ready to predict."""

    model: net.Net
    sha256: str  # of the model's file
    accuracy: float | None = None  # on the test images, in percent; None if it has not been evaluated
    likeness: Likeness | None = None  # None: no image is UNLIKE

    def __post_init__(self) -> None:
        self.model.eval()
        self.thread = threading.local()
        self.thread.layers = []  # that are compared, of the thread's last forward pass
        linear = [module for module in self.model.modules() if isinstance(module, torch.nn.Linear)]
        for module in linear[:1]:
            module.register_forward_pre_hook(lambda _, inputs: self.thread.layers.append(inputs[0].to_dense()))
        for module in linear:
            module.register_forward_hook(lambda _, inputs, output: self.thread.layers.append(output.to_dense()))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities, float32 [N, classes], and features, float32 [N, F], of images, uint8 [N, ...].

        Raise NotFinite if the log-probabilities are not: huge weights, finite themselves, overflow.
        """
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # oneDNN takes twice as long for one
        try:
            return self.outputs_of(self.model, images)
        finally:
            torch.backends.mkldnn.enabled = True  # type: ignore[assignment]

    def forward_many(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what forward() does, but for the last bits; of many images in less time."""
        forward = net.fastest_forward(self.model, images[:16])
        with ThreadPoolExecutor(count_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = [*pool.map(partial(self.outputs_of, forward), torch.split(images, 250))]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    @torch.inference_mode()
    def outputs_of(
        self, forward: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and features as forward() does, given a function that the model computes.

        The features are the inputs of the first linear layer and the outputs of all, those of each scaled to length 1.
        """
        self.thread.layers = []
        log_probabilities = forward(net.to_input(images))
        if not math.isfinite(log_probabilities.sum()):
            raise NotFinite(f"the model's output is not finite. {files.FRESH_HINT}")
        layers = [layer for layer in self.thread.layers if layer.dim() == 2 and layer.shape[1] <= MAX_FEATURES]
        return log_probabilities, torch.cat([normalize(layer) for layer in layers or [log_probabilities]], 1)

    def distances(self, log_probabilities: torch.Tensor, features: torch.Tensor) -> list[float]:
        """Return the distances of images, given what forward() returns, from the training images; UNLIKE beyond 1."""
        return self.likeness.distances(log_probabilities, features) if self.likeness else [0.0] * len(features)

    def predict(self, image: torch.Tensor) -> Prediction:
        """Predict an image, uint8 [H, W] or [H, W, C]."""
        return self.assess(image)[0]

    def assess(self, image: torch.Tensor) -> tuple[Prediction, float]:
        """Predict an image, uint8 [H, W] or [H, W, C], and return also its distance from the training images."""
        log_probabilities, features = self.forward(image[None])
        (distance,) = self.distances(log_probabilities, features)
        probabilities = log_probabilities[0].exp().tolist()
        prediction = probabilities.index(max(probabilities))
        is_like = not self.likeness or distance <= self.likeness.like
        is_sure = probabilities[prediction] >= SURE_PROBABILITY and is_like
        confidence: Confidence = UNLIKE if distance > 1 else "sure" if is_sure else "unsure"
        known = None if confidence == UNLIKE else prediction
        return {"prediction": known, "probabilities": probabilities, "confidence": confidence}, distance

    def evaluation(self) -> str:
        """Return a sentence on how good the model is."""
        if self.accuracy is None:
            return "this model has not been evaluated"
        return f"this model has {percent(self.accuracy)} accuracy on the test images"

    def as_json(self, predictions: Sequence[Mapping[str, object]]) -> bytes:
        """Return predictions as JSON, with the sha256 and the accuracy (percent) of the model."""
        content = {"model_sha256": self.sha256, "evaluated_accuracy": self.accuracy, "predictions": predictions}
        return json.dumps(content, indent=1).encode()


def load_predictor(model_folder: Path, data_folder: Path | None = None) -> Predictor:
    """Load the model from the volume; with a data folder, find what the training images are like.

    Raise Failure if the model is missing, damaged or of another network, or if the training images cannot be read.
    """
    torch.set_num_threads(1)  # with more, the last bits differ, and a single image takes longer
    model = net.Net()
    sha256 = weights.load_model(model, model_folder)
    predictor = Predictor(model, sha256, read_accuracy(model_folder / files.EVAL_RESULTS, sha256))
    if data_folder is not None:
        (training, _), (validation, _) = split_validation(*read_images(data_folder, "train"))
        some = training[:: -(-len(training) // KNOWN_IMAGES)]
        predictor.likeness = learn_likeness(predictor.forward_many(some), predictor.forward_many(validation))
    return predictor


def read_accuracy(path: Path, sha256: str) -> float | None:
    """Return the accuracy, in percent, from eval_results.json; None unless it is that of the model with this sha256."""
    try:
        results = json.loads(files.read_limited(path, MAX_RESULTS_BYTES, ""))
        if results["model_sha256"] == sha256 and 0 <= results["Accuracy"] <= 100:
            return float(results["Accuracy"])
    except (Failure, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
