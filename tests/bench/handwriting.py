"""Measures how well pictures of the kinds that people take and draw are read, against what is written on them.

Reads   MODEL/mnist_cnn.pt, a model of train; data/MNIST/raw

    .venv/bin/python tests/bench/handwriting.py --model model

Each row is COUNT pictures made of test images, or with --split validation of validation images, with a fixed seed.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

TREE = Path(__file__).parents[2]
sys.path[:0] = [str(TREE / "model-infer"), str(TREE / "tests")]

import torch

import infer
import rendering
import strokes
from pictures import prediction, reading
from pictures.opening import open_picture
from stage.images import read_images, split_validation
from stage.process import Failure

OUTCOMES = ("no digit", "blank", "unsure", "sure")
COUNT = 300  # pictures a row
SIDE = 200  # pixels of a test image, enlarged


def enlarge(digit, side=SIDE):
    """Return how much of each pixel of a digit, uint8 [28, 28], enlarged, is ink: float [side, side], 0 to 1."""
    large = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(large, dtype=np.float32) / 255


def paint(ink, paper=255, level=0):
    """Return a picture with ink of a level, float [height, width], on paper: a level, or one for each pixel."""
    pixels = paper + (level - paper) * np.asarray(ink)
    return Image.fromarray(np.asarray(pixels).round().clip(0, 255).astype(np.uint8))


def on_paper(digit, rng, height=320, width=400):
    """Return the ink of a picture with a digit somewhere on it."""
    ink = np.zeros((height, width), np.float32)
    top, left = rng.integers(20, height - SIDE - 20), rng.integers(20, width - SIDE - 20)
    ink[top : top + SIDE, left : left + SIDE] = enlarge(digit)
    return ink


def plain(digit, rng):
    """A digit, dark on white."""
    return paint(on_paper(digit, rng))


def crop(margin, light):
    """A digit cut out along its ink, with so many pixels more on each side."""

    def make(digit, rng):
        ink = np.pad(enlarge(digit), margin)
        rows, columns = (np.nonzero((ink > 0.25).any(axis))[0] for axis in (1, 0))
        top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
        ink = ink[top : rows[-1] + 1 + margin, left : columns[-1] + 1 + margin]
        return paint(ink, 0, 255) if light else paint(ink)

    return make


def lines(level, ink_level, squared):
    """A digit on ruled or squared paper of grey 235, the lines so light."""

    def make(digit, rng):
        ink = on_paper(digit, rng)
        paper = np.full(ink.shape, 235, np.float32)
        step, thickness = int(rng.integers(20, 60)), int(rng.integers(1, 4))
        for axis in (0, 1)[: 1 + squared]:
            view = paper if axis == 0 else paper.T
            first = int(rng.integers(step))
            for start in range(thickness):
                view[first + start :: step] = level
        return paint(ink, paper, ink_level)

    return make


def panel(digit, rng):
    """A light digit in a dark panel on white."""
    ink = np.zeros((360, 440), np.float32)
    top, left = rng.integers(30, 100), rng.integers(30, 180)
    dark, light = rng.integers(0, 60), rng.integers(200, 256)
    pixels = np.full(ink.shape, 255, np.float32)
    pixels[top : top + 220, left : left + 220] = dark
    inside = pixels[top + 10 : top + 210, left + 10 : left + 210]
    inside += (light - dark) * enlarge(digit)
    return paint(np.zeros(ink.shape), pixels)


def axes(digit, rng):
    """A dark digit with the axes of a plot around it."""
    image = paint(np.pad(enlarge(digit), 60))
    draw = ImageDraw.Draw(image)
    draw.rectangle((50, 50, 270, 270), outline=0, width=int(rng.integers(1, 4)))
    for tick in range(60, 270, 40):
        draw.line((tick, 270, tick, 276), 0, 1)
        draw.line((44, tick, 50, tick), 0, 1)
        draw.text((tick, 285), str(tick), 0, anchor="mm")
    return image


def result(digit, rng):
    """A result picture of infer."""
    label = int(rng.integers(10))
    probabilities = [0.0] * 10
    probabilities[label] = 1.0
    sample = {"index": 1, "prediction": label, "truth": label, "probabilities": probabilities}
    return Image.open(io.BytesIO(infer.draw([sample], torch.from_numpy(digit.copy())[None])))


def table(digit, rng):
    """A digit on paper beside the dark edge of a table, on any side."""
    ink = on_paper(digit, rng)
    edge, dark = int(rng.integers(20, 100)), rng.uniform(10, 40)
    sides = [(edge, 0, 0, 0), (0, edge, 0, 0), (0, 0, edge, 0), (0, 0, 0, edge)][rng.integers(4)]
    pixels = np.pad(235 - 175 * ink, (sides[:2], sides[2:]), constant_values=dark)
    return noisy(pixels, rng)


def thumb(digit, rng):
    """A digit on paper that a thumb holds at an edge."""
    pixels = 235 - 175 * on_paper(digit, rng)
    height, width = pixels.shape
    image = Image.fromarray(np.pad(pixels, 60, constant_values=235))
    draw = ImageDraw.Draw(image)
    x, y = [(rng.uniform(0, width + 120), 0), (rng.uniform(0, width + 120), height + 120), (0, rng.uniform(0, height)),
            (width + 120, rng.uniform(0, height))][rng.integers(4)]  # fmt: skip
    draw.ellipse((x - 40, y - 50, x + 40, y + 50), fill=float(rng.uniform(60, 150)))
    return noisy(np.asarray(image), rng)


def noisy(pixels, rng):
    """Return a picture of grey levels with the noise of a camera."""
    return paint(np.zeros(pixels.shape), pixels + rng.normal(0, 3, pixels.shape))


def rendered(digit, rng):
    """A digit as rendering.py renders it."""
    return open_picture(rendering.render(digit, rng))


def row(gap):
    """Several digits side by side, so far from each other, as a fraction of their height."""

    def make(digits, rng):
        parts = []
        for digit in digits:
            ink = enlarge(digit)
            columns = np.nonzero((ink > 0.1).any(0))[0]
            parts += [ink[:, columns[0] : columns[-1] + 1], np.zeros((SIDE, int(gap * 20 / 28 * SIDE)), np.float32)]
        return paint(np.pad(np.concatenate(parts[:-1], axis=1), 40))

    return make


def draw_strokes(lines, width, side, pad):
    """Draw strokes as a pen of a width does, the longer side of their box so long; all in pixels."""
    points = np.array([point for line in lines for point in line])
    low, scale = points.min(0), (side - width) / max(np.ptp(points, axis=0).max(), 1e-6)
    size = np.ceil(np.ptp(points, axis=0) * scale + width + 2 * pad).astype(int)
    factor = 4 if side < 200 else 1
    image = Image.new("L", tuple(int(length) * factor for length in size), 255)
    draw = ImageDraw.Draw(image)
    for line in lines:
        placed = [tuple(factor * ((np.array(point) - low) * scale + width / 2 + pad)) for point in line]
        draw.line(placed, 0, width * factor, "curve")
        for x, y in (placed[0], placed[-1]):
            draw.ellipse([v - s * width * factor / 2 for v, s in ((x, 1), (y, 1), (x, -1), (y, -1))], fill=0)
    return image.reduce(factor) if factor > 1 else image


def stroke_digits(width, side=600):
    """Yield digits of people whom MNIST never saw, drawn so many pixels high by a pen of a width."""
    for digit, drawn in strokes.variations(COUNT, seed=5):
        yield str(digit), draw_strokes(drawn, width, side, side // 5)


X = [[(0, 0), (1, 1)], [(1, 0), (0, 1)]]
TICK = [[(0, 0.6), (0.35, 1), (1, 0)]]
ANGLES = np.linspace(0, 2 * np.pi, 60)
HEART = [
    [(np.sin(a) ** 3, -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) / 16) for a in ANGLES]
]
CIRCLE = [(np.cos(a), np.sin(a)) for a in ANGLES]
FACE = [CIRCLE, [(-0.4, -0.4), (-0.4, -0.25)], [(0.4, -0.4), (0.4, -0.25)], [(-0.5, 0.3), (0, 0.6), (0.5, 0.3)]]


def shapes(shape):
    """Yield a shape that is no digit, turned and stretched a little."""
    rng = np.random.default_rng(3)
    for _ in range(COUNT):
        angle, stretch = rng.uniform(-0.15, 0.15), rng.uniform(0.75, 1.3)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * [[stretch], [1]]
        drawn = [[tuple(turn @ point) for point in line] for line in shape]
        yield "", draw_strokes(drawn, 11, 80, 16)


def made(make, images, labels, seed=1, count=1):
    """Yield what is written on pictures, and the pictures, made of `count` images each."""
    rng = np.random.default_rng(seed)
    for chosen in rng.permutation(len(images))[: COUNT * count].reshape(-1, count):
        truth = "".join(str(labels[index]) for index in chosen)
        yield truth, make(images[chosen[0]] if count == 1 else images[chosen], rng)


def rows(images, labels):
    """Yield the name of each row and its pictures, with what is written on them."""
    kinds = {"plain": plain}
    kinds |= {f"crop {'light' if light else 'dark'} {m}": crop(m, light) for light in (0, 1) for m in (0, 1, 3, 10)}
    for squared in (0, 1):
        for ink, levels in ((60, (150, 180, 200, 215)), (140, (180, 200, 215))):
            name = "squared" if squared else "ruled"
            kinds |= {f"{name} {line} ink {ink}": lines(line, ink, squared) for line in levels}
    kinds |= {"panel": panel, "axes": axes, "result": result, "table": table, "thumb": thumb, "rendered": rendered}
    for name, make in kinds.items():
        yield name, made(make, images, labels)
    for width in (1, 2, 3, 5, 8, 15, 30):
        yield f"strokes {width}", stroke_digits(width)
    yield "page drawings", stroke_digits(11, 80)
    for count, name in ((2, "pairs"), (3, "triples")):
        for gap in (0.05, 0.1, 0.3, 1):
            yield f"{name} {gap}", made(row(gap), images, labels, count=count)
    for name, shape in (("x", X), ("tick", TICK), ("heart", HEART), ("face", FACE)):
        yield name, shapes(shape)


def outcome(predictor, truth, image):
    """Return whether a picture is read right, whether its best guess is right, and the confidence."""
    try:
        output = reading.read(image, predictor)[0]
    except Failure:
        return False, False, "blank"
    digits = output["digits"]
    read = "".join("?" if digit["prediction"] is None else str(digit["prediction"]) for digit in digits)
    guess = "".join(str(np.argmax(digit["probabilities"])) for digit in digits)
    return read == truth, guess == truth, output["confidence"]


def main():
    """Print, for each row, how many pictures are read right, called no digit, sure, and sure but wrong."""
    parser = argparse.ArgumentParser(description="Measures how well pictures of the kinds that people make are read.")
    parser.add_argument("--model", type=Path, default=TREE / "model", help="folder of the model (default: %(default)s)")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="images (default: %(default)s)")
    parser.add_argument("--rows", default="", help="only rows whose name starts so; several, separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(1)
    predictor = prediction.load_predictor(args.model, TREE / "data")
    split = read_images(TREE / "data", "train" if args.split == "validation" else "test")
    images, labels = split_validation(*split)[1] if args.split == "validation" else split
    for name, pictures in rows(images.numpy(), labels.numpy()):
        if name.startswith(tuple(args.rows.split(","))):
            found = [outcome(predictor, truth, image) for truth, image in pictures]
            right, guess = (sum(one[index] for one in found) / len(found) for index in (0, 1))
            shares = [f"{sum(one[2] == kind for one in found) / len(found):6.1%} {kind}" for kind in OUTCOMES]
            wrong = sum(one[2] == "sure" and not one[0] for one in found) / len(found)
            shares.append(f"{wrong:6.1%} sure and wrong")
            print(f"{name:20} right {right:6.1%}, best guess {guess:6.1%},", ", ".join(shares), flush=True)


if __name__ == "__main__":
    main()
