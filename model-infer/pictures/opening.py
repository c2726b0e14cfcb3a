"""Opens the file of a picture, of a known format: upright, within a limit of memory, also if its end is missing."""

import io
import subprocess
import sys
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageOps, UnidentifiedImageError

from pictures import heic
from stage.process import Failure

# Other formats are not opened: some are programs, or contain a picture of any format and size.
LINE_BY_LINE = ("BMP", "DIB", "GIF", "ICO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF")
# Bytes a pixel, at most, to decode and prepare a picture: by its format, or by its mode if it is decoded line by line.
# Measured as in tests/test_picture.py; AVIF may have more bits than Pillow writes, which takes more.
FORMAT_BYTES = {"JPEG2000": 25, "WEBP": 18, "AVIF": 20, "JPEG": 5, "MPO": 5}
MODE_BYTES = {"1": 4, "L": 4, "CMYK": 12, "I;16": 14, "I;16B": 14, "I": 30, "F": 30}
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

# A picture may claim any size; beyond twice this number Pillow refuses to decode it, in whatever part of a file it is.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # for more than half of what is refused


class TooLarge(Failure):
    """A picture takes too much memory to decode."""


def open_picture(content: bytes | bytearray, memory: int = MEMORY) -> Image.Image:
    """Return the picture in a file, upright, of one of the formats above, or a HEIC; the first of several.

    Raise Failure if there is none, or it is damaged, and TooLarge if it takes more than some bytes of memory.
    """
    factor = 1
    if is_heic(content):
        if memory < MEMORY:
            raise TooLarge("a HEIC may take all the memory")
        content, factor = decode_heic(content)
    try:
        Image.init()
        formats = [name for name in Image.OPEN if name in LINE_BY_LINE or name in FORMAT_BYTES]
        with Image.open(io.BytesIO(content), formats=formats) as image:
            longer = max(image.size)
            whole = in_8_bits(upright(decode(image, content, memory)))
            whole.info["longer_side"] = factor * longer  # before draft()
            return whole
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
    if result.returncode != 0 or not result.stderr.isdigit():  # libraries may write to it too
        raise Failure(HEIC_REFUSALS.get(result.returncode, DAMAGED))
    return result.stdout, int(result.stderr)


def decode(image: ImageFile.ImageFile, content: bytes | bytearray, memory: int) -> Image.Image:
    """Decode a picture, given also as its file. Raise TooLarge if that takes more than some bytes of memory."""
    pixels, longer = image.width * image.height, max(image.size)
    # Of a JPEG only as many pixels are decoded as will be looked at.
    image.draft(None, (WORKING_SIDE * image.width // longer or 1, WORKING_SIDE * image.height // longer or 1))
    needed, transparent = needed_memory(image, pixels), image.info.get("transparency")
    if needed > memory:
        limits = f"takes {needed // 10**6:,} MB to decode, of at most {memory // 10**6:,} MB"
        raise TooLarge(f"too many pixels: this {image.format} ({image.mode}) {limits}")
    if image.format in ("JPEG", "MPO"):
        return load_jpeg(image, content)
    image.load()
    # The texts of a PNG are in `info` too, under any name. Text is no colour, and takes no other value's place.
    # A colour that comes after the pixels is not valid, and takes more memory than was reckoned with.
    if transparent is None or isinstance(image.info.get("transparency"), str):
        image.info.pop("transparency", None)
    return image.getchannel("L") if image.mode == "LAB" else image  # Pillow cannot convert Lab colours


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
    """Return the bytes that it takes to decode and prepare a picture; `pixels` is their number before draft()."""
    as_rgba = OTHER_BYTES if "transparency" in image.info else 0  # as in in_8_bits()
    each = FORMAT_BYTES.get(image.format or "", max(as_rgba, MODE_BYTES.get(image.mode, OTHER_BYTES)))
    # Of a progressive JPEG, libjpeg keeps 2 bytes for each pixel and band, of the whole picture. Any may be one.
    coefficients = 2 * len(image.getbands()) * pixels if image.format in ("JPEG", "MPO") else 0
    return each * image.width * image.height + coefficients


def upright(image: Image.Image) -> Image.Image:
    """Turn and mirror a picture as its EXIF says; return it as it is if that cannot be read."""
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies even what is upright
    return image


def in_8_bits(image: Image.Image) -> Image.Image:
    """Return a picture in a mode of 8 bits a channel that Pillow converts to any other, transparency in a channel."""
    if image.mode.startswith(("I", "F")):
        return stretch(image)
    if image.mode == "La":
        return image.convert("LA")
    return image.convert("RGBA") if image.mode in ("P", "PA", "RGBa") or "transparency" in image.info else image


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
