"""Judges the trained model on MNIST's 10,000 test images.

Reads   DATA/MNIST/raw: the raw test files; MODEL/mnist_cnn.pt: the model
Writes  MODEL/eval_results.json: test loss, accuracy, figures per digit, confusion matrix, the model's sha256
        MODEL/confusion_matrix.png: the confusion matrix
        MODEL/mistakes.png: the 25 images that the model was most confidently wrong about

    docker compose run --rm evaluate
    python model-eval/evaluate.py --data data --model model --min-accuracy 99

A model that reads fewer images right than --min-accuracy is a failure: exit status 1, and nothing is written.
"""

import artifacts

if __name__ == "__main__":
    artifacts.prepare_process()

import argparse
import io
import json
import sys
from functools import partial
from pathlib import Path

import net
import torch
import torch.nn.functional as F
from artifacts import Failure, exit_on_failure, publish, say

MEMORY = 240_000_000  # bytes that a run takes, measured


def main():
    """Runs the stage."""
    args = parse_args()
    with exit_on_failure("evaluate"):
        artifacts.check_memory(MEMORY, "evaluate")
        artifacts.check_threads(2 * artifacts.count_cores() + 2)
        artifacts.check_destinations(args.model, "eval_results.json", "confusion_matrix.png", "mistakes.png")
        torch.set_num_threads(artifacts.count_cores())
        model, sha256 = net.load_model(args.model / "mnist_cnn.pt")
        images, labels = net.read_split(args.data, "t10k")
        log_probabilities = net.predict(model, images)
        results = judge(log_probabilities, labels) | {"model_sha256": sha256}
        say(summary(results))
        if results["Accuracy"] < args.min_accuracy:
            raise Failure(
                f"an accuracy of {results['Accuracy']:.2f} % is under the {args.min_accuracy:g} % of --min-accuracy: "
                f"nothing is published. Train anew with: docker compose run --rm train --fresh"
            )
        publish(args.model / "confusion_matrix.png", draw_confusion_matrix(results["confusion_matrix"]))
        publish(args.model / "mistakes.png", draw_mistakes(images, labels, log_probabilities))
        publish(args.model / "eval_results.json", json.dumps(results, indent=1).encode())


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(prog="evaluate", description="Judges the trained model on the 10,000 test images.")
    parser.error = partial(artifacts.refuse_flags, "evaluate")  # type: ignore[method-assign]
    text = "least accuracy, in percent of the test images, for exit status 0 (0 to 100; default: %(default)s)"
    parser.add_argument("--min-accuracy", type=parse_percentage, default=95.0, metavar="PERCENT", help=text)
    parser.add_argument("--data", type=Path, default=artifacts.DATA, help="folder of the data (default: %(default)s)")
    text = "folder of the volume's files (default: %(default)s)"
    parser.add_argument("--model", type=Path, default=artifacts.MODEL, help=text)
    return parser.parse_args()


def parse_percentage(text):
    """A number from 0 to 100."""
    try:
        if 0 <= float(text) <= 100:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 100")


def judge(log_probabilities, labels):
    """The figures of eval_results.json, from log-probabilities, float32 [N, 10], and labels, int64 [N].

    "Test loss" is the mean negative log-likelihood, "Accuracy" is in percent. Row t, column p of the confusion matrix
    counts the images of digit t that were read as p. Of each digit: precision, recall, and F1, their harmonic mean.
    """
    predictions = log_probabilities.argmax(1)
    matrix = torch.bincount(10 * labels + predictions, minlength=100).view(10, 10)
    digits = []
    for digit in range(10):
        right, read, count = (matrix[digit, digit].item(), matrix[:, digit].sum().item(), matrix[digit].sum().item())
        precision, recall = right / max(1, read), right / max(1, count)
        f1 = 2 * right / max(1, read + count)
        digits.append({"digit": digit, "precision": precision, "recall": recall, "f1": f1, "count": count})
    return {
        "Test loss": F.nll_loss(log_probabilities, labels).item(),
        "Accuracy": 100 * matrix.trace().item() / len(labels),
        "digits": digits,
        "confusion_matrix": matrix.tolist(),
    }


def summary(results):
    """The results as a small table for a person."""
    lines = ["evaluate: digit  precision  recall     F1  count"]
    for digit in results["digits"]:
        lines.append("evaluate: {digit:5}  {precision:9.4f}  {recall:6.4f} {f1:6.4f} {count:6}".format(**digit))
    images = sum(digit["count"] for digit in results["digits"])
    lines.append(
        f"evaluate: accuracy {results['Accuracy']:.2f} %, loss {results['Test loss']:.4f} on {images:,} test images"
    )
    return "\n".join(lines)


def draw_confusion_matrix(matrix):
    """The confusion matrix, 10 lists of 10 counts, as the bytes of a PNG; only mistakes are coloured."""
    from matplotlib.figure import Figure

    mistakes = torch.tensor(matrix).fill_diagonal_(0)
    figure = Figure(figsize=(6, 5.6), layout="tight")
    axes = figure.subplots()
    axes.imshow(mistakes.numpy(), cmap="Reds", vmax=max(1, mistakes.max().item()) * 1.3)
    for true, row in enumerate(matrix):
        for read, count in enumerate(row):
            if count:
                weight = "bold" if true == read else "normal"
                axes.text(read, true, count, ha="center", va="center", fontsize=9, fontweight=weight)
    right = sum(matrix[digit][digit] for digit in range(10))
    axes.set(xticks=range(10), yticks=range(10), xlabel="read as", ylabel="true digit")
    axes.set_title(f"{right:,} of {sum(map(sum, matrix)):,} test images read right")
    return as_png(figure)


def draw_mistakes(images, labels, log_probabilities, side=5):
    """The images that the model was most confidently wrong about, as the bytes of a PNG, the worst first."""
    from matplotlib.figure import Figure

    confidence, predictions = log_probabilities.exp().max(1)
    wrong = torch.nonzero(predictions != labels).flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][: side * side]
    figure = Figure(figsize=(7, 7.8), layout="tight")
    axes = figure.subplots()
    axes.set_title(f"The {len(worst)} most confident of {len(wrong)} mistakes on the test images")
    # One picture with all digits on it: 25 axes would take longer to draw than the images took to judge.
    axes.set(xlim=(0, 36 * side), ylim=(44 * side, 0), aspect="equal")
    axes.axis("off")
    for place, index in enumerate(worst.tolist()):
        x, y = 36 * (place % side) + 4, 44 * (place // side) + 12
        axes.imshow(images[index].numpy(), cmap="gray", vmin=0, vmax=255, extent=(x, x + 28, y + 28, y))
        text = f"read {predictions[index]} ({100 * confidence[index]:.0f} %), is {labels[index]}\ntest image {index}"
        axes.text(x + 14, y - 1, text, ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(0, 36 * side), ylim=(44 * side, 0))
    return as_png(figure)


def as_png(figure):
    """A figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
