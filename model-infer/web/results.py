"""Collects the pipeline's results in the volume for the page: training, evaluation, predictions.

Reads   MODEL/train_results.json, eval_results.json, predictions.json, mistakes.png, results/*.png, on every request

A part that is missing or damaged is None. The files are not trusted: numbers are checked, and no text is passed on.
"""

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stage.dataset import DATA_SET, batches_per_epoch
from stage.files import EVAL_RESULTS, MISTAKES, PREDICTIONS, RESULTS, TRAIN_RESULTS, read_limited
from stage.process import Failure

MAX_JSON_BYTES = 10_000_000
MAX_PICTURE_BYTES = 5_000_000
RUNNING_SECONDS = 30  # train saves its progress every 3 s; if it has not for this long, it has stopped
PICTURE_NAME = re.compile(r"[0-9]{1,9}_[0-9]{1,9}\.png")


def read_results(folder: Path, sha256: str | None) -> dict[str, Any]:
    """Return everything that the results view shows; sha256 is that of the served model."""
    return {
        "classes": DATA_SET.classes,
        "training": read_part(folder / TRAIN_RESULTS, as_training),
        "evaluation": read_part(folder / EVAL_RESULTS, as_evaluation, sha256),
        "predictions": read_part(folder / PREDICTIONS, as_predictions, sha256),
        "mistakes": url_of(folder / MISTAKES),
    }


def read_part(path: Path, convert: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any] | None:
    """Read a JSON file and convert its content; return None if it is missing or damaged."""
    try:
        part = convert(path, json.loads(read_limited(path, MAX_JSON_BYTES, "")), *arguments)
        json.dumps(part, allow_nan=False)  # raises ValueError if a forged number has made another one infinite
        return part
    except (Failure, OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def as_training(path: Path, content: Any) -> dict[str, Any]:
    """Return the state, progress and history of a training: mean negative log-likelihoods, accuracies in percent."""
    epochs, batch_size = number(content["settings"]["epochs"]), number(content["settings"]["batch_size"])
    images = int(number(content["training_images"]))
    progress = min(1.0, number(content["batches"]) / (epochs * batches_per_epoch(int(batch_size), images)))
    speed, finished = number(content["images_per_second"]), content["finished"] is True
    names = ("epoch", "train_loss", "validation_loss", "validation_accuracy", "seconds")
    age = abs(time.time() - path.stat().st_mtime)  # a clock that was wrong may have dated it ahead
    return {
        "state": "finished" if finished else "running" if age < RUNNING_SECONDS else "stopped",
        "epochs": epochs,
        "processes": number(content["settings"]["num_processes"]),
        "progress": 1.0 if finished else progress,
        "images_per_second": speed,
        "seconds": number(content["seconds"]),
        "seconds_left": (1 - progress) * epochs * images / speed if speed else None,
        "history": [{name: number(line[name]) for name in names} for line in content["history"]],
    }


def as_evaluation(path: Path, content: Any, sha256: str | None) -> dict[str, Any]:
    """Return accuracy (percent), loss and confusion matrix (row: true class, column: predicted) on the test images."""
    classes = range(len(DATA_SET.classes))
    return {
        "accuracy": number(content["Accuracy"]),
        "loss": number(content["Test loss"]),
        "confusion_matrix": [
            [number(content["confusion_matrix"][true][other]) for other in classes] for true in classes
        ],
        "of_this_model": content["model_sha256"] == sha256,
    }


def as_predictions(path: Path, content: Any, sha256: str | None) -> dict[str, Any]:
    """Return the test images that infer predicted, each with the URL of its picture."""
    samples = []
    for sample in content["predictions"]:
        index, prediction, truth = (int(number(sample[name])) for name in ("index", "prediction", "truth"))
        part = {"index": index, "prediction": prediction, "truth": truth}
        picture = url_of(path.parent / RESULTS / f"{prediction}_{index}.png")
        samples.append(part | {"probability": number(sample["probabilities"][prediction]), "picture": picture})
    return {"samples": samples, "of_this_model": content["model_sha256"] == sha256}


def number(value: Any) -> float | int:
    """Return a value if it is a number from 0 to 1e15; raise ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ValueError(f"{value!r} is not a number in the expected range")
    return value


def url_of(path: Path) -> str | None:
    """Return the URL of a picture, relative to that of /results: the service may be under a prefix of a proxy.

    It has the file's time, so that a new picture gets a new URL. Return None if there is no picture.
    """
    with suppress(OSError):
        return f"results/{path.name}?of={path.stat().st_mtime_ns}"
    return None


def read_picture(folder: Path, name: str) -> bytes | None:
    """Read mistakes.png or a picture of results/ by its name; return None for any other name, or a missing file."""
    if name == MISTAKES or PICTURE_NAME.fullmatch(name):
        with suppress(Failure):
            path = folder / name if name == MISTAKES else folder / RESULTS / name
            return bytes(read_limited(path, MAX_PICTURE_BYTES, ""))
    return None
