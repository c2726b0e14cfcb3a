"""Predicts the user's own pictures: finds the files, predicts each, and draws the predictions."""

import glob
import itertools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pictures import opening, outcome, prediction, reading
from stage import files, folders, limits, locks
from stage.dataset import DATA_SET
from stage.figures import BLUE, GREY, VERMILION, as_png, new_figure
from stage.files import OWN_RESULTS, PREDICTIONS
from stage.output import percent, print_error, say
from stage.process import Failure

warnings.filterwarnings("ignore", message="Glyph")  # matplotlib's font lacks characters of some file names

BRACKETS_OR_LETTER = r"\[!?\]?[^]]*\]|[^\W\d_]"  # in a name with wildcards
MAX_PICTURES = 1_000
MAX_PICTURE_BYTES = 200_000_000
MEMORY = 1_000_000_000  # bytes that a run needs with the largest picture, an uncompressed TIFF; measured: 980 MB


class Result(outcome.Reading):
    """What is written on a picture, with the path of its file."""

    file: str


def predict_pictures(names: list[str], data: Path, model: Path) -> int:
    """Predict pictures, publish the predictions, and return the exit status: 1 if a picture was refused."""
    limits.check_memory(MEMORY, "infer with pictures")
    folder = model / OWN_RESULTS
    folders.check_destination(folder)
    paths = find_pictures(names, data, folder)
    predictor = prediction.load_predictor(model, data)
    results: list[Result] = []
    contents: dict[str, bytes] = {}  # of the files to publish, by name
    for path in paths:
        try:
            result, png = predict_picture(predictor, path)
        except Failure as failure:
            print_error(f"infer: {failure}")
            continue
        results.append(result)
        contents[new_name(result, contents)] = png
        say(f"infer: {path}: {as_text(result)}")
    if results:
        contents[PREDICTIONS] = predictor.as_json(results)
        with locks.publishing(folder.parent):
            folders.replace_folder(folder, contents)
        say(f"infer: {predictor.evaluation()}")
    return int(len(results) < len(paths))


def find_pictures(names: list[str], data: Path, results: Path) -> list[Path]:
    """Return the files in the data folder that the names stand for, each once.

    Raise Failure if there are too many files, or if one is in the folder of the results, which is replaced.
    """
    paths: dict[Path, None] = {}
    for name in names:
        found = next(filter(None, (matches(spelling, data) for spelling in spellings(name))), [])
        paths |= dict.fromkeys(found or [data / name])  # a name without a match is refused later, like a missing file
    # Unlike Path.resolve(), realpath() does not fail for a loop of links, which is then refused like a missing file.
    if any(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(results)) for path in paths):
        raise Failure(f"{results} is replaced by the results. Move the pictures elsewhere.", status=2)
    if len(paths) > MAX_PICTURES:
        raise Failure(f"{len(paths):,} pictures are too many for one run. Name at most {MAX_PICTURES:,}.", status=2)
    return [*paths]


def spellings(name: str) -> Iterator[str]:
    """Yield a name as it was typed, and then as it may have been meant.

    Windows' cmd leaves quotes on and separates folders by backslashes; outside, the folder is called data/.
    """
    for spelling in (name, name.strip("'\"").replace("\\", "/")):
        yield spelling
        if Path(spelling).parts[:1] == ("data",):
            yield str(Path(spelling).relative_to("data"))


def matches(name: str, data: Path) -> list[Path]:
    """Return the file with a name, or those that match its wildcards, in capitals or not.

    Outside the container, the user's shell cannot expand wildcards.
    """
    if os.path.exists(data / name):
        return [data / name]
    found = glob.glob(re.sub(BRACKETS_OR_LETTER, any_case, name), root_dir=data) if glob.has_magic(name) else []
    return [data / match for match in sorted(found) if not os.path.isdir(data / match)]


def any_case(found: re.Match[str]) -> str:
    """Return what matches the small and the capital letters of a letter, or of a set of characters in brackets."""
    text = found[0]
    if text.startswith("["):
        return f"{text[:-1]}{text[1:-1].lstrip('!]').swapcase()}]"
    return f"[{text}{text.swapcase()}]"


def predict_picture(predictor: prediction.Predictor, path: Path) -> tuple[Result, bytes]:
    """Predict a picture and draw the result as a PNG. Raise Failure if the file cannot be read, or has no ink."""
    if glob.has_magic(str(path)) and not os.path.lexists(path):
        raise Failure(f"no file matches {path}. Name another.")
    if os.path.isdir(path):  # unlike Path.is_dir(), it is False for a name that is too long
        raise Failure(f"{path} is a folder. Name the pictures in it.")
    content = bytes(files.read_limited(path, MAX_PICTURE_BYTES, "Name another."))  # Pillow would copy a bytearray
    try:
        image = opening.open_picture(content)
        read, pixels = reading.read(image, predictor)
    except Failure as failure:
        raise Failure(f"{path}: {failure}") from None
    result: Result = {"file": str(path), **read}
    return result, draw(path.name, image, pixels, result)


def new_name(result: Result, taken: dict[str, bytes]) -> str:
    """Return the name of a picture's result, {predicted}_{stem}.png, with a number if that name is taken."""
    predictions = [part["prediction"] for part in result.get("digits", [result])]
    predicted = "".join(str(one) for one in predictions if one is not None) or "none"
    stem = os.fsencode(Path(result["file"]).stem).decode(errors="replace")  # names need not be UTF-8
    stem = stem.encode()[:200].decode(errors="ignore")  # a name has at most 255 bytes
    suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (f"{predicted}_{stem}{suffix}.png" for suffix in suffixes)
    return next(name for name in names if name not in taken)


def as_text(result: Result) -> str:
    """Format a prediction for the terminal."""
    best = max(result["probabilities"])
    parts = result.get("digits", [])
    if len(parts) > 1:
        doubt = {"sure": "", "unsure": ", not sure"}.get(result["confidence"], ", ? does not look like a digit")
        least = min(max(part["probabilities"]) for part in parts)
        return f"predicted {''.join(map(name_of, parts))} (each at least {percent(100 * least, 1)}){doubt}"
    most_likely = f"{DATA_SET.classes[result['probabilities'].index(best)]} ({percent(100 * best, 1)})"
    if result["confidence"] == outcome.UNLIKE:
        unlike = "does not look like a digit" if outcome.UNLIKE == "no digit" else "unlike the images it was trained on"
        return f"{unlike}; closest to {most_likely}"
    return f"predicted {most_likely}" + (", not sure" if result["confidence"] == "unsure" else "")


def name_of(part: outcome.Prediction) -> str:
    """Return the name of the predicted class, or "?"."""
    return "?" if part["prediction"] is None else DATA_SET.classes[part["prediction"]]


def draw(name: str, image: Image.Image, pixels: torch.Tensor, result: Result) -> bytes:
    """Draw a picture, the network's input for it, uint8 [H, W] or [H, W, 3], and the probabilities, as a PNG."""
    parts = result.get("digits", [])
    if len(parts) > 1:  # the best class of each
        names, probabilities = [name_of(part) for part in parts], [max(part["probabilities"]) for part in parts]
        predicted = [part["prediction"] is not None for part in parts]
    else:
        names, probabilities = list(DATA_SET.classes), result["probabilities"]
        predicted = [index == result["prediction"] for index in range(len(names))]
    figure = new_figure(10, max(3.8, 1 + 0.22 * len(names)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    left.imshow(np.asarray(thumbnail(image)))
    left.set_title(printable(name), parse_math=False)
    middle.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255)
    middle.set_title(f"what the network sees, {pixels.shape[1]} x {pixels.shape[0]}")
    for axes in (left, middle):
        axes.set(xticks=[], yticks=[])
    percentages = [100 * probability for probability in probabilities]
    colors = [BLUE if one else GREY for one in predicted]
    bars = right.barh(range(len(names)), percentages, color=colors)
    right.bar_label(bars, [percent(percentage, 1) for percentage in percentages], padding=3, fontsize=9)
    right.set_yticks(range(len(names)), names, parse_math=False)
    # Up to 125: the label of a bar of 100 % needs some room.
    right.set(xlim=(0, 125), xticks=range(0, 101, 25), xlabel="probability in percent", ylabel="class")
    right.invert_yaxis()
    right.spines[["top", "right"]].set_visible(False)
    color = BLUE if result["confidence"] == "sure" else VERMILION
    figure.suptitle(as_text(result), fontsize=17, color=color, parse_math=False)
    return as_png(figure)


def thumbnail(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, its longer side at most 480 pixels, with light grey where it is transparent.

    The picture itself may be reduced too: there may not be enough memory for a copy.
    """
    image.thumbnail((480, 480), reducing_gap=2)
    small = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", small.size, "#dddddd"), small).convert("RGB")


def printable(name: str) -> str:
    """Return the name of a file as a title: at most 32 characters, all printable."""
    clean = "".join(character if character.isprintable() else "?" for character in name)
    return clean if len(clean) <= 32 else f"{clean[:14]}...{clean[-15:]}"
