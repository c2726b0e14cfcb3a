"""Measures how many letters, scribbles and clothes (Fashion-MNIST) the model predicts as "no digit".

Reads   MODEL/mnist_cnn.pt, a model of train; data/MNIST/raw; the test images of Fashion-MNIST, gzipped (--fashion)

    .venv/bin/python tests/bench/no_digit.py --model model

All images are prepared like the user's own pictures. Letters that look like a digit (B, I, O, S, Z) are left out.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TREE = Path(__file__).parents[2]
sys.path.insert(0, str(TREE / "model-infer"))

import torch
from matplotlib import get_data_path

from pictures import prediction, reading
from stage.images import read_images
from stage.process import Failure

LETTERS = "ACDEFGHJKLMNPQRTUVWXY"
# Of those that matplotlib comes with.
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif-Italic", "DejaVuSansMono", "STIXGeneral", "cmr10")
VARIATIONS = 8  # of each letter in each font
COUNT = 1000  # images of each other kind
SIDE = 280  # pixels of a drawing
OUTCOMES = ("no digit", "blank", "unsure", "sure")


def main():
    """Print the outcomes for each kind of image."""
    parser = argparse.ArgumentParser(description="Measures how many images of other things are predicted as no digit.")
    parser.add_argument("--model", type=Path, default=TREE / "model", help="folder of the model (default: %(default)s)")
    default = Path("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz")
    parser.add_argument("--fashion", type=Path, default=default, help="Fashion-MNIST's images (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    predictor = prediction.load_predictor(args.model, TREE / "data")
    rng = np.random.default_rng(1)
    digits = read_images(TREE / "data", "test")[0].numpy()
    kinds = {
        "letters": draw_letters(rng),
        "scribbles": (draw_scribble(rng) for _ in range(COUNT)),
        "Fashion-MNIST": enlarge(read_fashion(args.fashion)),
        "test images": enlarge(digits),
    }
    for kind, images in kinds.items():
        found = [outcome(predictor, image) for image in images]
        shares = [f"{found.count(name) / max(1, len(found)):6.1%} {name}" for name in OUTCOMES]
        print(f"{kind:>13} {len(found):5,}: ", ", ".join(shares), flush=True)


def outcome(predictor, image):
    """Return the confidence of a picture's prediction, or "blank" if it is refused."""
    try:
        return reading.read(image, predictor)[0]["confidence"]
    except Failure:
        return "blank"


def draw_letters(rng):
    """Yield each letter in each font several times: dark on white, slightly rotated and slanted."""
    for name in FONTS:
        font = ImageFont.truetype(Path(get_data_path()) / "fonts/ttf" / f"{name}.ttf", SIDE // 2)
        for letter in LETTERS:
            for _ in range(VARIATIONS):
                image = Image.new("L", (SIDE, SIDE), 255)
                ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), letter, 0, font, anchor="mm")
                image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=255)
                slant = rng.uniform(-0.2, 0.2)
                slanted = (Image.Transform.AFFINE, (1, slant, -slant * SIDE / 2, 0, 1, 0), Image.Resampling.BICUBIC)
                yield image.transform(image.size, *slanted, fillcolor=255)


def draw_scribble(rng):
    """Draw a line through 4 to 20 random points, 8 to 24 pixels wide."""
    image = Image.new("L", (SIDE, SIDE), 255)
    points = rng.uniform(0.1 * SIDE, 0.9 * SIDE, (rng.integers(4, 21), 2))
    ImageDraw.Draw(image).line([*map(tuple, points)], 0, int(rng.integers(8, 25)), "curve")
    return image


def read_fashion(path):
    """Read the images, uint8 [N, 28, 28], of a gzipped file in MNIST's format; return none if there is no file."""
    if not path.exists():
        print(f"{path} does not exist, so Fashion-MNIST is left out. Name it with --fashion.", file=sys.stderr)
        return np.zeros((0, 28, 28), np.uint8)
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)[16:].reshape(-1, 28, 28)


def enlarge(images):
    """Yield the first of some images of 28 x 28 pixels, enlarged five times."""
    for image in images[:COUNT]:
        yield Image.fromarray(image).resize((140, 140), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
