"""Renders test images as pictures such as people take: on paper, in uneven light, framed, turned, as JPEG."""

import io

import numpy as np
from PIL import Image

TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
ORIENTATION = 0x112  # the tag in EXIF


def render(digit, rng):
    """Render a digit, uint8 [28, 28], as a JPEG: dark ink on light paper, at random in position, light and frame."""
    width = int(np.exp(rng.uniform(np.log(200), np.log(2000))))
    height = int(np.clip(width * np.exp(rng.uniform(-0.7, 0.7)), 200, 2000))
    side = int(min(width, height) * rng.uniform(0.2, 1))
    left, top = (int(rng.uniform(0, room)) for room in (width - side, height - side))
    coverage = np.zeros((height, width), dtype=np.float32)
    large = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    coverage[top : top + side, left : left + side] = np.asarray(large, dtype=np.float32) / 255
    if rng.random() < 0.3:
        thickness = max(2, int(min(width, height) * rng.uniform(0.005, 0.04)))
        gap = int(min(width, height) * rng.uniform(0, 0.04))  # between the picture's edge and the frame
        framed = np.pad(np.pad(coverage, 2 * thickness), thickness, constant_values=1)
        coverage = np.pad(framed, gap)
        height, width = coverage.shape
    paper, ink = rng.uniform(190, 255), rng.uniform(0, 90)
    picture = (paper + (ink - paper) * coverage) * shadow(width, height, rng)
    picture += rng.uniform(0, 5) * rng.standard_normal(picture.shape, dtype=np.float32)
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    if rng.random() < 0.3:
        exif[ORIENTATION] = orientation = int(rng.choice([*TURNS]))
        image = image.transpose(TURNS[orientation])
    return encode(image, "JPEG", quality=int(rng.integers(40, 96)), exif=exif)


def encode(image, format="PNG", **options):
    """Return a picture as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def shadow(width, height, rng):
    """Return the fraction of light that reaches each pixel: even, with the edge of a shadow, or with a gradient."""
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.5)
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y - np.float32(rng.uniform(-0.5, 0.5))
    kind = rng.integers(3)
    if kind == 0:
        return np.float32(1)
    softness = rng.uniform(0.03, 0.3) if kind == 1 else 1.5
    return 1 - strength / (1 + np.exp((-along / softness * 2).clip(-50, 50)))
