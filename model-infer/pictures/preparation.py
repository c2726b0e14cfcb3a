"""Turns any picture into the image that the network gets, as DATA_SET.preparation says.

"resize" takes no more than resize(). The rest is for "digit", and makes an image of a digit the way MNIST was made.

How MNIST was made is lost. The reconstruction of Yadav and Bottou (2019), "Cold Case: The Lost MNIST Digits", is within
3 grey levels of it: the tight box of the ink becomes a square, which is area-averaged to 20 x 20 pixels, scaled so that
full ink is 255, and placed into 28 x 28 by its centre of mass. reading.py says what is ink, and which ink is a digit.

Up to fill_transparent(), pixels are grey levels, 0 to 255; from to_mnist() on, levels of ink: 0 is background.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pictures.grids import Levels, average, largest, pad, window_max
from pictures.opening import WORKING_SIDE
from pictures.outcome import Box
from stage import images

MIN_SIDE = 10  # pixels of the square that a digit is put in, at least (Yadav and Bottou)
BOX_LEVEL = 0.05  # of full ink, averaged over a twentieth of the digit: what belongs to its tight box
THIN, NORMAL = 0.04, 0.09  # of a digit's longer side: thinner strokes than the first are made as wide as the second


def resize(image: Image.Image) -> torch.Tensor:
    """Return a picture in the data set's colours and size, uint8 [H, W] or [H, W, 3]; its own pixels if it has them."""
    return torch.from_numpy(np.array(images.fit(image)))


def to_grey(image: Image.Image) -> Levels:
    """Return the grey levels of a picture, 0 to 255, float32 [height, width], at most 1.5 times WORKING_SIDE long."""
    factor = max(1, round(max(image.size) / WORKING_SIDE))
    grey = shrink(image.convert("L"), factor)
    if image.mode not in ("RGBA", "LA") or image.getchannel("A").getextrema() == (255, 255):
        return grey
    return fill_transparent(grey, shrink(image.getchannel("A"), factor) / np.float32(255))


def shrink(image: Image.Image, factor: int) -> Levels:
    """Reduce a picture of one channel by a whole factor, averaging, to float32 [height, width]."""
    return np.asarray(image.reduce(factor) if factor > 1 else image, dtype=np.float32)


def fill_transparent(grey: Levels, alpha: Levels) -> Levels:
    """Lay a picture over a background, by the opacity of each pixel, 0 to 1.

    Where most of it is opaque, the background is on it, and is what the transparent rest gets too. Otherwise it is ink
    alone, and the background is what ink stands out from.
    """
    opaque = grey[alpha > 0.5]
    if opaque.size > alpha.size / 2:
        background = float(np.median(opaque))
    else:
        background = 255.0 if opaque.size == 0 or opaque.mean() < 128 else 0.0
    return np.asarray(alpha * grey + (1 - alpha) * background, dtype=np.float32)


def to_mnist(ink: Levels, full: float) -> NDArray[np.uint8]:
    """Turn the ink of a digit, with its full level, into an image like MNIST's, uint8 [28, 28]: 255 is full ink."""
    ink = widen(ink)
    top, left, bottom, right = tight_box(ink, full)
    side = max(bottom - top, right - left, MIN_SIDE)
    rows, columns = overlaps(bottom - top, side), overlaps(right - left, side)
    square = rows @ ink[top:bottom, left:right] @ columns.T
    digit = np.floor(square * (255 / square.max()) + 0.5)
    # Pixels' centres are at + 0.5. The centre of mass comes to 15, in whole pixels, rounded down.
    places = np.arange(20) + 0.5
    down, along = (int(15 - (digit.sum(axis) @ places) / digit.sum()) for axis in (1, 0))
    canvas = np.zeros((48, 48), dtype=np.uint8)  # 10 more on each side, for digits that reach over the edge
    canvas[10 + down : 30 + down, 10 + along : 30 + along] = digit
    return canvas[10:38, 10:38].copy()


def widen(ink: Levels) -> Levels:
    """Return the ink with its strokes made wider, on a coarser grid, if they are thinner than pens leave them on paper.

    Their mean width is twice the ink divided by the length of its edges, which is the sum of the steps across them.
    """
    side = max(ink.shape)
    factor = 1 + side // 100
    cells = average(ink, factor)
    edges = float(np.abs(np.diff(cells, axis=0)).sum() + np.abs(np.diff(cells, axis=1)).sum())
    width = 2 * factor * float(cells.sum()) / max(edges, 1e-9)
    if width >= THIN * side:
        return ink
    cells = pad(largest(ink, factor), side // (20 * factor), side // (20 * factor))
    return window_max(cells, max(1, round((NORMAL * side - width) / factor / 2) - (factor > 1)))


def tight_box(ink: Levels, full: float) -> Box:
    """Return the smallest box with all ink: what is ink on average over a twentieth of the digit along its side."""
    span = max(1, max(ink.shape) // 20)
    sides = []
    for rows in (ink, ink.T):
        sums = pad(rows, 0, span).cumsum(1)
        inked = (sums[:, span:] - sums[:, :-span]).max(1) >= min(BOX_LEVEL * span, 1) * full
        sides.append(np.nonzero(inked)[0].tolist())
    return sides[0][0], sides[1][0], sides[0][-1] + 1, sides[1][-1] + 1


def overlaps(length: int, side: int) -> Levels:
    """Return how much of each of 20 cells along a side each of the `length` pixels in its middle covers: [20, length].

    The middle is rounded to one of the 20 pixels: so a picture of an image of MNIST gives back that image's own pixels.
    """
    first = round((side - length) / 2 * 20 / side)
    edges = first + np.arange(length + 1) * (20 / side)
    cells = np.arange(20)[:, None]
    covered = np.minimum(edges[None, 1:], cells + 1) - np.maximum(edges[None, :-1], cells)
    return np.asarray(covered.clip(0), dtype=np.float32)
