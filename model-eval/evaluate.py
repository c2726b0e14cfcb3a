"""Evaluates the trained model on the test images.

Reads   DATA: the test images; MODEL/mnist_cnn.pt: the model
        MODEL/train_results.json, if it is there: the code that the model was trained with
Writes  MODEL/eval_results.json: test loss, accuracy, figures per class, confusion matrix, the model's sha256
        MODEL/confusion_matrix.png: the confusion matrix
        MODEL/mistakes.png: the 25 most confident mistakes
        MODEL/export/: with --export, the model for other programs (export/exporter.py)

    docker compose run --rm evaluate
    docker compose run --rm export
    python model-eval/evaluate.py --data data --model model --min-accuracy 99

An accuracy under --min-accuracy, or DATA_SET.min_accuracy, is a failure: exit status 1, and nothing is written.
"""

from stage import limits, locks, process

if __name__ == "__main__":
    # Before the other imports: a signal during them would end in a traceback, and a lack of memory in a silent kill.
    process.prepare_process()
    with process.exit_on_failure("evaluate"):
        limits.check_memory(255_000_000, "evaluate")  # for torch, the test images and the figures

import argparse
import json
from types import ModuleType
from typing import TypedDict

import torch
import torch.nn.functional as F

import net
from stage import files, flags, weights
from stage.dataset import DATA_SET
from stage.figures import as_png, new_figure
from stage.files import CONFUSION_MATRIX, EVAL_RESULTS, MISTAKES, WEIGHTS, publish
from stage.images import EDIT_HINT, read_images
from stage.output import percent, say
from stage.process import Failure

# Precision, recall, and F1, their harmonic mean, of the class of a name; "count" is the number of its test images.
ClassResult = TypedDict("ClassResult", {"class": str, "precision": float, "recall": float, "f1": float, "count": int})
# eval_results.json without the sha256. "Test loss" is the mean negative log-likelihood, "Accuracy" is percent. Row t,
# column p of the confusion matrix counts the images of class t that were predicted as p.
EvalResults = TypedDict(
    "EvalResults",
    {"Test loss": float, "Accuracy": float, "classes": list[ClassResult], "confusion_matrix": list[list[int]]},
)


def main() -> int:
    """Run the stage and return its exit status."""
    process.imports_done()
    args = parse_args()
    with process.exit_on_failure("evaluate"):
        limits.check_threads(2 * limits.count_cores() + 2)  # torch's, those of net.predict(), and a margin
        files.check_destinations(args.model, EVAL_RESULTS, CONFUSION_MATRIX, MISTAKES)
        if args.export:
            exporter = import_exporter()
            exporter.check_possible(args.model)
        torch.set_num_threads(limits.count_cores())
        model = net.Net()
        sha256 = weights.load_model(model, args.model)
        images, labels = read_images(args.data, "test")
        log_probabilities = net.predict(model, images)
        if not log_probabilities.isfinite().all():
            raise Failure(f"the output of {args.model / WEIGHTS} is not finite. {files.FRESH_HINT}")
        results = evaluate(log_probabilities, labels)
        say(as_table(results))
        if results["Accuracy"] < args.min_accuracy:
            raise Failure(
                f"{args.model / WEIGHTS} has {results['Accuracy']} % accuracy, below --min-accuracy "
                f"{args.min_accuracy}; no results are written. Train longer: {process.command('train', '--epochs N')}; "
                f"or expect less: --min-accuracy, or the data set's min_accuracy. {EDIT_HINT}"
            )
        contents = {
            CONFUSION_MATRIX: draw_confusion_matrix(results["confusion_matrix"]),
            MISTAKES: draw_mistakes(images, labels, log_probabilities),
            EVAL_RESULTS: json.dumps(results | {"model_sha256": sha256}, indent=1).encode(),
        }
        with locks.publishing(args.model):
            for name, content in contents.items():
                publish(args.model / name, content)
        if args.export:
            exporter.export_model(args.model, sha256, model, images, log_probabilities, results)
    return 0


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = flags.new_parser("evaluate", "Evaluates the trained model on the test images.")
    text = "fail if the accuracy on the test images is below this percentage (0 to 100; default: %(default)s)"
    parser.add_argument(
        "--min-accuracy", type=parse_percentage, default=DATA_SET.min_accuracy, metavar="PERCENT", help=text
    )
    text = "also write the model as safetensors and ONNX, with a model card, to the folder export of the volume"
    parser.add_argument("--export", action="store_true", help=text)
    flags.add_folder_flags(parser)
    return parser.parse_args()


def import_exporter() -> ModuleType:
    """Return export/exporter.py. Its import takes seconds, and packages that the image of evaluate does not have."""
    try:
        from export import exporter
    except ModuleNotFoundError as error:
        hint = "Run: docker compose run --rm export"
        raise Failure(f"--export needs {error.name}, which is not installed here. {hint}", status=2) from None
    return exporter


def parse_percentage(text: str) -> float:
    """Return a number from 0 to 100."""
    try:
        if 0 <= float(text) <= 100:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 100")


def evaluate(log_probabilities: torch.Tensor, labels: torch.Tensor) -> EvalResults:
    """Return the results for log-probabilities, float32 [N, classes], and labels, int64 [N]."""
    predictions, size = log_probabilities.argmax(1), len(DATA_SET.classes)
    matrix = torch.bincount(size * labels + predictions, minlength=size**2).view(size, size)
    of_class = (counts.tolist() for counts in (matrix.diagonal(), matrix.sum(0), matrix.sum(1)))
    classes: list[ClassResult] = []
    for name, correct, predicted, count in zip(DATA_SET.classes, *of_class, strict=True):
        precision, recall = correct / max(1, predicted), correct / max(1, count)
        f1 = 2 * correct / max(1, predicted + count)
        classes.append({"class": name, "precision": precision, "recall": recall, "f1": f1, "count": count})
    return {
        "Test loss": F.nll_loss(log_probabilities, labels).item(),
        "Accuracy": 100 * matrix.trace().item() / len(labels),
        "classes": classes,
        "confusion_matrix": matrix.tolist(),
    }


def as_table(results: EvalResults) -> str:
    """Format the results as a table."""
    width = max(5, *map(len, DATA_SET.classes))
    lines = [f"evaluate: {'class':{width}}  precision  recall     F1  count"]
    for line in results["classes"]:
        name = f"evaluate: {line['class']:>{width}}"
        lines.append(name + "  {precision:9.4f}  {recall:6.4f} {f1:6.4f} {count:6}".format(**line))
    accuracy, images = percent(results["Accuracy"]), sum(line["count"] for line in results["classes"])
    lines.append(f"evaluate: accuracy {accuracy}, loss {results['Test loss']:.4f} on {images:,} test images")
    return "\n".join(lines)


def draw_confusion_matrix(matrix: list[list[int]]) -> bytes:
    """Draw the confusion matrix, a list of counts for each class, as a PNG; only mistakes are coloured."""
    mistakes = torch.tensor(matrix).fill_diagonal_(0)
    side = min(max(6, 0.45 * len(matrix)), 20)  # inches
    figure = new_figure(side, side - 0.4, layout="tight")
    axes = figure.subplots()
    axes.imshow(mistakes.numpy(), cmap="Reds", vmax=max(1, int(mistakes.max())) * 1.3)
    for true, row in enumerate(matrix):
        for predicted, count in enumerate(row):
            if count and len(matrix) <= 40:  # more would not be readable
                weight = "bold" if true == predicted else "normal"
                axes.text(predicted, true, str(count), ha="center", va="center", fontsize=9, fontweight=weight)
    names, correct = DATA_SET.classes, sum(row[label] for label, row in enumerate(matrix))
    axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 3 else 90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{correct:,} of {sum(map(sum, matrix)):,} test images predicted correctly")
    return as_png(figure)


def draw_mistakes(images: torch.Tensor, labels: torch.Tensor, log_probabilities: torch.Tensor) -> bytes:
    """Draw the mistakes with the highest confidence, as a PNG, the most confident first."""
    side = 5  # images in a row, and rows
    confidence, predictions = log_probabilities.exp().max(1)
    wrong = torch.nonzero(predictions != labels).flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][: side * side]
    figure = new_figure(7, 7.8, layout="tight")
    axes = figure.subplots()
    axes.set_title(f"Mistakes on the test images: {len(worst)} of {len(wrong)}, the most confident first")
    # One picture with all images on it: 25 axes would take longer to draw than the images took to evaluate. A unit is
    # the longer side of an image.
    axes.axis("off")
    height, width = (length / max(DATA_SET.shape[1:]) for length in DATA_SET.shape[1:])
    for place, index in enumerate(worst.tolist()):
        x, y = 1.3 * (place % side) + 0.15, 1.6 * (place // side) + 0.45
        axes.imshow(images[index].numpy(), cmap="gray", vmin=0, vmax=255, extent=(x, x + width, y + height, y))
        predicted, true = DATA_SET.classes[int(predictions[index])], DATA_SET.classes[int(labels[index])]
        text = f"predicted {predicted} ({percent(100 * confidence[index].item(), 0)})\ntrue {true}, image {index}"
        axes.text(x + width / 2, y - 0.04, text, ha="center", va="bottom", fontsize=min(7.5, 320 / len(text)))
    axes.set(xlim=(0, 1.3 * side), ylim=(1.6 * side, 0), aspect="equal")
    return as_png(figure)


if __name__ == "__main__":
    process.end_process(main())
