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
from PIL import Image, ImageChops, ImageFile, ImageOps, UnidentifiedImageError

from pictures import heic
from pictures.outcome import Box
from stage import images
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
WORKING_SIDE = 1000  # pixels of the longer side, about, to which larger pictures are reduced, by a whole factor
MIN_SIDE = 10  # pixels of the square that a digit is put in, at least (Yadav and Bottou)
BOX_LEVEL = 0.05  # of full ink, averaged over a twentieth of the digit: what belongs to its tight box
THIN, NORMAL = 0.04, 0.09  # of a digit's longer side: thinner strokes than the first are made as wide as the second

# A picture may claim any size; beyond twice this number Pillow refuses to decode it, in whatever part of a file it is.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # for half of what is refused

Ink = NDArray[np.float32]  # [height, width]


class TooLarge(Failure):
    """A picture takes too much memory to decode."""


def open_picture(content: bytes | bytearray, memory: int = MEMORY) -> Image.Image:
    """Return the picture in a file, upright, of one of the formats above, or a HEIC; the first of several.

    Raise Failure if there is none, or it is damaged, and TooLarge if it takes more than some bytes of memory.
    """
    try:
        if memory < MEMORY and is_heic(content):
            raise TooLarge("a HEIC may take all the memory")
        Image.init()
        formats = [name for name in Image.OPEN if name in LINE_BY_LINE or name in FORMAT_BYTES]
        content, factor = decode_heic(content) if is_heic(content) else (content, 1)
        with Image.open(io.BytesIO(content), formats=formats) as image:
            pixels = image.width * image.height
            longer = max(image.size)
            image.info["longer_side"] = factor * longer  # which draft() may reduce
            # Of a JPEG only as many pixels are decoded as will be looked at.
            image.draft(None, (WORKING_SIDE * image.width // longer, WORKING_SIDE * image.height // longer))
            needed = needed_memory(image, pixels)
            if needed > memory:
                limits = f"takes {needed // 10**6:,} MB to decode, of at most {memory // 10**6:,} MB"
                raise TooLarge(f"too many pixels: this {image.format} ({image.mode}) {limits}")
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


def decode_heic(content: bytes | bytearray) -> tuple[bytes, int]:
    """Return a HEIC as a PPM, upright, decoded by a process of its own, and the factor by which it was reduced.

    Raise Failure if that is not possible.
    """
    command = [sys.executable, "-I", heic.__file__, *map(str, (MAX_PIXELS, MEMORY, WORKING_SIDE))]
    try:
        result = subprocess.run(command, input=content, capture_output=True, timeout=HEIC_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failure(f"a HEIC that takes more than {HEIC_SECONDS} s to decode") from None
    if result.returncode != 0:
        raise Failure(HEIC_REFUSALS.get(result.returncode, DAMAGED))
    return result.stdout, int(result.stderr)


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


def resize(image: Image.Image) -> torch.Tensor:
    """Return a picture in the data set's colours and size, uint8 [H, W] or [H, W, 3]; its own pixels if it has them."""
    return torch.from_numpy(np.array(images.fit(stretch(image) if image.mode.startswith(("I", "F")) else image)))


# From a picture to its ink --------------------------------------------------------------------------------------------


def to_grey(image: Image.Image) -> Ink:
    """Return the grey levels of a picture, 0 to 255, float32 [height, width], at most 1.5 times WORKING_SIDE long."""
    if image.mode.startswith(("I", "F")):
        image = stretch(image)
    if image.mode in ("P", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    factor = max(1, round(max(image.size) / WORKING_SIDE))
    alpha = None
    if image.mode in ("RGBA", "LA") and (opacity := image.getchannel("A")).getextrema() != (255, 255):
        alpha = shrink(opacity, factor) / np.float32(255)
    grey = shrink(image.convert("L"), factor)
    return grey if alpha is None else fill_transparent(grey, alpha)


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


# From the digit to MNIST's image --------------------------------------------------------------------------------------


def to_mnist(ink: Ink, full: float) -> NDArray[np.uint8]:
    """Turn the ink of a digit into an image like MNIST's, uint8 [28, 28], by the steps of Yadav and Bottou."""
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


def widen(ink: Ink) -> Ink:
    """Return the ink with its strokes made wider if they are thinner than pens leave them on paper.

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


def tight_box(ink: Ink, full: float) -> Box:
    """Return the smallest box with all ink: what is ink on average over a twentieth of the digit along its side."""
    span = max(1, max(ink.shape) // 20)
    sides = []
    for rows in (ink, ink.T):
        sums = pad(rows, 0, span).cumsum(1)
        inked = (sums[:, span:] - sums[:, :-span]).max(1) >= min(BOX_LEVEL * span, 1) * full
        sides.append(np.nonzero(inked)[0].tolist())
    return sides[0][0], sides[1][0], sides[0][-1] + 1, sides[1][-1] + 1


def overlaps(length: int, side: int) -> Ink:
    """Return how much of each of 20 cells along a side each of the `length` pixels in its middle covers: [20, length].

    The middle is rounded to one of the 20 pixels: so a picture of an image of MNIST gives back that image's own pixels.
    """
    first = round((side - length) / 2 * 20 / side)
    edges = first + np.arange(length + 1) * (20 / side)
    cells = np.arange(20)[:, None]
    covered = np.minimum(edges[None, 1:], cells + 1) - np.maximum(edges[None, :-1], cells)
    return np.asarray(covered.clip(0), dtype=np.float32)


# Grids of cells -------------------------------------------------------------------------------------------------------


def average(values: Ink, factor: int) -> Ink:
    """Return a grid of cells of factor x factor pixels, each the mean of its pixels."""
    return np.asarray(Image.fromarray(values).reduce(factor)) if factor > 1 else values


def pad(values: Ink, rows: int, columns: int, value: float = 0) -> Ink:
    """Return values with so many rows above and below and columns on either side. np.pad() takes 10 times as long."""
    height, width = values.shape
    padded = np.full((height + 2 * rows, width + 2 * columns), value, dtype=np.float32)
    padded[rows : rows + height, columns : columns + width] = values
    return padded


def largest(values: Ink, factor: int) -> Ink:
    """Return a grid of cells of factor x factor pixels, each the maximum of its pixels."""
    height, width = values.shape
    values = np.pad(values, [(0, -height % factor), (0, -width % factor)], mode="edge")
    rows = reduce(np.maximum, (values[start::factor] for start in range(factor)))
    return reduce(np.maximum, (rows[:, start::factor] for start in range(factor)))


def window_max(values: Ink, radius: int) -> Ink:
    """Return the maximum of the square of 2 * radius + 1 around each value, without what is outside."""
    for _ in ("down", "along"):
        values = pad(values, radius, 0, -np.inf)
        width = 1  # of the windows whose maxima are known: two of them make one of up to twice the width
        while width < 2 * radius + 1:
            step = min(width, 2 * radius + 1 - width)
            values, width = np.maximum(values[:-step], values[step:]), width + step
        values = values.T
    return values
