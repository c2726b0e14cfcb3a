"""Connected pieces of ink, and which of them are parts of digits: no frames, shadows and specks."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pictures.grids import Levels
from pictures.outcome import Box

MAX_PIECES = 40  # of ink that are looked at: the largest
PEAK = 0.5  # of the darkest level of all pieces: a piece all lighter is a shadow
EDGE_STRIP = 0.1  # of the picture's shorter side: ink no further from the edge is a frame
EDGE_SHARE = 0.25  # of the picture's edge: ink along as much of it is a frame, or what lies beside the paper
SPECK = 0.03  # of the area of the largest piece: what is smaller is dropped
SHORT = 0.4  # of the length of the largest piece: what is shorter is no digit, and dropped unless it is near one
NEAR = 0.15  # of the length of the largest piece

Mask = NDArray[np.bool_]  # [height, width]
Pieces = NDArray[np.int64]  # [height, width]: the number of each cell's piece, from 1; 0 where there is none


class Part(NamedTuple):
    """Pieces of ink that belong together."""

    numbers: list[int]
    box: Box
    at_edge: bool  # of the picture, where others are not: more likely what lies beside the paper than a digit


def find_parts(cells: Levels, pieces: Pieces, boxes: list[Box]) -> list[Part]:
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
    for n in sorted(numbers, key=lambda n: (length[n] < SHORT * longest, box[n][1])):
        if length[n] < SHORT * longest:  # after all others
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

    The latter are beside the former, and about as high; they may be frames, too. If there are none of the former, all
    but frames are, or all.
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


def union(one: Box, other: Box) -> Box:
    """Return the smallest box that contains two."""
    return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])


def gap(one: Box, other: Box) -> int:
    """Return the distance of two boxes, along the axis along which it is longer; negative if they overlap."""
    return max(max(one[axis], other[axis]) - min(one[axis + 2], other[axis + 2]) for axis in (0, 1))


def overlap(one: Box, other: Box) -> float:
    """Return how much of the narrower of two boxes is above or below the other, as a share of its width."""
    return (min(one[3], other[3]) - max(one[1], other[1])) / min(one[3] - one[1], other[3] - other[1])


def bounding_box(mask: Mask) -> Box:
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
