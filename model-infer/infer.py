"""Predicts a few random test images with the trained model, and draws them with their predictions.

Reads   DATA/MNIST/raw: the raw test files; MODEL/mnist_cnn.pt: the model; MODEL/eval_results.json, if it is there
Writes  MODEL/results/{predicted}_{index}.png: a picture of each sample; those of earlier runs are removed
        MODEL/predictions.json: index, prediction, true class and ten probabilities of each; the model and its accuracy
        MODEL/predictions.png: all samples on one sheet

    docker compose run --rm infer
    python model-infer/infer.py --data data --model model --samples 8 --seed 1
"""

import process

if __name__ == "__main__":
    # Before the other imports: a signal during them would end in a traceback, and a lack of memory in a silent kill.
    process.prepare_process("infer", needed_memory=215_000_000)  # for the default, 5 samples; main() checks again

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypedDict

import artifacts
import net
import torch
from artifacts import (
    DATA_SET,
    EVAL_RESULTS,
    PREDICTIONS,
    PREDICTIONS_SHEET,
    RESULTS,
    WRITE_HINTS,
    as_png,
    new_figure,
    publish,
    removal_hint,
    remove,
)
from process import Failure, exit_on_failure, say

MAX_SAMPLES = 100  # more would not fit on a readable sheet
MAX_RESULTS_BYTES = 1_000_000  # eval_results.json takes 4 kB
BASE_MEMORY, SAMPLE_MEMORY = 211_500_000, 700_000  # bytes that infer needs, in all and for each sample; measured
CORRECT_COLOR, WRONG_COLOR = "#0072b2", "#d55e00"  # told apart by the colour-blind too (Okabe and Ito 2008)


class Sample(TypedDict):
    """A test image, by its index, with predicted class, true class and ten probabilities."""

    index: int
    prediction: int
    truth: int
    probabilities: list[float]


def main() -> int:
    """Run the stage and return its exit status."""
    args = parse_args()
    with exit_on_failure("infer"):
        process.check_memory(BASE_MEMORY + args.samples * SAMPLE_MEMORY, f"infer with {args.samples} samples")
        process.check_threads(2 * process.count_cores() + 2)  # torch's, those of net.predict(), and a margin
        check_destinations(args.model)
        torch.set_num_threads(process.count_cores())
        model, sha256 = net.load_model(args.model)
        images, labels = net.read_split(args.data, "t10k")
        indices = choose(len(images), args.samples, args.seed)
        samples = make_samples(model, images[indices], labels[indices], indices)
        accuracy = read_accuracy(args.model / EVAL_RESULTS, sha256)
        publish_all(args.model, samples, images[indices], sha256, accuracy)
        say(as_text(samples, accuracy, args.model))
    return 0


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="infer", description="Predicts random test images with the trained model.", allow_abbrev=False
    )
    parser.error = partial(process.refuse_flags, "infer")  # type: ignore[method-assign]
    text = f"number of test images (1 to {MAX_SAMPLES}; default: %(default)s)"
    parser.add_argument("--samples", type=integer_in(1, MAX_SAMPLES), default=5, metavar="N", help=text)
    text = "seed for choosing the images (default: different images each time)"
    parser.add_argument("--seed", type=integer_in(0, 2**32 - 1), metavar="N", help=text)
    parser.add_argument("--data", type=Path, default=artifacts.DATA, help="folder of the data (default: %(default)s)")
    text = "folder of the volume's files (default: %(default)s)"
    parser.add_argument("--model", type=Path, default=artifacts.MODEL, help=text)
    return parser.parse_args()


def integer_in(smallest: int, largest: int) -> Callable[[str], int]:
    """Return a parser of integers in a range."""

    def parse(text: str) -> int:
        try:
            if smallest <= int(text) <= largest:
                return int(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text} is not an integer from {smallest} to {largest}")

    return parse


def check_destinations(folder: Path) -> None:
    """Raise Failure if one of infer's files is blocked by something that it does not replace."""
    artifacts.check_destinations(folder, PREDICTIONS, PREDICTIONS_SHEET)
    results = folder / RESULTS
    if results.is_symlink() or (results.exists() and not results.is_dir()):
        raise Failure(f"{results} is not a folder, but the pictures must be written there. {removal_hint(results)}")


def choose(count: int, samples: int, seed: int | None) -> torch.Tensor:
    """Choose different images: return indices below count, int64 [samples]."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return torch.randperm(count, generator=generator)[:samples]


def make_samples(model: net.Net, images: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor) -> list[Sample]:
    """Predict images, uint8 [N, 28, 28], with labels and indices, int64 [N], and return the samples."""
    probabilities = net.predict(model, images).exp()
    rows = zip(indices.tolist(), probabilities.argmax(1).tolist(), labels.tolist(), probabilities.tolist(), strict=True)
    return [{"index": i, "prediction": p, "truth": t, "probabilities": row} for i, p, t, row in rows]


def read_accuracy(path: Path, sha256: str) -> float | None:
    """Return the accuracy (percent) that evaluate has published for this model, or None if it has not evaluated it."""
    try:
        results = json.loads(artifacts.read_limited(path, MAX_RESULTS_BYTES, ""))
        if results["model_sha256"] == sha256 and 0 <= results["Accuracy"] <= 100:
            return float(results["Accuracy"])
    except (Failure, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def publish_all(folder: Path, samples: list[Sample], images: torch.Tensor, sha256: str, accuracy: float | None) -> None:
    """Publish all files of this stage, and remove the pictures of earlier runs."""
    pictures = {
        f"{sample['prediction']}_{sample['index']}.png": draw([sample], image[None])
        for sample, image in zip(samples, images, strict=True)
    }
    sheet = draw(samples, images)
    content = {"model_sha256": sha256, "evaluated_accuracy": accuracy, "predictions": samples}
    lock = folder / ".results.lock"
    try:
        with artifacts.open_locked(lock):  # two runs at once take turns; nothing is written to it
            try:
                replace_folder(folder / RESULTS, pictures)
                publish(folder / PREDICTIONS_SHEET, sheet)
                publish(folder / PREDICTIONS, json.dumps(content, indent=1).encode())
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        hint = WRITE_HINTS.get(error.errno or 0, "Fix the cause, then run it again.")
        raise Failure(f"cannot write {error.filename or folder} ({error.strerror}). {hint}") from None


def replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Replace a folder's contents by files; until all are written, the old ones stay."""
    new, old = (folder.with_name(f".{folder.name}.{which}") for which in ("new", "old"))
    try:
        clean_up(folder, new, old)  # left by a crash
        new.mkdir()
        new.chmod(0o777)  # like the volume's root: a later run under another uid can replace it
        for name, content in files.items():
            publish(new / name, content)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        clean_up(folder, new, old)


def clean_up(folder: Path, new: Path, old: Path) -> None:
    """Restore the old folder if the new one is not in place, and remove what is left over."""
    if old.is_dir() and not old.is_symlink() and not folder.exists():
        old.rename(folder)
    remove(new)
    remove(old)


def draw(samples: list[Sample], images: torch.Tensor) -> bytes:
    """Draw samples and their images, uint8 [N, 28, 28], on one sheet, as a PNG."""
    columns = min(len(samples), 5) if len(samples) <= 10 else 10
    rows = math.ceil(len(samples) / columns)
    figure = new_figure(2.4 * columns, 3 * rows)
    for place, (sample, image) in enumerate(zip(samples, images, strict=True)):
        # The cell of this sample, as fractions of the sheet: left edge, top edge, width, height.
        left, top, width, height = place % columns / columns, 1 - place // columns / rows, 1 / columns, 1 / rows
        axes = figure.add_axes((left + 0.06 * width, top - 0.97 * height, 0.88 * width, 0.704 * height))
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=255)
        axes.axis("off")
        predicted, true = (DATA_SET.classes[sample[key]] for key in ("prediction", "truth"))
        color, confidence = CORRECT_COLOR if predicted == true else WRONG_COLOR, 100 * max(sample["probabilities"])
        center = left + 0.5 * width
        figure.text(
            center, top - 0.09 * height, f"predicted {predicted}", ha="center", va="center", color=color, fontsize=17
        )
        figure.text(
            center,
            top - 0.2 * height,
            f"{confidence:.1f} %, true class {true}",
            ha="center",
            va="center",
            color=color,
            fontsize=10,
        )
    return as_png(figure)


def as_text(samples: list[Sample], accuracy: float | None, folder: Path) -> str:
    """Format the predictions, and say how to copy the files out of the volume."""
    lines = []
    for sample in samples:
        predicted, true = (DATA_SET.classes[sample[key]] for key in ("prediction", "truth"))
        confidence, verdict = (
            100 * max(sample["probabilities"]),
            "correct" if predicted == true else f"wrong (true class: {true})",
        )
        lines.append(f"infer: test image {sample['index']:4}: predicted {predicted} ({confidence:.1f} %), {verdict}")
    if accuracy is None:
        lines.append("infer: this model has not been evaluated")
    else:
        lines.append(f"infer: this model has {accuracy:.2f} % accuracy on the test images")
    if folder == artifacts.MODEL:
        lines.append("infer: copy all files out of the volume with: docker compose cp train:/opt/mount/model/. out")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
