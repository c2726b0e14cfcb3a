"""Turns any picture into the image that the network gets, as DATA_SET.preparation says.

"resize" takes no more than resize(). The rest is for "digit", and makes an image of a digit the way MNIST was made.

How MNIST was made is lost. The reconstruction of Yadav and Bottou (2019), "Cold Case: The Lost MNIST Digits", is within
3 grey levels of it: the tight box of the ink becomes a square, which is area-averaged to 20 x 20 pixels, scaled so that
full ink is 255, and placed into 28 x 28 by its centre of mass. Before that, a photograph or scan is made even: turned
upright, dark ink and light ink told apart, the light of the background taken off, specks and frames dropped.

Pixels are numbers of ink in here: 0 is background, 255 full ink, as in MNIST.
"""

import io
import subprocess
import sys
import warnings
from contextlib import suppress
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFile, ImageFilter, ImageOps, UnidentifiedImageError

from pictures import heic
from stage import images
from stage.dataset import DATA_SET
from stage.process import Failure

# Other formats are not opened: some are programs, or contain a picture of any format and size.
LINE_BY_LINE = ("BMP", "DIB", "GIF", "ICO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF")
# Bytes a pixel, at most, to decode and prepare a picture: by its format, or by its mode if it is decoded line by line.
# Measured as in tests/test_picture.py; AVIF may have more bits than Pillow writes, which takes more.
FORMAT_BYTES = {"JPEG2000": 25, "WEBP": 18, "AVIF": 20, "JPEG": 5, "MPO": 5}
MODE_BYTES = {"1": 4, "L": 4, "P": 8, "CMYK": 12, "I;16": 14, "I": 30, "F": 30}
OTHER_BYTES = 10
MAX_PIXELS = 60_000_000  # telephones make 50.1 million
MEMORY = 400_000_000  # bytes for a picture, beside its file; and for the process that decodes a HEIC
HEIC_SECONDS = 15  # to decode a HEIC, in a process of its own
HEIC_REFUSALS = {
    heic.TOO_LARGE: f"a picture of more than {MAX_PIXELS:,} pixels",
    heic.NO_LIBRARY: "a HEIC, which takes libde265 to decode, not installed here. Use Docker, or save it as JPEG",
}
END_OF_JPEG = b"\xff\xd9"
DAMAGED = "a damaged picture, which cannot be decoded"
WORKING_SIDE = 1000  # pixels of the longer side, to which larger pictures are reduced
GRID_SIDE = 100  # cells of the longer side of the grid on which light and connected pieces of ink are looked for

# Found by trial on pictures as tests/rendering.py makes them; window and grid by the accuracy on validation images.
BACKGROUND_WINDOW = 0.2  # of the longer side: what is narrower may be ink, what is wider is background
MIN_CONTRAST = 20  # grey levels between ink and background; with less, a picture is blank
NOISE_FACTOR = 6  # standard deviations of the background's noise that ink must exceed
PIECE_LEVEL = 0.25  # of full ink, in the darkest pixel of a grid's cell: what belongs to a piece of ink
BOX_LEVEL = 0.05  # of full ink, averaged over a twentieth of the digit: what belongs to its tight box
SPECK = 0.03  # of the cells of the main piece: what is smaller is dropped
PEAK = 0.5  # of the darkest level of the main piece: a piece all lighter is a shadow
FLAT_PEAK = 0.75  # of the darkest level: what reaches the edges of a flat background and is all lighter is a shadow
EDGE_STRIP = 0.1  # of the picture's shorter side: ink no further from the edge is a frame
EDGE_SHARE = 0.25  # of the picture's edge: ink along as much of it is a frame, or what lies beside the paper
DIGIT_SHARE = 0.1  # of the picture's shorter side: a piece of ink as long as that can be the digit in a frame
MIN_SIDE = 10  # pixels of the square that a digit is put in, at least (Yadav and Bottou)

# A picture may claim any size; beyond twice this number Pillow refuses to decode it, in whatever part of a file it is.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # for half of what is refused

Ink = NDArray[np.float32]  # [height, width]
Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are excluded


def open_picture(content: bytes | bytearray) -> Image.Image:
    """Return the picture in a file, upright, of one of the formats above, or a HEIC; the first of several.

    Raise Failure if there is none, or it is damaged, or too large.
    """
    try:
        Image.init()
        formats = [name for name in Image.OPEN if name in LINE_BY_LINE or name in FORMAT_BYTES]
        content = decode_heic(content) if is_heic(content) else content
        with Image.open(io.BytesIO(content), formats=formats) as image:
            pixels = image.width * image.height
            # Of a JPEG only as many pixels are decoded as will be looked at.
            image.draft(None, (WORKING_SIDE, WORKING_SIDE))
            needed = needed_memory(image, pixels)
            if needed > MEMORY:
                limits = f"takes {needed // 10**6:,} MB to decode, of at most {MEMORY // 10**6:,} MB"
                raise Failure(f"too many pixels: this {image.format} ({image.mode}) {limits}")
            if image.format in ("JPEG", "MPO"):
                return upright(load_jpeg(image, content))
            image.load()
            return upright(image.getchannel("L") if image.mode == "LAB" else image)  # Pillow cannot convert Lab colours
    except Failure:
        raise
    except UnidentifiedImageError:
        raise Failure("not a picture of a known format") from None
    except Image.DecompressionBombError:
        raise Failure(f"a picture of more than {MAX_PIXELS:,} pixels") from None
    except Exception:  # a damaged file ends Pillow's decoders in any of a dozen ways
        raise Failure(DAMAGED) from None


def is_heic(content: bytes | bytearray) -> bool:
    """Return whether a file is a HEIC, by its first box. An AVIF, which Pillow reads, has boxes too."""
    brands = bytes(content[8:64])
    return content[4:8] == b"ftyp" and b"avi" not in brands and any(name in brands for name in (b"hei", b"mif1"))


def decode_heic(content: bytes | bytearray) -> bytes:
    """Return a HEIC as a PPM, upright, decoded by a process of its own. Raise Failure if that is not possible."""
    command = [sys.executable, "-I", heic.__file__, *map(str, (MAX_PIXELS, MEMORY, WORKING_SIDE))]
    try:
        result = subprocess.run(command, input=content, capture_output=True, timeout=HEIC_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failure(f"a HEIC that takes more than {HEIC_SECONDS} s to decode") from None
    if result.returncode != 0:
        raise Failure(HEIC_REFUSALS.get(result.returncode, DAMAGED))
    return result.stdout


def load_jpeg(image: ImageFile.ImageFile, content: bytes | bytearray) -> Image.Image:
    """Decode a JPEG, also one whose end is missing. Raise Failure if that is more than half."""
    rows = image.height
    try:
        image.load()
    except OSError:
        image.fp = io.BytesIO(content + END_OF_JPEG)  # with which libjpeg takes what is missing for grey
        image.load()
        # The rows that end in that grey, at most a step from 127.5, are not all there; the one above has some of it.
        ends = np.asarray(image.crop((image.width - 8, 0, image.width, rows)), dtype=np.float32).reshape(rows, -1)
        last = int(np.nonzero((np.abs(ends - 127.5) > 1).any(1))[0].max(initial=0))
        rows = last if last < rows - 1 else rows
        if rows < image.height / 2:
            raise Failure("a JPEG of which more than half is missing") from None
    whole = image if rows == image.height else image.crop((0, 0, image.width, rows))
    # Pillow takes CMYK for inverted, as Adobe's programs store it and say so.
    return ImageChops.invert(whole) if whole.mode == "CMYK" and "adobe" not in image.info else whole


def needed_memory(image: Image.Image, pixels: int) -> int:
    """Return the bytes that it takes to decode and prepare a picture of so many pixels, fewer after draft()."""
    each = FORMAT_BYTES.get(image.format or "", MODE_BYTES.get(image.mode, OTHER_BYTES))
    # Of a progressive JPEG, libjpeg keeps 2 bytes for each pixel and band, of the whole picture.
    coefficients = 2 * len(image.getbands()) * pixels if image.format in ("JPEG", "MPO") else 0
    return each * image.width * image.height + coefficients


def upright(image: Image.Image) -> Image.Image:
    """Turn and mirror a picture as its EXIF says; return it as it is if that cannot be read."""
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies even what is upright
    return image


def prepare(image: Image.Image) -> torch.Tensor:
    """Return the image that the network gets for a picture, uint8 [H, W] or [H, W, 3], as the data set prepares it."""
    return prepare_digit(image) if DATA_SET.preparation == "digit" else resize(image)


def resize(image: Image.Image) -> torch.Tensor:
    """Return a picture in the data set's colours and size, uint8 [H, W] or [H, W, 3]; its own pixels if it has them."""
    return torch.from_numpy(np.array(images.fit(stretch(image) if image.mode.startswith(("I", "F")) else image)))


def prepare_digit(image: Image.Image) -> torch.Tensor:
    """Return an image like MNIST's, uint8 [28, 28], for a picture of one digit. Raise Failure if it is blank."""
    grey = to_grey(image)
    ink, full = level(grey)
    ink = keep_digit(ink, full)
    return torch.from_numpy(to_mnist(ink, tight_box(ink, full)))


# From a picture to its ink --------------------------------------------------------------------------------------------


def to_grey(image: Image.Image) -> Ink:
    """Return the grey levels of a picture, 0 to 255, float32 [height, width], at most WORKING_SIDE long."""
    if image.mode.startswith(("I", "F")):
        image = stretch(image)
    if image.mode in ("P", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    factor = -(-max(image.size) // WORKING_SIDE)
    alpha = None
    if image.mode in ("RGBA", "LA"):
        alpha = shrink(image.getchannel("A"), factor) / np.float32(255)
    grey = shrink(image.convert("L"), factor)
    return grey if alpha is None or alpha.min() == 1 else fill_transparent(grey, alpha)


def stretch(image: Image.Image) -> Image.Image:
    """Scale a picture of 16 or 32 bits a pixel to 8 bits, from its darkest to its lightest level.

    Only levels that two neighbours reach count, where there are any: a sensor may have single pixels that are stuck.
    """
    values = np.asarray(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, posinf=0, neginf=0)
    pairs = [pair for pair in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1])) if pair[0].size]
    low = min((float(np.maximum(*pair).min()) for pair in pairs), default=0)
    high = max((float(np.minimum(*pair).max()) for pair in pairs), default=0)
    if low >= high:
        low, high = float(values.min()), float(values.max())
    scaled = values.astype(np.float32)  # in place from here on: a picture may be large
    scaled -= low
    scaled *= 255 / max(high - low, 1e-9)
    return Image.fromarray(scaled.clip(0, 255, out=scaled).astype(np.uint8))


def shrink(image: Image.Image, factor: int) -> Ink:
    """Reduce a picture of one channel by a whole factor, averaging, to float32 [height, width]."""
    return np.asarray(image.reduce(factor) if factor > 1 else image, dtype=np.float32)


def fill_transparent(grey: Ink, alpha: Ink) -> Ink:
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


def level(grey: Ink) -> tuple[Ink, float]:
    """Return the ink of a picture, with background 0, and the level of full ink. Raise Failure if it is blank."""
    if has_flat_background(grey):
        ink = np.abs(grey - grey[0, 0])
    elif has_dark_ink(grey):
        paper = background(grey)
        ink = 255 - 255 * grey / paper.clip(64)  # as a share of the light that the paper gets: so a shadow vanishes
    else:
        ink = 255 - grey
        ink = background(ink) - ink
    rest = ink[ink <= ink.max() / 2]  # which is mostly background, even where most of the picture is ink
    ink -= median(rest)
    noise = 1.4826 * median(np.abs(rest - median(rest)))  # the standard deviation, if it is normally distributed
    full = float(average(ink, 2).max())
    if full < max(MIN_CONTRAST, NOISE_FACTOR * noise):
        raise Failure("blank: there is nothing to read on it")
    ink[ink < NOISE_FACTOR / 2 * noise] = 0
    return ink.clip(0, full), full


def has_flat_background(grey: Ink) -> bool:
    """Return whether most of a picture has one level, as in drawings, and no shadow reaches its edges, only ink."""
    ink = np.abs(grey - grey[0, 0])
    darkest = max(edge.max() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
    return bool(np.count_nonzero(ink) < ink.size / 2 and not 0 < darkest < FLAT_PEAK * ink.max())


def has_dark_ink(grey: Ink) -> bool:
    """Return whether what stands out from its surroundings is darker than they are, on the whole.

    The surroundings are the medians of two windows: a shadow's edge misleads the larger one more, a digit that fills
    the picture the smaller one. Levels are compared by their logarithms, in which half the light is the same step
    everywhere. The seventh power lets ink, whose steps are larger, outweigh the edges of shadows.
    """
    factor = grid_factor(grey)
    cells = np.log(average(grey, factor) + 16)
    coarse = np.pad(average(cells, 9), 3, mode="reflect")
    total = 0.0
    for size in (5, 7):
        medians = np.asarray(Image.fromarray(coarse).filter(ImageFilter.MedianFilter(size)))[3:-3, 3:-3]
        around = medians.repeat(9, 0).repeat(9, 1)[: cells.shape[0], : cells.shape[1]]
        total += float(((cells - around) ** 7).sum())
    return total < 0


def median(values: NDArray[np.float32]) -> float:
    """Return the median; of many values, that of every seventh, which takes a seventh of the time."""
    return float(np.median(values[::7] if values.size > 10_000 else values))


def background(grey: Ink) -> Ink:
    """Return what a picture with dark ink would be without it: a grey closing, a maximum and then a minimum filter.

    A shadow, which is wider than the window, stays; so do the edges of light and shadow.
    """
    factor = grid_factor(grey)
    cells = average(grey, factor)
    radius = int(max(cells.shape) * BACKGROUND_WINDOW / 2)
    closed = -window_max(-window_max(cells, radius), radius)
    size = (closed.shape[1] * factor, closed.shape[0] * factor)
    whole = np.asarray(Image.fromarray(closed).resize(size, Image.Resampling.BILINEAR))
    return whole[: grey.shape[0], : grey.shape[1]]


def grid_factor(values: Ink) -> int:
    """Return the side of a grid cell in pixels."""
    return 1 + (int(max(values.shape)) - 1) // GRID_SIDE


def average(values: Ink, factor: int) -> Ink:
    """Return a grid of cells of factor x factor pixels, each the mean of its pixels."""
    return np.asarray(Image.fromarray(values).reduce(factor)) if factor > 1 else values


def largest(values: Ink, factor: int) -> Ink:
    """Return a grid of cells of factor x factor pixels, each the maximum of its pixels."""
    height, width = values.shape
    values = np.pad(values, [(0, -height % factor), (0, -width % factor)], mode="edge")
    rows = reduce(np.maximum, (values[start::factor] for start in range(factor)))
    return reduce(np.maximum, (rows[:, start::factor] for start in range(factor)))


def window_max(values: Ink, radius: int) -> Ink:
    """Return the maximum of the square of 2 * radius + 1 around each value, without what is outside."""
    for _ in ("down", "along"):
        values = np.pad(values, [(radius, radius), (0, 0)], constant_values=-np.inf)
        width = 1  # of the windows whose maxima are known: two of them make one of up to twice the width
        while width < 2 * radius + 1:
            step = min(width, 2 * radius + 1 - width)
            values, width = np.maximum(values[:-step], values[step:]), width + step
        values = values.T
    return values


# The digit among the ink ----------------------------------------------------------------------------------------------


def keep_digit(ink: Ink, full: float) -> Ink:
    """Return the part of a picture that has the digit, without specks, frames, and what lies beside the paper."""
    factor = grid_factor(ink)
    cells = largest(ink, factor)
    labels, boxes = find_pieces(cells >= PIECE_LEVEL * full)
    chosen = np.array([False, *choose_pieces(cells, labels, boxes)])[labels]
    top, left, bottom, right = bounds(chosen)
    # The strokes' edges are lighter, and up to one of the 20 pixels of a digit wide.
    near = window_max(chosen.astype(np.float32), 1 + max(bottom - top, right - left) // 16) > 0
    near &= chosen | (labels == 0)
    top, left, bottom, right = bounds(near)
    ink = ink[top * factor : bottom * factor, left * factor : right * factor]
    mask = near[top:bottom, left:right].repeat(factor, 0).repeat(factor, 1)
    return ink * mask[: ink.shape[0], : ink.shape[1]]


def choose_pieces(cells: Ink, labels: NDArray[np.int64], boxes: list[Box]) -> list[bool]:
    """Return whether each piece of ink is part of the digit.

    The main piece has the most ink and the darkest, and is not a frame if there is anything else of some size. The
    others are part of the digit if they are no speck beside it, about as dark, and not cut off by the picture's edge.
    """
    numbers = range(1, len(boxes) + 1)
    frames = [is_frame(labels == number, box) for number, box in zip(numbers, boxes, strict=True)]
    lengths = [max(bottom - top, right - left) for top, left, bottom, right in boxes]
    smallest = DIGIT_SHARE * min(labels.shape)
    digits = [length >= smallest and not frame for length, frame in zip(lengths, frames, strict=True)]
    areas = np.bincount(labels.ravel())[1:]
    weights = np.bincount(labels.ravel(), (cells.ravel() / cells.max()) ** 3)[1:]
    main = int((weights * digits if any(digits) else weights).argmax())
    peaks = np.array([cells[top:bottom, left:right].max() for top, left, bottom, right in boxes])
    height, width = labels.shape
    cut = [top == 0 or left == 0 or bottom == height or right == width for top, left, bottom, right in boxes]
    dropped = (areas < SPECK * areas[main]) | (peaks < PEAK * peaks[main]) | frames | (np.array(cut) & (not cut[main]))
    return [piece == main or not dropped[piece] for piece in range(len(boxes))]


def bounds(mask: NDArray[np.bool_]) -> Box:
    """Return the smallest box that contains a mask."""
    rows, columns = (np.nonzero(mask.any(axis))[0].tolist() for axis in (1, 0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def find_pieces(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], list[Box]]:
    """Return the connected pieces of a mask, corners included: the number of each cell's piece, from 1, and the boxes.

    Runs of cells in a row are joined with those that they touch in the row above, by union-find.
    """
    steps = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    runs = [*zip(*(side.tolist() for side in np.nonzero(steps == 1)), np.nonzero(steps == -1)[1].tolist(), strict=True)]
    parents = [*range(len(runs))]

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    above = 0
    for number, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] < start):
            above += 1
        other = above
        while runs[other][0] == row - 1 and runs[other][1] <= end:
            parents[root(number)] = root(other)
            other += 1
    numbers: dict[int, int] = {}
    labels = np.zeros(mask.shape, dtype=np.int64)
    boxes: list[Box] = []
    for number, (row, start, end) in enumerate(runs):
        piece = numbers.setdefault(root(number), len(numbers) + 1)
        labels[row, start:end] = piece
        if piece > len(boxes):
            boxes.append((row, start, row + 1, end))
        top, left, _, right = boxes[piece - 1]
        boxes[piece - 1] = (top, min(left, start), row + 1, max(right, end))
    return labels, boxes


def is_frame(piece: NDArray[np.bool_], box: Box) -> bool:
    """Return whether a piece of ink runs along the picture's edge, or from edge to edge, or all along its own box."""
    edges = (piece[0], piece[-1], piece[:, 0], piece[:, -1])
    touched = [bool(edge.any()) for edge in edges]
    if (touched[0] and touched[1]) or (touched[2] and touched[3]):
        return True
    if any(edge.mean() >= EDGE_SHARE for edge in edges):
        return True
    top, left, bottom, right = box
    strip = EDGE_STRIP * min(piece.shape)
    if bottom <= strip or right <= strip or top >= len(piece) - strip or left >= len(piece[0]) - strip:
        return True
    inside = piece[top:bottom, left:right]
    margin = 1 + max(inside.shape) // 20
    sides = (inside[:margin], inside[-margin:], inside[:, :margin].T, inside[:, -margin:].T)
    return max(inside.shape) > len(piece) / 4 and all(side.any(0).mean() > 0.8 for side in sides)


# From the digit to MNIST's image --------------------------------------------------------------------------------------


def tight_box(ink: Ink, full: float) -> Box:
    """Return the smallest box with all ink: what is ink on average over a twentieth of the digit along its side."""
    top, left, bottom, right = bounds(ink >= PIECE_LEVEL * full)
    span = max(1, max(bottom - top, right - left) // 20)
    sides = []
    for rows in (ink, ink.T):
        sums = np.pad(rows, ((0, 0), (span, span))).cumsum(1)
        inked = (sums[:, span:] - sums[:, :-span]).max(1) >= min(BOX_LEVEL * span, 1) * full
        sides.append(np.nonzero(inked)[0].tolist())
    return sides[0][0], sides[1][0], sides[0][-1] + 1, sides[1][-1] + 1


def to_mnist(ink: Ink, box: Box) -> NDArray[np.uint8]:
    """Turn ink and its tight box into an image like MNIST's, uint8 [28, 28], by the steps of Yadav and Bottou."""
    top, left, bottom, right = box
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


def overlaps(length: int, side: int) -> Ink:
    """Return how much of each of 20 cells along a side each of the `length` pixels in its middle covers: [20, length].

    The middle is rounded to one of the 20 pixels: so a picture of an image of MNIST gives back that image's own pixels.
    """
    first = round((side - length) / 2 * 20 / side)
    edges = first + np.arange(length + 1) * (20 / side)
    cells = np.arange(20)[:, None]
    covered = np.minimum(edges[None, 1:], cells + 1) - np.maximum(edges[None, :-1], cells)
    return np.asarray(covered.clip(0), dtype=np.float32)
