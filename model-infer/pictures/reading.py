"""Reads what is written on a picture: one digit or several, left to right, each predicted by itself.

What is ink in a picture, and which pieces of ink are a digit, is not known. So there are hypotheses: dark or light ink,
in even or uneven light, with or without faint lines; each piece of ink a digit, or several pieces together. The one
whose images are nearest to the training images is taken, and the first one that is near enough.
"""

from collections.abc import Iterator
from functools import reduce
from operator import itemgetter
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pictures.outcome import CONFIDENCES, MAX_DIGITS, Box, Digit, Prediction, Reading
from pictures.picture import Ink, average, largest, resize, to_grey, to_mnist, window_max
from pictures.prediction import Predictor
from stage.dataset import DATA_SET
from stage.process import Failure

SEARCH_SIDE = 500  # pixels of the longer side of the picture on which digits are looked for
GRID_SIDE = 100  # cells of the longer side of the grid on which uneven light is looked for
PIECE_SIDE = 200  # the same for connected pieces of ink
MAX_PIECES = 40  # of ink that are looked at: the largest
BACKGROUND_WINDOW = 0.2  # of the longer side: what is narrower may be ink, what is wider is background
MIN_CONTRAST = 20  # grey levels between ink and background; with less, a picture is blank
NOISE_SHARE = 0.35  # of the standard deviation that is left in means of 4 x 4 pixels: with less, there is only noise
NOISE_FACTOR = 6  # standard deviations of the background's noise that ink must exceed
FAINT = (0.35, 0.65)  # of full ink: lines on the paper are at most as dark as that
PIECE_LEVEL = 0.25  # of full ink, in the darkest pixel of a grid's cell: what belongs to a piece of ink
FLAT_PEAK = 0.75  # of the darkest level: what reaches the edges of a flat background and is all lighter is a shadow
PEAK = 0.5  # of the darkest level of all pieces: a piece all lighter is a shadow
EDGE_STRIP = 0.1  # of the picture's shorter side: ink no further from the edge is a frame
EDGE_SHARE = 0.25  # of the picture's edge: ink along as much of it is a frame, or what lies beside the paper
SPECK = 0.03  # of the area of the largest piece: what is smaller is dropped
SMALL = 0.4  # of the length of the largest piece: what is shorter is no digit, and dropped unless it is near one
NEAR = 0.15  # of the length of the largest piece
JOINED = 0.3  # of the same length: how far apart two parts of a digit may be
DENSE = 75  # grey levels of an image's mean: above that of nearly all of MNIST's
OTHERS = 0.7  # of the distance that is UNLIKE: the cost where all around the digits is as dark as they are
CLOSE, NOT_ALONE = 0.15, 0.25  # if more than this share of what is so close, in lengths, is as dark: parts of something
GOOD = 0.4  # of that distance: as near as 90 % of the validation images
STRICT = 0.8  # of that distance: nearer than that must be each digit under a hypothesis that is not the first
LATER = 0.15  # of that distance: what such a hypothesis must make up for
EACH = 0.1  # of the distance that is UNLIKE: what another digit must make up for

Mask = NDArray[np.bool_]  # [height, width]
Pieces = NDArray[np.int64]  # [height, width]: the number of each cell's piece, from 1; 0 where there is none


class Hypothesis(NamedTuple):
    """What may be the ink of a picture."""

    ink: Ink  # 0 where there is none
    full: float  # the level of full ink
    raw: Ink  # the picture's own levels, such that ink has more than its surroundings
    enough: float = 0.0  # neither tried nor followed by others if what has been found is less unlike digits than that


class Candidate(NamedTuple):
    """What may be a digit."""

    box: Box
    pixels: torch.Tensor  # uint8 [28, 28]
    distance: float = 0.0  # from the training images; 1 is UNLIKE
    prediction: Prediction | None = None  # once it is known


class Part(NamedTuple):
    """Pieces of ink that belong together."""

    numbers: list[int]
    box: Box
    at_edge: bool  # of the picture, where others are not: more likely what lies beside the paper than a digit


def read(image: Image.Image, predictor: Predictor) -> tuple[Reading, torch.Tensor]:
    """Read a picture; return also what the network sees, uint8 [H, W] or [H, W, 3], of several digits side by side.

    Raise Failure if it is blank.
    """
    if DATA_SET.preparation == "resize":
        pixels = resize(image)
        return cast(Reading, predictor.predict(pixels)), pixels
    grey = to_grey(image)
    candidates = find_digits(grey, predictor)
    scale = image.info.get("longer_side", max(image.size)) / max(grey.shape)
    digits: list[Digit] = [
        {**(candidate.prediction or predictor.predict(candidate.pixels)), "box": scaled(candidate.box, scale)}
        for candidate in candidates
    ]
    return as_reading(digits), torch.cat([candidate.pixels for candidate in candidates], 1)


def as_reading(digits: list[Digit]) -> Reading:
    """Return the reading of a picture with these digits."""
    least = min(digits, key=lambda digit: (CONFIDENCES.index(digit["confidence"]), max(digit["probabilities"])))
    return {
        "prediction": least["prediction"] if len(digits) == 1 else None,
        "probabilities": least["probabilities"],
        "confidence": least["confidence"],
        "digits": digits,
    }


def find_digits(grey: Ink, predictor: Predictor) -> list[Candidate]:
    """Return the digits of a picture, from left to right. Raise Failure if it is blank.

    They are looked for on a smaller picture, and then again in the part of the picture itself where they are.
    """
    factor = 1 + (max(grey.shape) - 1) // SEARCH_SIDE
    digits = search(average(grey, factor), predictor)[1]
    if not digits:
        raise Failure("blank: there is nothing to read on it")
    if factor > 1:
        top, left, bottom, right = scaled(reduce(union, (digit.box for digit in digits)), factor)
        margin = (bottom - top) // 2
        top, left = max(0, top - margin), max(0, left - margin)
        part = grey[top : bottom + margin, left : right + margin]
        if max(part.shape) <= SEARCH_SIDE:
            closer, found = search(part, predictor)
            if len(found) == len(digits) and closer <= 1:
                return [one._replace(box=scaled(one.box, 1, top, left)) for one in found]
    return [one._replace(box=scaled(one.box, factor)) for one in digits]


def search(grey: Ink, predictor: Predictor) -> tuple[float, list[Candidate]]:
    """Return how unlike digits is what is on a picture, 1 for UNLIKE, and the digits, by the likeliest hypothesis."""
    best: tuple[float, list[Candidate]] = (float("inf"), [])
    for number, hypothesis in enumerate(hypotheses(grey)):
        if number == 0:
            whole = all_as_one(hypothesis)
            prediction, distance = predictor.assess(whole.pixels)
            best = float("inf"), [whole._replace(prediction=prediction)]
            if distance <= GOOD and not has_gap(hypothesis, whole.box):
                return distance, best[1]
            if distance + EACH <= hypothesis.enough and not is_dense(whole.pixels) and is_one_part(hypothesis):
                return distance, best[1]
            if average(grey, 4).std() <= NOISE_SHARE * grey.std():
                return float("inf"), []
        elif best[0] <= hypothesis.enough:
            break
        cost, digits = divide(hypothesis, predictor)
        if number == 0 or all(digit.distance <= STRICT for digit in digits):
            best = min(best, (cost + LATER * (number > 0), digits), key=itemgetter(0))
        if best[0] <= hypothesis.enough:
            break
    return best


# What is ink ----------------------------------------------------------------------------------------------------------


def hypotheses(grey: Ink) -> Iterator[Hypothesis]:
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
        shares: Ink = np.asarray((paper - grey) * (255 / paper.clip(128)), dtype=np.float32)
        uneven = (shares, dark), (grey + background(dark) - 255, grey)
        found += [one for values, raw in uneven if (one := level(values, raw))]
        even = [dark, grey]
    if not found:
        return
    enough = 1.0 if is_flat else GOOD
    yield from (one._replace(enough=enough) for one in found)
    yield from (one._replace(enough=enough) for raw in even if (one := level(raw - raw.min(), raw)))
    ink, full, raw, _ = found[0]
    for share in FAINT:
        rest = full * (1 - share) / 3  # so that strokes, whose edges are lighter, do not become much thinner
        yield Hypothesis((ink - share * full).clip(0, rest), rest, raw, STRICT)


def level(ink: Ink, raw: Ink) -> Hypothesis | None:
    """Return ink with background 0; None if there is only noise."""
    rest = ink[ink <= ink.max() / 2]  # which is mostly background, even where most of the picture is ink
    ink = ink - median(rest)
    noise = 1.4826 * median(np.abs(rest - median(rest)))  # the standard deviation, if it is normally distributed
    full = full_level(ink)
    if full < max(MIN_CONTRAST, NOISE_FACTOR * noise):
        return None
    ink[ink < NOISE_FACTOR / 2 * noise] = 0
    return Hypothesis(ink.clip(0, full), full, raw)


def full_level(ink: Ink) -> float:
    """Return the level of full ink: the highest one, but for single pixels."""
    if min(ink.shape) < 2:
        return float(ink.max())
    rows = ink[:-1] + ink[1:]
    return float((rows[:, :-1] + rows[:, 1:]).max()) / 4


def has_flat_background(grey: Ink) -> bool:
    """Return whether most of a picture has one level, as in drawings, and no shadow reaches its edges, only ink."""
    ink = np.abs(grey - grey[0, 0])
    darkest = max(edge.max() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
    return bool(np.count_nonzero(ink) < ink.size / 2 and not 0 < darkest < FLAT_PEAK * ink.max())


def median(values: NDArray[np.float32]) -> float:
    """Return the median; of many values, that of every seventh, which takes a seventh of the time."""
    return float(np.median(values[::7] if values.size > 10_000 else values))


def background(grey: Ink) -> Ink:
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


def grid_factor(values: Ink, side: int) -> int:
    """Return the side of a grid's cell in pixels, so that the longer side has so many cells at most."""
    return 1 + (int(max(values.shape)) - 1) // side


# What is a digit ------------------------------------------------------------------------------------------------------


def all_as_one(hypothesis: Hypothesis) -> Candidate:
    """Return all ink as one digit."""
    ink, full, *_ = hypothesis
    box = top, left, bottom, right = bounds(ink >= PIECE_LEVEL * full)
    margin = 1 + max(bottom - top, right - left) // 16  # the strokes' edges are lighter
    inside = ink[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin]
    return Candidate(box, torch.from_numpy(to_mnist(inside, full)))


def has_gap(hypothesis: Hypothesis, box: Box) -> bool:
    """Return whether a column without ink divides the ink in a box."""
    inside = hypothesis.ink[box[0] : box[2], box[1] : box[3]]
    return bool((inside.max(0) < PIECE_LEVEL * hypothesis.full).any())


def is_dense(pixels: torch.Tensor) -> bool:
    """Return whether an image, uint8 [28, 28], has more ink than digits have."""
    return pixels.sum().item() > DENSE * pixels.numel()


def is_one_part(hypothesis: Hypothesis) -> bool:
    """Return whether all ink is one part of a digit, which leaves nothing to divide."""
    ink, full, *_ = hypothesis
    cells = largest(ink, grid_factor(ink, PIECE_SIDE))
    pieces, boxes = find_pieces(cells >= PIECE_LEVEL * full)
    return len(boxes) == 1 or [len(part.numbers) for part in find_parts(cells, pieces, boxes)] == [len(boxes)]


def divide(hypothesis: Hypothesis, predictor: Predictor) -> tuple[float, list[Candidate]]:
    """Return how unlike digits the ink is, on average (1 is UNLIKE), and its likeliest digits, from left to right."""
    ink, full, raw, _ = hypothesis
    factor = grid_factor(ink, PIECE_SIDE)
    cells = largest(ink, factor)
    pieces, boxes = find_pieces(cells >= PIECE_LEVEL * full)
    parts = find_parts(cells, pieces, boxes)
    if not 0 < len(parts) <= MAX_DIGITS:
        return float("inf"), []

    def cut_parts(some: list[Part]) -> Candidate:
        return cut_out(ink, full, np.isin(pieces, numbers_of(some)), pieces > 0, factor)

    parts = [part for part in parts if not part.at_edge or predictor.assess(cut_parts([part]).pixels)[1] <= STRICT]
    if not parts:
        return float("inf"), []
    chosen, levels = np.isin(pieces, numbers_of(parts)), average(raw, factor)
    if others(levels, chosen, CLOSE) > NOT_ALONE:
        return float("inf"), []
    spans = find_spans(parts)
    candidates = [cut_parts(parts[start:end]) for start, end in spans]
    images = torch.stack([candidate.pixels for candidate in candidates])
    distances = predictor.distances(*predictor.forward(images))
    distances = [9.0 if is_dense(image) else one for image, one in zip(images, distances, strict=True)]
    cost, digits = best_division(spans, candidates, distances)
    return cost / len(parts) + OTHERS * others(levels, chosen, 1), digits


def find_spans(parts: list[Part]) -> list[tuple[int, int]]:
    """Return which parts, from one to before another, may be a digit together: up to three that are close."""
    longest = max(max(part.box[2] - part.box[0], part.box[3] - part.box[1]) for part in parts)
    spans = []
    for end in range(1, len(parts) + 1):
        start = end - 1
        spans.append((start, end))
        while start > max(0, end - 3) and gap(parts[start - 1].box, parts[start].box) <= JOINED * longest:
            start -= 1
            spans.append((start, end))
    return spans


def best_division(
    spans: list[tuple[int, int]], candidates: list[Candidate], distances: list[float]
) -> tuple[float, list[Candidate]]:
    """Return the least cost of dividing all parts into digits, and these digits, by dynamic programming."""
    best: list[tuple[float, list[Candidate]]] = [(0.0, [])]  # of the first parts: none, one, two ...
    for (start, end), candidate, distance in zip(spans, candidates, distances, strict=True):
        cost = best[start][0] + (end - start) * distance + EACH
        if end == len(best):
            best.append((float("inf"), []))
        if cost < best[end][0]:
            best[end] = cost, [*best[start][1], candidate._replace(distance=distance)]
    return best[-1]


def others(raw: Ink, chosen: Mask, reach: float) -> float:
    """Return how much of what is around the chosen cells is as dark as they are, or as light: 0 to 1.

    It is much where what was chosen is not ink, but paper between strokes. Around is what is within their length, times
    reach.
    """
    top, left, bottom, right = bounds(chosen)
    margin = 1 + int(reach * max(bottom - top, right - left))
    rows, columns = slice(max(0, top - margin), bottom + margin), slice(max(0, left - margin), right + margin)
    chosen, raw = chosen[rows, columns], raw[rows, columns]
    return float((raw[~chosen] >= np.quantile(raw[chosen], 0.5)).mean()) if not chosen.all() else 0.0


def cut_out(ink: Ink, full: float, chosen: Mask, inked: Mask, factor: int) -> Candidate:
    """Return the digit that the chosen cells are, with the lighter edges of its strokes, without other inked cells."""
    top, left, bottom, right = bounds(chosen)
    margin = 1 + max(bottom - top, right - left) // 16  # strokes' edges are up to one of a digit's 20 pixels wide
    rows, columns = slice(max(0, top - margin), bottom + margin), slice(max(0, left - margin), right + margin)
    near = window_max(chosen[rows, columns].astype(np.float32), margin) > 0
    near &= chosen[rows, columns] | ~inked[rows, columns]
    inside = ink[rows.start * factor : rows.stop * factor, columns.start * factor : columns.stop * factor]
    mask = near.repeat(factor, 0).repeat(factor, 1)[: inside.shape[0], : inside.shape[1]]
    box = top * factor, left * factor, bottom * factor, right * factor
    return Candidate(box, torch.from_numpy(to_mnist(inside * mask, full)))


def find_parts(cells: Ink, pieces: Pieces, boxes: list[Box]) -> list[Part]:
    """Return parts of digits, each the numbers of its pieces, from left to right: no frames, shadows and specks."""
    areas = np.bincount(pieces.ravel())[1:]
    largest_first = [int(number) for number in 1 + np.argsort(-areas)[:MAX_PIECES]]
    box = {n: boxes[n - 1] for n in largest_first}
    numbers, edge = inner_pieces(pieces, box)
    peak = {n: cells[box[n][0] : box[n][2], box[n][1] : box[n][3]].max() for n in [*numbers, *edge]}
    numbers = [n for n in [*numbers, *edge] if peak[n] >= PEAK * max(peak[m] for m in numbers)]
    length = {n: max(box[n][2] - box[n][0], box[n][3] - box[n][1]) for n in numbers}
    longest = max(length.values())
    parts: list[Part] = []
    for n in sorted(numbers, key=lambda n: (length[n] < SMALL * longest, box[n][1])):
        if length[n] < SMALL * longest:  # after all others
            nearest = min(range(len(parts)), key=lambda i: gap(parts[i].box, box[n]))
            if gap(parts[nearest].box, box[n]) > NEAR * longest or areas[n - 1] < SPECK * areas.max():
                continue
        elif parts and overlap(parts[-1].box, box[n]) >= 0.5:
            nearest = len(parts) - 1
        else:
            nearest = len(parts)
            parts.append(Part([], box[n], n in edge))
        parts[nearest] = Part([*parts[nearest].numbers, n], union(parts[nearest].box, box[n]), parts[nearest].at_edge)
    return parts


def inner_pieces(pieces: Pieces, box: dict[int, Box]) -> tuple[list[int], list[int]]:
    """Return the pieces that are away from the picture's edge and no frames, and others that may be digits too.

    The latter are beside the former, and about as high. If there are none of the former, all but frames are, or all.
    """
    height, width = pieces.shape
    frames = [n for n, (top, left, bottom, right) in box.items()
              if is_frame(pieces[top:bottom, left:right] == n, box[n], pieces.shape)]  # fmt: skip
    unframed = [n for n in box if n not in frames] or [*box]
    inner = [n for n in unframed if box[n][0] and box[n][1] and box[n][2] < height and box[n][3] < width] or unframed
    highest = max(box[n][2] - box[n][0] for n in inner)
    similar = [n for n in box if n not in inner and 0.6 * highest <= box[n][2] - box[n][0] <= 1.4 * highest]
    return inner, [n for n in similar if all(overlap(box[n], box[m]) <= 0 for m in inner)]


def numbers_of(parts: list[Part]) -> list[int]:
    """Return the numbers of all pieces of some parts."""
    return [number for part in parts for number in part.numbers]


def scaled(box: Box, factor: float, top: int = 0, left: int = 0) -> Box:
    """Return a box in a picture that is so many times as large, and begins so far below and right of it."""
    return (
        top + round(factor * box[0]),
        left + round(factor * box[1]),
        top + round(factor * box[2]),
        left + round(factor * box[3]),
    )


def union(one: Box, other: Box) -> Box:
    """Return the smallest box that contains two."""
    return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])


def gap(one: Box, other: Box) -> int:
    """Return the distance of two boxes, along the axis along which it is longer; negative if they overlap."""
    return max(max(one[axis], other[axis]) - min(one[axis + 2], other[axis + 2]) for axis in (0, 1))


def overlap(one: Box, other: Box) -> float:
    """Return how much of the narrower of two boxes is above or below the other, as a share of its width."""
    return (min(one[3], other[3]) - max(one[1], other[1])) / min(one[3] - one[1], other[3] - other[1])


def bounds(mask: Mask) -> Box:
    """Return the smallest box that contains a mask."""
    rows, columns = (np.nonzero(mask.any(axis))[0].tolist() for axis in (1, 0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def find_pieces(mask: Mask) -> tuple[Pieces, list[Box]]:
    """Return the connected pieces of a mask, corners included: the number of each cell's piece, from 1, and the boxes.

    Each run of cells in a row gets the least number of the runs that it touches in the rows above and below, again and
    again, until no number changes.
    """
    height, width = mask.shape
    steps = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (rows, starts), ends = np.nonzero(steps == 1), np.nonzero(steps == -1)[1]
    row, count = rows * (width + 2), len(rows)
    first = np.searchsorted(row + ends, row - (width + 2) + starts)  # of the runs in the row above that it touches
    touched = np.searchsorted(row + starts, row - (width + 2) + ends, "right") - first
    below = np.arange(count).repeat(touched)
    above = np.arange(len(below)) + (first - touched.cumsum() + touched).repeat(touched)
    numbers, previous = np.arange(count), None
    while previous is None or (numbers != previous).any():
        previous = numbers.copy()
        one, other = numbers[above], numbers[below]
        np.minimum.at(numbers, np.maximum(one, other), np.minimum(one, other))
        numbers = numbers[numbers]
    _, numbers = np.unique(numbers, return_inverse=True)
    pieces = np.zeros(mask.shape, dtype=np.int64)
    pieces[mask] = (numbers + 1).repeat(ends - starts)
    boxes = np.tile([height, width, 0, 0], (int(numbers.max(initial=-1)) + 1, 1))
    np.minimum.at(boxes[:, 0], numbers, rows)
    np.minimum.at(boxes[:, 1], numbers, starts)
    np.maximum.at(boxes[:, 2], numbers, rows + 1)
    np.maximum.at(boxes[:, 3], numbers, ends)
    return pieces, [tuple(box) for box in boxes.tolist()]


def is_frame(inside: Mask, box: Box, shape: tuple[int, ...]) -> bool:
    """Return whether a piece of ink runs along the picture's edge, or from edge to edge, or all along its own box.

    The piece is given by its cells in its box, the picture by its height and width.
    """
    top, left, bottom, right = box
    touched = top == 0, bottom == shape[0], left == 0, right == shape[1]
    if (touched[0] and touched[1]) or (touched[2] and touched[3]):
        return True
    sides = inside[0], inside[-1], inside[:, 0], inside[:, -1]
    lengths = shape[1], shape[1], shape[0], shape[0]
    if any(at and side.sum() >= EDGE_SHARE * all_ for at, side, all_ in zip(touched, sides, lengths, strict=True)):
        return True
    strip = EDGE_STRIP * min(shape)
    if bottom <= strip or right <= strip or top >= shape[0] - strip or left >= shape[1] - strip:
        return True
    margin = 1 + max(inside.shape) // 20
    strips = inside[:margin], inside[-margin:], inside[:, :margin].T, inside[:, -margin:].T
    is_hollow = inside.mean() < 0.5  # unlike a straight 1
    return is_hollow and max(inside.shape) > shape[0] / 4 and all(one.any(0).mean() > 0.8 for one in strips)
