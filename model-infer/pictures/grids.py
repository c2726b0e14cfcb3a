"""Grids of cells: averages and maxima of a picture's pixels, and of those around each."""

from functools import reduce

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Levels = NDArray[np.float32]  # grey levels, or levels of ink, [height, width]


def average(values: Levels, factor: int) -> Levels:
    """Return a grid of cells of factor x factor pixels, each the mean of its pixels."""
    return np.asarray(Image.fromarray(values).reduce(factor)) if factor > 1 else values


def pad(values: Levels, rows: int, columns: int, value: float = 0) -> Levels:
    """Return values with so many rows above and below and columns on either side. np.pad() takes 10 times as long."""
    height, width = values.shape
    padded = np.full((height + 2 * rows, width + 2 * columns), value, dtype=np.float32)
    padded[rows : rows + height, columns : columns + width] = values
    return padded


def largest(values: Levels, factor: int) -> Levels:
    """Return a grid of cells of factor x factor pixels, each the maximum of its pixels."""
    height, width = values.shape
    values = np.pad(values, [(0, -height % factor), (0, -width % factor)], mode="edge")
    rows = reduce(np.maximum, (values[start::factor] for start in range(factor)))
    return reduce(np.maximum, (rows[:, start::factor] for start in range(factor)))


def window_max(values: Levels, radius: int) -> Levels:
    """Return the maximum of the square of 2 * radius + 1 around each value, as if there were nothing outside."""
    for _ in ("down", "along"):
        values = pad(values, radius, 0, -np.inf)
        width = 1  # of the windows whose maxima are known: two of them make one of up to twice the width
        while width < 2 * radius + 1:
            step = min(width, 2 * radius + 1 - width)
            values, width = np.maximum(values[:-step], values[step:]), width + step
        values = values.T
    return values


def grid_factor(values: Levels, side: int) -> int:
    """Return the side of a grid's cell in pixels, so that the longer side has so many cells at most."""
    return 1 + (int(max(values.shape)) - 1) // side
