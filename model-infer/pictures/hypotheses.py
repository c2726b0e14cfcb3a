"""What may be the ink of a picture: dark or light, in even or uneven light, with or without faint lines.

A picture of which most has one level, as drawings have, is simple: what differs from it is ink. Otherwise the light on
the paper is taken off first. The likeliest comes first; reading.py takes the first whose digits are near enough to the
training images.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pictures.grids import Levels, average, grid_factor, window_max

GRID_SIDE = 100  # cells of the longer side of the grid on which uneven light is looked for
BACKGROUND_WINDOW = 0.2  # of the longer side: what is narrower may be ink, what is wider is background
MIN_CONTRAST = 20  # grey levels between ink and background; with less, a picture is blank
NOISE_FACTOR = 6  # standard deviations of the background's noise that ink must exceed
FAINT = (0.35, 0.65)  # of full ink: lines on the paper are at most as dark as that
FLAT_PEAK = 0.75  # of the darkest level: what reaches the edges of a flat background and is all lighter is a shadow
# Of the distance that is UNLIKE:
GOOD = 0.5  # as near as 90 % of the validation images
STRICT = 0.8  # nearer than that must be each digit under a hypothesis that is not the first


class Hypothesis(NamedTuple):
    """What may be the ink of a picture."""

    ink: Levels  # 0 where there is none
    full: float  # the level of full ink
    raw: Levels  # the picture's own levels, such that ink has more than its surroundings
    enough: float = 0.0  # the cost of what has been found up to which neither this one is tried nor those after it


def hypotheses(grey: Levels) -> Iterator[Hypothesis]:
    """Yield what may be the ink of a picture, the likeliest first; nothing if the picture is blank."""
    dark = 255 - grey
    found: list[Hypothesis] = []
    if is_flat := has_flat_background(grey):
        ink = np.abs(grey - grey[0, 0])
        if (full := full_level(ink)) >= MIN_CONTRAST:
            found.append(Hypothesis(ink, full, ink))
        even = [grey if grey[0, 0] > 127 else dark]  # the other one has been found
    else:
        paper = background(grey)
        # As a share of the light that the paper gets: so a shadow vanishes.
        shares: Levels = np.asarray((paper - grey) * (255 / paper.clip(128)), dtype=np.float32)
        uneven = (shares, dark), (grey + background(dark) - 255, grey)
        found += [one for values, raw in uneven if (one := subtract_background(values, raw))]
        even = [dark, grey]
    if not found:
        return
    enough = 1.0 if is_flat else GOOD
    yield from (one._replace(enough=enough) for one in found)
    yield from (one._replace(enough=enough) for raw in even if (one := subtract_background(raw - raw.min(), raw)))
    ink, full, raw, _ = found[0]
    for share in FAINT:
        rest = full * (1 - share) / 3  # so that strokes, whose edges are lighter, do not become much thinner
        yield Hypothesis((ink - share * full).clip(0, rest), rest, raw, STRICT)


def subtract_background(ink: Levels, raw: Levels) -> Hypothesis | None:
    """Return ink with background 0; None if there is only noise."""
    rest = ink[ink <= ink.max() / 2]  # which is mostly background, even where most of the picture is ink
    ink = ink - median(rest)
    noise = 1.4826 * median(np.abs(rest - median(rest)))  # the standard deviation, if it is normally distributed
    full = full_level(ink)
    if full < max(MIN_CONTRAST, NOISE_FACTOR * noise):
        return None
    ink[ink < NOISE_FACTOR / 2 * noise] = 0
    return Hypothesis(ink.clip(0, full), full, raw)


def full_level(ink: Levels) -> float:
    """Return the level of full ink: the highest one, but for single pixels."""
    if min(ink.shape) < 2:
        return float(ink.max())
    rows = ink[:-1] + ink[1:]
    return float((rows[:, :-1] + rows[:, 1:]).max()) / 4


def has_flat_background(grey: Levels) -> bool:
    """Return whether most of a picture has one level, as in drawings, and no shadow reaches its edges, only ink."""
    ink = np.abs(grey - grey[0, 0])
    darkest = max(edge.max() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
    return bool(np.count_nonzero(ink) < ink.size / 2 and not 0 < darkest < FLAT_PEAK * ink.max())


def median(values: NDArray[np.float32]) -> float:
    """Return the median; of many values, that of every seventh, which takes a seventh of the time."""
    return float(np.median(values[::7] if values.size > 10_000 else values))


def background(grey: Levels) -> Levels:
    """Return what a picture with dark ink would be without it: a grey closing, a maximum and then a minimum filter.

    A shadow, which is wider than the window, stays; so do the edges of light and shadow.
    """
    factor = grid_factor(grey, GRID_SIDE)
    cells = average(grey, factor)
    radius = int(max(cells.shape) * BACKGROUND_WINDOW / 2)
    closed = -window_max(-window_max(cells, radius), radius)
    size = (closed.shape[1] * factor, closed.shape[0] * factor)
    whole = np.asarray(Image.fromarray(closed).resize(size, Image.Resampling.BILINEAR))
    return whole[: grey.shape[0], : grey.shape[1]]
