"""Reads what is written on a picture: one digit or several, left to right, each predicted by itself.

What is ink in a picture, and which pieces of ink are a digit, is not known. So there are hypotheses: dark or light ink,
in even or uneven light, with or without faint lines; each piece of ink a digit, or several pieces together. The one
whose images are nearest to the training images is taken, and the first one that is near enough.
"""

from functools import reduce
from operator import itemgetter
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image

from pictures.grids import Levels, average, grid_factor, largest, window_max
from pictures.hypotheses import GOOD, STRICT, Hypothesis, hypotheses
from pictures.outcome import CONFIDENCES, MAX_DIGITS, Box, Digit, Prediction, Reading
from pictures.pieces import Mask, Part, Pieces, bounding_box, find_parts, find_pieces, gap, numbers_of, union
from pictures.prediction import Predictor
from pictures.preparation import resize, to_grey, to_mnist
from stage.dataset import DATA_SET
from stage.process import Failure

SEARCH_SIDE = 500  # pixels of the longer side of the picture on which digits are looked for
PIECE_SIDE = 200  # the same for connected pieces of ink
NOISE_SHARE = 0.35  # of the standard deviation that is left in means of 4 x 4 pixels: with less, there is only noise
PIECE_LEVEL = 0.25  # of full ink, in the darkest pixel of a grid's cell: what belongs to a piece of ink
JOINED = 0.3  # of the length of the largest part: how far apart two parts of a digit may be
DENSE = 75  # grey levels of an image's mean: above that of nearly all of MNIST's
# If more than NOT_ALONE of what is within CLOSE lengths of the ink is as dark, it is part of something larger.
CLOSE, NOT_ALONE = 0.15, 0.25
# Costs, of the distance that is UNLIKE:
SURROUNDINGS_COST = 0.7  # times how much of what is around the digits is as dark as they are
LATER_COST = 0.15  # of a hypothesis that is not the first
DIGIT_COST = 0.1  # of a digit
DENSE_COST = 9.0  # of an image that is dense


class Candidate(NamedTuple):
    """What may be a digit."""

    box: Box
    pixels: torch.Tensor  # uint8 [28, 28]
    distance: float = 0.0  # from the training images; 1 is UNLIKE
    prediction: Prediction | None = None  # once it is known


def read(image: Image.Image, predictor: Predictor) -> tuple[Reading, torch.Tensor]:
    """Read a picture; return also what the network sees, uint8 [H, W] or [H, W, 3], of several digits side by side.

    Raise Failure if it is blank.
    """
    if DATA_SET.preparation == "resize":
        pixels = resize(image)
        return cast(Reading, predictor.predict(pixels)), pixels
    grey = to_grey(image)
    candidates = find_digits(grey, predictor)
    longer = image.info.get("longer_side", max(image.size))
    # Of a picture that was reduced, the last pixels stand for one at least; so do the last cells of a grid.
    width, height = (1 + longer * (side - 1) // max(image.size) for side in image.size)
    digits: list[Digit] = []
    for candidate in candidates:
        top, left, bottom, right = scaled(candidate.box, longer / max(grey.shape))
        box = top, left, min(bottom, height), min(right, width)
        digits.append({**(candidate.prediction or predictor.predict(candidate.pixels)), "box": box})
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


def find_digits(grey: Levels, predictor: Predictor) -> list[Candidate]:
    """Return the digits of a picture, from left to right. Raise Failure if it is blank.

    They are looked for on a smaller picture, and then again in the part of the picture itself where they are.
    """
    factor = grid_factor(grey, SEARCH_SIDE)
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


def search(grey: Levels, predictor: Predictor) -> tuple[float, list[Candidate]]:
    """Return how unlike digits is what is on a picture, 1 for UNLIKE, and the digits, by the likeliest hypothesis."""
    remaining = hypotheses(grey)
    if not (first := next(remaining, None)):
        return float("inf"), []
    whole = all_as_one(first)
    prediction, distance = predictor.assess(whole.pixels)
    whole = whole._replace(prediction=prediction)
    is_one = distance <= GOOD and not has_gap(first, whole.box)
    if is_one or (distance + DIGIT_COST <= first.enough and not is_dense(whole.pixels) and is_one_part(first)):
        return distance, [whole]
    if average(grey, 4).std() <= NOISE_SHARE * grey.std():
        return float("inf"), []
    best = min((float("inf"), [whole]), divide(first, predictor), key=itemgetter(0))
    if best[0] <= first.enough:
        return best
    for hypothesis in remaining:
        if best[0] <= hypothesis.enough:
            break
        cost, digits = divide(hypothesis, predictor)
        if all(digit.distance <= STRICT for digit in digits):
            best = min(best, (cost + LATER_COST, digits), key=itemgetter(0))
        if best[0] <= hypothesis.enough:
            break
    return best


def all_as_one(hypothesis: Hypothesis) -> Candidate:
    """Return all ink as one digit."""
    ink, full, *_ = hypothesis
    box = top, left, bottom, right = bounding_box(ink >= PIECE_LEVEL * full)
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
    pieces, parts, _ = parts_of(hypothesis)
    return [len(part.numbers) for part in parts] == [pieces.max()]


def parts_of(hypothesis: Hypothesis) -> tuple[Pieces, list[Part], int]:
    """Return the piece of each cell of a grid, the parts of digits, and the side of a cell in pixels."""
    factor = grid_factor(hypothesis.ink, PIECE_SIDE)
    cells = largest(hypothesis.ink, factor)
    pieces, boxes = find_pieces(cells >= PIECE_LEVEL * hypothesis.full)
    return pieces, find_parts(cells, pieces, boxes), factor


def divide(hypothesis: Hypothesis, predictor: Predictor) -> tuple[float, list[Candidate]]:
    """Return how unlike digits the ink is, on average (1 is UNLIKE), and its likeliest digits, from left to right."""
    ink, full, raw, _ = hypothesis
    pieces, parts, factor = parts_of(hypothesis)
    if not 0 < len(parts) <= MAX_DIGITS:
        return float("inf"), []

    def cut_parts(some: list[Part]) -> Candidate:
        return cut_out(ink, full, np.isin(pieces, numbers_of(some)), pieces > 0, factor)

    parts = [part for part in parts if not part.at_edge or predictor.assess(cut_parts([part]).pixels)[1] <= STRICT]
    if not parts:
        return float("inf"), []
    chosen, levels = np.isin(pieces, numbers_of(parts)), average(raw, factor)
    if dark_share_around(levels, chosen, CLOSE) > NOT_ALONE:
        return float("inf"), []
    spans = find_spans(parts)
    candidates = [cut_parts(parts[start:end]) for start, end in spans]
    images = torch.stack([candidate.pixels for candidate in candidates])
    distances = predictor.distances(*predictor.forward(images))
    distances = [DENSE_COST if is_dense(image) else one for image, one in zip(images, distances, strict=True)]
    cost, digits = best_division(spans, candidates, distances)
    return cost / len(parts) + SURROUNDINGS_COST * dark_share_around(levels, chosen, 1), digits


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
        cost = best[start][0] + (end - start) * distance + DIGIT_COST
        if end == len(best):
            best.append((float("inf"), []))
        if cost < best[end][0]:
            best[end] = cost, [*best[start][1], candidate._replace(distance=distance)]
    return best[-1]


def dark_share_around(raw: Levels, chosen: Mask, reach: float) -> float:
    """Return how much of what is around the chosen cells is as dark as they are, or as light: 0 to 1.

    It is much where paper between strokes was taken for ink. Around is what is within `reach` lengths of the cells.
    """
    top, left, bottom, right = bounding_box(chosen)
    margin = 1 + int(reach * max(bottom - top, right - left))
    rows, columns = slice(max(0, top - margin), bottom + margin), slice(max(0, left - margin), right + margin)
    chosen, raw = chosen[rows, columns], raw[rows, columns]
    return float((raw[~chosen] >= np.median(raw[chosen])).mean()) if not chosen.all() else 0.0


def cut_out(ink: Levels, full: float, chosen: Mask, inked: Mask, factor: int) -> Candidate:
    """Return the digit that the chosen cells are, with the lighter edges of its strokes, without other inked cells."""
    top, left, bottom, right = bounding_box(chosen)
    margin = 1 + max(bottom - top, right - left) // 16  # strokes' edges are up to one of a digit's 20 pixels wide
    rows, columns = slice(max(0, top - margin), bottom + margin), slice(max(0, left - margin), right + margin)
    near = window_max(chosen[rows, columns].astype(np.float32), margin) > 0
    near &= chosen[rows, columns] | ~inked[rows, columns]
    inside = ink[rows.start * factor : rows.stop * factor, columns.start * factor : columns.stop * factor]
    mask = near.repeat(factor, 0).repeat(factor, 1)[: inside.shape[0], : inside.shape[1]]
    box = top * factor, left * factor, bottom * factor, right * factor
    return Candidate(box, torch.from_numpy(to_mnist(inside * mask, full)))


def scaled(box: Box, factor: float, top: int = 0, left: int = 0) -> Box:
    """Return a box in a picture that is so many times as large, and begins so far below and right of it."""
    return (
        top + round(factor * box[0]),
        left + round(factor * box[1]),
        top + round(factor * box[2]),
        left + round(factor * box[3]),
    )
