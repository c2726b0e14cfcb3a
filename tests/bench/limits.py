"""Measures what the model card of an export says of its limits: other people's digits, and images of no digit.

Reads   MODEL/mnist_cnn.pt, a model of train; data/MNIST/raw; the test images of Fashion-MNIST, gzipped (--fashion);
        the digits of scikit-learn's package, sklearn/datasets/data/digits.csv.gz (--digits)

    .venv/bin/python tests/bench/limits.py --model model --digits digits.csv.gz

scikit-learn's digits are the test images of UCI's "Optical Recognition of Handwritten Digits", by 13 people. They are
enlarged from 8 x 8 to 20 x 20 pixels in the middle of 28 x 28; the other images are those of no_digit.py.
"""

import argparse
import gzip
from pathlib import Path

import no_digit
import numpy as np
import torch
from PIL import Image

from pictures import prediction, reading
from stage.process import Failure


def main():
    """Print the accuracy on the digits, and how many of the other images get a class with 90 % or more."""
    parser = argparse.ArgumentParser(description="Measures the limits of an export.")
    parser.add_argument("--model", type=Path, default=no_digit.TREE / "model", help="folder (default: %(default)s)")
    default = Path("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz")
    parser.add_argument("--fashion", type=Path, default=default, help="Fashion-MNIST's images (default: %(default)s)")
    parser.add_argument("--digits", type=Path, required=True, help="scikit-learn's digits.csv.gz")
    args = parser.parse_args()
    torch.set_num_threads(1)
    predictor = prediction.load_predictor(args.model, no_digit.TREE / "data")
    images, labels = read_digits(args.digits)
    right = (predictor.forward(images)[0].argmax(1) == labels).float().mean().item()
    print(f"{len(images):,} digits of other people: {right:.1%} predicted right")
    rng = np.random.default_rng(1)
    kinds = {
        "letters": no_digit.draw_letters(rng),
        "scribbles": (no_digit.draw_scribble(rng) for _ in range(no_digit.COUNT)),
        "Fashion-MNIST": no_digit.enlarge(no_digit.read_fashion(args.fashion)),
    }
    for kind, pictures in kinds.items():
        sure = [is_sure(predictor, image) for image in pictures]
        print(f"{kind}: {sure.count(True) / max(1, len(sure) - sure.count(None)):.0%} of those that are not blank")


def read_digits(path):
    """Read the digits, uint8 [N, 28, 28], and their labels, int64 [N]."""
    with gzip.open(path) as file:
        rows = np.loadtxt(file, delimiter=",")
    small = (rows[:, :-1] * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8)
    enlarged = [np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC)) for image in small]
    return torch.from_numpy(np.pad(np.stack(enlarged), ((0, 0), (4, 4), (4, 4)))), torch.from_numpy(rows[:, -1]).long()


def is_sure(predictor, image):
    """Return whether a class gets 90 % or more, whatever the distance; None for a picture that is refused."""
    try:
        read, _ = reading.read(image, predictor)
    except Failure:
        return None
    return max(read["probabilities"]) >= prediction.SURE_PROBABILITY


if __name__ == "__main__":
    main()
