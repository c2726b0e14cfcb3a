"""Reads a few random test images with the trained model, and draws what it read.

Reads   DATA/MNIST/raw: the raw test files; MODEL/mnist_cnn.pt: the model
Writes  MODEL/results/{predicted}_{index}.png: a picture of each sample; those of earlier runs are removed
        MODEL/predictions.json: index, prediction, truth and the ten probabilities of each, the model's sha256
        MODEL/predictions.png: all samples on one sheet

    docker compose run --rm infer
    python model-infer/infer.py --data data --model model --samples 8 --seed 1
"""

import artifacts

if __name__ == "__main__":
    artifacts.prepare_process()

import argparse
import io
import json
import math
import sys
from functools import partial
from pathlib import Path

import net
import torch
from artifacts import Failure, exit_on_failure, publish, removal_hint, remove, say

MOST_SAMPLES = 100  # as many as a sheet shows and a person looks at
MAX_RESULTS_BYTES = 1_000_000  # eval_results.json takes 4 kB
MEMORY, SAMPLE_MEMORY = 205_000_000, 700_000  # bytes that a run takes, and with each sample; measured


def main():
    """Runs the stage."""
    args = parse_args()
    with exit_on_failure("infer"):
        artifacts.check_memory(MEMORY + args.samples * SAMPLE_MEMORY, f"infer with {args.samples} samples")
        artifacts.check_threads(2 * artifacts.count_cores() + 2)
        check_destinations(args.model)
        torch.set_num_threads(artifacts.count_cores())
        model, sha256 = net.load_model(args.model / "mnist_cnn.pt")
        images, labels = net.read_split(args.data, "t10k")
        indices = choose(len(images), args.samples, args.seed)
        probabilities = net.predict(model, images[indices]).exp()
        samples = describe(indices, probabilities, labels[indices])
        accuracy = read_accuracy(args.model / "eval_results.json", sha256)
        publish_all(args.model, samples, images[indices], sha256, accuracy)
        say(summary(samples, accuracy, args.model))


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(prog="infer", description="Reads random test images with the trained model.")
    parser.error = partial(artifacts.refuse_flags, "infer")  # type: ignore[method-assign]
    text = f"number of test images (1 to {MOST_SAMPLES}; default: %(default)s)"
    parser.add_argument("--samples", type=within(1, MOST_SAMPLES), default=5, metavar="N", help=text)
    text = "choose the images that this number stands for (default: others every time)"
    parser.add_argument("--seed", type=within(0, 2**32 - 1), metavar="N", help=text)
    parser.add_argument("--data", type=Path, default=artifacts.DATA, help="folder of the data (default: %(default)s)")
    text = "folder of the volume's files (default: %(default)s)"
    parser.add_argument("--model", type=Path, default=artifacts.MODEL, help=text)
    return parser.parse_args()


def within(smallest, largest):
    """A parser of integers from the smallest to the largest."""

    def parse(text):
        try:
            if smallest <= int(text) <= largest:
                return int(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text} is not an integer from {smallest} to {largest}")

    return parse


def choose(count, samples, seed):
    """Indices of different images out of count, int64 [samples]."""
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    return torch.randperm(count, generator=generator)[:samples]


def describe(indices, probabilities, labels):
    """What predictions.json says of each sample."""
    return [
        {"index": index, "prediction": max(range(10), key=row.__getitem__), "truth": truth, "probabilities": row}
        for index, row, truth in zip(indices.tolist(), probabilities.tolist(), labels.tolist(), strict=True)
    ]


def check_destinations(folder):
    """Raises Failure if something that a run does not replace is in the way of its files."""
    artifacts.check_destinations(folder, "predictions.json", "predictions.png")
    results = folder / "results"
    if results.is_symlink() or (results.exists() and not results.is_dir()):
        raise Failure(f"{results} is not a folder, and the pictures must go there. {removal_hint(results)}")


def read_accuracy(path, sha256):
    """The accuracy, in percent, that evaluate found for the model with the sha256; None if it has not evaluated it."""
    try:
        results = json.loads(artifacts.read_limited(path, MAX_RESULTS_BYTES, ""))
        if results["model_sha256"] == sha256 and 0 <= results["Accuracy"] <= 100:
            return float(results["Accuracy"])
    except (Failure, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def publish_all(folder, samples, images, sha256, accuracy):
    """Writes all files of this stage, and removes the pictures of earlier runs."""
    pictures = {
        f"{sample['prediction']}_{sample['index']}.png": draw([sample], [image])
        for sample, image in zip(samples, images, strict=True)
    }
    sheet = draw(samples, images)
    content = {"model_sha256": sha256, "evaluated_accuracy": accuracy, "predictions": samples}
    lock = folder / ".results.part"
    try:
        with artifacts.open_locked(lock):  # two runs at once take turns
            try:
                replace_folder(folder / "results", pictures)
                publish(folder / "predictions.png", sheet)
                publish(folder / "predictions.json", json.dumps(content, indent=1).encode())
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        hint = artifacts.WRITE_HINTS.get(error.errno or 0, "Fix that, then run it again.")
        raise Failure(f"cannot write {error.filename or folder} ({error.strerror}). {hint}") from None


def replace_folder(folder, files):
    """Makes the files, a dict of name and bytes, all that is in a folder; until all are written, the old ones stay."""
    new, old = (folder.with_name(f".{folder.name}.{which}") for which in ("new", "old"))
    try:
        clean_up(folder, new, old)  # what a crash may have left
        new.mkdir()
        new.chmod(0o777)  # as the volume's own folder: whoever owns ./data next can replace it
        for name, content in files.items():
            publish(new / name, content)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        clean_up(folder, new, old)


def clean_up(folder, new, old):
    """Puts the old folder back if the new one did not get to its place, and removes what is left over."""
    if old.is_dir() and not old.is_symlink() and not folder.exists():
        old.rename(folder)
    remove(new)
    remove(old)


def draw(samples, images):
    """The samples and their images, uint8 [28, 28] each, on one sheet, as the bytes of a PNG."""
    from matplotlib.figure import Figure

    columns = min(len(samples), 5) if len(samples) <= 10 else 10
    rows = math.ceil(len(samples) / columns)
    figure = Figure(figsize=(2.4 * columns, 3 * rows))
    for place, (sample, image) in enumerate(zip(samples, images, strict=True)):
        # A cell of the sheet, in parts of the whole: its left edge, its top, and its width and height.
        left, top, width, height = place % columns / columns, 1 - place // columns / rows, 1 / columns, 1 / rows
        axes = figure.add_axes((left + 0.06 * width, top - 0.97 * height, 0.88 * width, 0.704 * height))
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=255)
        axes.axis("off")
        right, sure = sample["prediction"] == sample["truth"], 100 * max(sample["probabilities"])
        title = {"ha": "center", "va": "center", "color": "#1a7f37" if right else "#cf222e"}
        middle = left + 0.5 * width
        figure.text(middle, top - 0.09 * height, f"read as {sample['prediction']}", fontsize=17, **title)
        figure.text(middle, top - 0.2 * height, f"{sure:.1f} % sure, truly {sample['truth']}", fontsize=10, **title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def summary(samples, accuracy, folder):
    """What was read, for a person, and how to get at all the files of the volume."""
    lines = []
    for sample in samples:
        read, truth, sure = sample["prediction"], sample["truth"], 100 * max(sample["probabilities"])
        verdict = "right" if read == truth else f"wrong, it is a {truth}"
        lines.append(f"infer: test image {sample['index']:4} read as a {read}, {sure:.1f} % sure: {verdict}")
    evaluated = "has not been evaluated" if accuracy is None else f"has {accuracy:.2f} % accuracy on the test images"
    lines.append(f"infer: the model {evaluated}")
    if folder == artifacts.MODEL:
        lines.append("infer: copy all files out of the volume with: docker compose cp train:/opt/mount/model/. out")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
