"""The infer stage: predicts a few random test images, or the user's own pictures, and draws the predictions.

Reads   DATA: the test images; MODEL/mnist_cnn.pt: the model
        MODEL/train_results.json, eval_results.json, if they are there: the code it was trained with, its accuracy
Writes  MODEL/results/{predicted}_{index}.png: a picture of each sample; those of earlier runs are removed
        MODEL/predictions.json: index, prediction, true class and probabilities of each; the model and its accuracy
        MODEL/predictions.png: all samples on one sheet

With pictures, by their paths in DATA, it reads those and the training images, and writes instead:
        MODEL/own/{predicted}_{stem}.png: a picture of each prediction; those of earlier runs are removed
        MODEL/own/predictions.json: file, digits, probabilities and confidence of each; the model and its accuracy

    docker compose run --rm infer
    docker compose run --rm infer photo.png 'scans/*.jpg'
    python model-infer/infer.py --data data --model model --samples 8 --seed 1
"""

from stage import limits, locks, process

SAMPLES = 5
BASE_MEMORY, SAMPLE_MEMORY = 211_500_000, 700_000  # bytes that infer needs, in all and for each sample; measured

if __name__ == "__main__":
    # Before the other imports: a signal during them would end in a traceback, and a lack of memory in a silent kill.
    process.prepare_process()
    with process.exit_on_failure("infer"):
        limits.check_memory(BASE_MEMORY + SAMPLES * SAMPLE_MEMORY, "infer")  # again when the flags are known

import argparse
import math
import random
from typing import TypedDict

import torch

from pictures import own, prediction
from stage import files, flags, folders
from stage.dataset import DATA_SET
from stage.figures import BLUE, VERMILION, as_png, new_figure
from stage.files import PREDICTIONS, PREDICTIONS_SHEET, RESULTS, publish
from stage.images import read_images
from stage.output import percent, say

# Creates a container of infer if there is none, as after `run --rm`, to copy from. An old `out` would keep its files.
COPY_COMMAND = "docker compose up --no-start --no-deps infer && docker compose cp infer:/opt/mount/model/. out"
MAX_SAMPLES = 100  # more would not fit on a readable sheet


class Sample(TypedDict):
    """A test image, by its index, with predicted class, true class and the probabilities of all classes."""

    index: int
    prediction: int
    truth: int
    probabilities: list[float]


def main() -> int:
    """Run the stage and return its exit status."""
    process.imports_done()
    args = parse_args()
    with process.exit_on_failure("infer"):
        limits.check_threads(4)  # test images are predicted on one thread; pictures need one more for each core
        status = own.predict_pictures(args.pictures, args.data, args.model) if args.pictures else predict_samples(args)
        if args.model == files.MODEL:
            say(f"infer: copy all files out of the volume into a new folder, out, with: {COPY_COMMAND}")
    return status


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    description = "Predicts random test images, or your own pictures, with the trained model."
    parser = flags.new_parser("infer", description)
    text = "picture of digits, by its path in the data folder; * and ? match any characters (default: test images)"
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=text)
    text = f"number of test images (1 to {MAX_SAMPLES}; default: {SAMPLES})"
    parser.add_argument("--samples", type=flags.integer(1, MAX_SAMPLES), metavar="N", help=text)
    text = "seed for choosing the images (default: different images each time)"
    parser.add_argument("--seed", type=flags.integer(0, 2**32 - 1), metavar="N", help=text)
    flags.add_folder_flags(parser)
    args = parser.parse_args()
    for flag in ("samples", "seed"):
        if args.pictures and getattr(args, flag) is not None:
            parser.error(f"--{flag} is for test images, not for pictures")
    return args


def predict_samples(args: argparse.Namespace) -> int:
    """Predict random test images, publish the predictions, and return the exit status."""
    count = args.samples or SAMPLES
    limits.check_memory(BASE_MEMORY + count * SAMPLE_MEMORY, f"infer with {count} samples")
    files.check_destinations(args.model, PREDICTIONS, PREDICTIONS_SHEET)
    folders.check_destination(args.model / RESULTS)
    predictor = prediction.load_predictor(args.model)
    images, labels = read_images(args.data, "test")
    indices = choose(len(images), count, args.seed)
    samples: list[Sample] = []
    for index in indices:
        probabilities = predictor.predict(images[index])["probabilities"]
        best = probabilities.index(max(probabilities))
        samples.append(
            {"index": index, "prediction": best, "truth": int(labels[index]), "probabilities": probabilities}
        )
    pictures = {
        f"{sample['prediction']}_{sample['index']}.png": draw([sample], images[sample["index"]][None])
        for sample in samples
    }
    sheet, content = draw(samples, images[indices]), predictor.as_json(samples)
    with locks.publishing(args.model):
        folders.replace_folder(args.model / RESULTS, pictures)
        publish(args.model / PREDICTIONS_SHEET, sheet)
        publish(args.model / PREDICTIONS, content)
    say(as_text(samples))
    say(f"infer: {predictor.evaluation()}")
    return 0


def choose(count: int, samples: int, seed: int | None) -> list[int]:
    """Choose different images, or all if there are fewer: return their indices, below count."""
    return random.Random(seed).sample(range(count), min(samples, count))


def draw(samples: list[Sample], images: torch.Tensor) -> bytes:
    """Draw samples and their images, uint8 [N, H, W] or [N, H, W, C], on one sheet, as a PNG."""
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
        color = BLUE if predicted == true else VERMILION
        confidence = percent(100 * max(sample["probabilities"]), 1)
        center = left + 0.5 * width
        lines = (0.09, 17, f"predicted {predicted}"), (0.2, 10, f"{confidence}, true class {true}")
        for down, size, text in lines:  # in a smaller size where names are long
            fontsize = min(size, 290 / len(text))
            figure.text(center, top - down * height, text, fontsize=fontsize, color=color, ha="center", va="center")
    return as_png(figure)


def as_text(samples: list[Sample]) -> str:
    """Format the predictions for the terminal."""
    lines = []
    for sample in samples:
        predicted, true = (DATA_SET.classes[sample[key]] for key in ("prediction", "truth"))
        confidence = percent(100 * max(sample["probabilities"]), 1)
        verdict = "correct" if predicted == true else f"wrong (true class: {true})"
        lines.append(f"infer: test image {sample['index']:4}: predicted {predicted} ({confidence}), {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    process.end_process(main())
