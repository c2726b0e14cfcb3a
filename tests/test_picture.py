"""Preparing pictures: from any picture to the network's input, made like the images of MNIST."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo, putchunk

import example
import rendering
import stages
from pictures import opening, reading
from rendering import encode
from stage.process import Failure

RENDERED = 300
# Of the formats and modes, those that take the most memory a pixel; TIFF with all pixels in one strip.
LARGEST = [
    ("AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"}),
    ("JPEG2000", "RGBA", {}),
    ("WEBP", "RGBA", {"lossless": True, "method": 0, "quality": 0}),
    ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    ("JPEG", "CMYK", {"progressive": True}),
    ("PNG", "L", {}),
    ("PNG", "I;16", {}),
    ("PNG", "L", {"transparency": 1}),
    ("PNG", "RGB", {"transparency": (1, 2, 3)}),
    ("GIF", "P", {"transparency": 1}),
    ("TIFF", "CMYK", {"compression": "tiff_deflate", "strip_size": 10**9}),
    ("TIFF", "RGBA", {"compression": "tiff_deflate", "strip_size": 10**9}),
    ("TIFF", "I;16B", {}),
    ("TIFF", "F", {}),
    ("TIFF", "I", {}),
]
# Prints the peaks of the memory, in kB, of a process that only imports, and of one for each picture.
MEASURE = """
import os, sys
from pictures import opening, own, preparation
for path in [None, *sys.argv[1:]]:
    if os.fork() == 0:
        if path:
            with open(path, "rb") as file:
                image = opening.open_picture(file.read())
            preparation.to_grey(image)
            preparation.resize(image)
            own.thumbnail(image)
        os._exit(0)
    print(os.wait4(-1, 0)[2].ru_maxrss)
"""
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000"]
MODES = ["1", "L", "P", "LA", "La", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F", "HSV"]


@pytest.fixture(scope="module")
def digits(data):
    """The 10,000 test images, uint8 [N, 28, 28], and their labels."""
    return example.read_test_images(data)


@pytest.fixture(scope="module")
def prepare(predictor):
    """A function that returns what the network sees of a picture."""
    return lambda image: reading.read(opening.in_8_bits(image), predictor)[1]


@pytest.fixture
def three(digits):
    """A 3, dark on white, 200 x 200 pixels."""
    return paint(digits[0][18], 200)


def paint(digit, side):
    """Return a test image, uint8 [28, 28], as a square picture of any size, dark on white."""
    return Image.fromarray(255 - digit.numpy()).resize((side, side), Image.Resampling.BICUBIC)


def outcome(prepare, file):
    """Return the shape of the image prepared from a file, or the reason why the file is refused."""
    try:
        return prepare(opening.open_picture(file)).shape
    except Failure as failure:
        return str(failure)


def difference(one, other):
    """Return the mean absolute difference of two images in grey levels; infinity if their sizes differ."""
    if one.shape != other.shape:
        return float("inf")
    return (one.float() - other.float()).abs().mean().item()


def test_enlarged_test_images_are_restored_within_three_grey_levels(prepare, digits):
    differences = []
    for digit in digits[0][:1000]:
        enlarged = Image.fromarray(digit.numpy()).resize((140, 140), Image.Resampling.NEAREST)
        differences.append(difference(prepare(enlarged), digit))
    assert np.quantile(differences, 0.99) <= 3  # by a model of one epoch, one or two may be divided


def test_rendered_pictures_are_predicted_almost_as_well_as_the_raw_images(predictor, digits):
    images, labels = digits
    rng = np.random.default_rng(13)
    correct = {"raw": 0, "rendered": 0}
    for index in rng.permutation(len(images))[:RENDERED].tolist():
        file = rendering.render(images[index].numpy(), rng)
        correct["raw"] += predictor.predict(images[index])["prediction"] == labels[index]
        correct["rendered"] += reading.read(opening.open_picture(file), predictor)[0]["prediction"] == labels[index]
    # This model is of a single epoch; a finished one loses less (docs/drawing.md).
    assert correct["rendered"] >= correct["raw"] - 0.02 * RENDERED


def test_the_digit_is_20_pixels_long_with_full_ink_and_centred_by_mass(prepare, three):
    digit = prepare(three).numpy()
    rows, columns = (np.nonzero(digit.any(axis))[0] for axis in (1, 0))
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    assert digit.max() == 255
    for axis in (0, 1):
        centre = digit.sum(axis) @ (np.arange(28) + 0.5) / digit.sum()
        assert 14 <= centre <= 15


@pytest.mark.parametrize("side", [60, 200, 1000])
@pytest.mark.parametrize("place", [(0, 0), (1, 0), (0.5, 1)])
def test_size_and_position_do_not_matter(prepare, digits, side, place):
    large = Image.new("L", (1500, 1200), 255)
    large.paste(paint(digits[0][18], side), tuple(int(p * (r - side)) for p, r in zip(place, large.size, strict=True)))
    assert difference(prepare(large), prepare(paint(digits[0][18], 400))) < 5


def test_changes_that_leave_the_digit_as_it_is_do_not_matter(prepare, three):
    pixels = np.asarray(three)
    changed = {"light ink on dark": Image.fromarray(255 - pixels)}
    for ink in (0, 255):
        changed[f"ink of level {ink} without a background"] = image = Image.new("LA", three.size, ink)
        image.putalpha(Image.fromarray(255 - pixels))
    changed["a transparent edge"] = image = three.convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 200, 8))
    framed = np.pad(pixels, 40, constant_values=255)
    framed[10:13, 10:13] = framed[260:262, 100:103] = 0
    framed[:4] = framed[-4:] = framed[:, :4] = framed[:, -4:] = 0
    changed["specks and a frame"] = Image.fromarray(framed)
    for orientation, turn in rendering.TURNS.items():
        exif = Image.Exif()
        exif[rendering.ORIENTATION] = orientation
        changed[f"EXIF orientation {orientation}"] = opening.open_picture(encode(three.transpose(turn), exif=exif))
    expected = prepare(three)
    differences = {name: difference(prepare(image), expected) for name, image in changed.items()}
    assert {name for name, grey_levels in differences.items() if grey_levels >= 0.5} == set()


def test_uneven_light_is_removed(prepare, three):
    pixels = np.pad(np.asarray(three), 60, constant_values=255)
    shaded = Image.fromarray((pixels * np.linspace(1, 0.5, len(pixels))).astype(np.uint8))
    assert difference(prepare(shaded), prepare(three)) < 3


@pytest.mark.parametrize("edge", [300, 560])  # left or right of the digit
@pytest.mark.parametrize(("left", "right"), [(1, 0.6), (0.6, 1)])
def test_the_edge_of_a_shadow_is_removed_although_most_of_the_picture_is_flat(prepare, three, edge, left, right):
    pixels = np.pad(np.asarray(three), [(60, 60), (340, 60)], constant_values=255)
    pixels = np.concatenate([pixels[:, :edge] * left, pixels[:, edge:] * right], axis=1)
    prepared = prepare(Image.fromarray(pixels.astype(np.uint8)))
    assert difference(prepared, prepare(three)) < 3


def test_a_drawing_without_a_margin_is_prepared_like_one_with_it(prepare):
    drawing = Image.new("L", (260, 260), 255)
    ImageDraw.Draw(drawing).line([(150, 30), (150, 229)], fill=0, width=50)
    ImageDraw.Draw(drawing).line([(60, 55), (150, 55)], fill=0, width=50)
    cropped = drawing.crop((60, 30, 200, 230))
    assert difference(prepare(cropped), prepare(drawing)) < 1


@pytest.mark.parametrize(("side", "length", "width"), [(600, 400, 3), (1000, 600, 1), (2000, 1800, 2), (600, 440, 1)])
def test_a_thin_stroke_keeps_its_ink(prepare, side, length, width):
    pixels = np.full((side, side), 255, dtype=np.uint8)
    pixels[side // 10 : side // 10 + length, side // 2 : side // 2 + width] = 0
    digit = prepare(Image.fromarray(pixels))
    assert digit.max() == 255
    assert int((digit > 200).any(1).sum()) == 20


@pytest.mark.parametrize("noise", [0, 3, 8])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_blank_picture_is_refused(prepare, level, noise):
    pixels = np.random.default_rng(0).normal(level, noise, (300, 400)).clip(0, 255).astype(np.uint8)
    with pytest.raises(Failure, match="blank"):
        prepare(Image.fromarray(pixels))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 2), (28, 28), (4000, 2)])
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_any_size_is_prepared_or_refused(prepare, size, mode):
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    image = Image.fromarray(noise.squeeze(2) if mode == "L" else noise)
    assert outcome(prepare, encode(image)) in ((28, 28), "blank: there is nothing to read on it")


@pytest.mark.parametrize("name", ["PNG", "JPEG"])
def test_the_box_of_a_digit_in_the_corner_of_a_picture_of_any_size_is_inside_of_it(predictor, digits, name):
    rng = np.random.default_rng(6)
    for _ in range(10):
        large = Image.new("L", tuple(rng.integers(501, 2500, 2).tolist()), 255)
        side = min(large.size) // 2
        ink = paint(digits[0][0][7:27, 5:22], side)  # a 7, without the background around
        large.paste(ink, (large.width - side, large.height - side))
        read, _ = reading.read(opening.open_picture(encode(large, name)), predictor)
        top, left, bottom, right = read["digits"][-1]["box"]
        assert 0 <= top < bottom <= large.height
        assert 0 <= left < right <= large.width
        assert bottom > large.height - 20
        assert right > large.width - 20


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_any_format_is_read_and_a_truncated_one_refused_in_one_line_or_partly_read(prepare, three, name):
    file = encode(three.convert("RGB"), name)
    prepared = prepare(opening.open_picture(file))
    assert prepared.dtype == torch.uint8
    assert difference(prepared, prepare(three)) < 3
    for length in range(1, len(file), 1 + len(file) // 20):
        assert "\n" not in str(outcome(prepare, file[:length]))


@pytest.mark.parametrize("mode", MODES)
def test_modes(prepare, three, mode):
    if mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(three).astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2"))
        assert image.mode == mode
    else:
        image = (three if mode in ("I", "F") else three.convert("P" if mode == "PA" else "RGB")).convert(mode)
    limit = 12 if mode == "1" else 2  # mode "1" has no grey levels
    assert difference(prepare(image), prepare(three)) < limit


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_a_file_that_is_not_a_picture_is_refused(content):
    with pytest.raises(Failure, match="not a picture"):
        opening.open_picture(content)


def test_the_texts_of_a_png_are_no_values_of_ours(prepare, three):
    texts = PngInfo()
    for name in ("transparency", "longer_side", "exif"):
        texts.add_text(name, "x")
    for mode in ("L", "RGB", "P"):
        image = three.convert(mode)
        assert prepare(opening.open_picture(encode(image, pnginfo=texts))).equal(prepare(image))


def test_a_transparent_colour_after_the_pixels_of_a_png_for_which_no_memory_was_reckoned_is_ignored(three):
    file, chunk = encode(three), io.BytesIO()
    putchunk(chunk, b"tRNS", b"\0\0")
    assert opening.open_picture(file[:33] + chunk.getvalue() + file[33:]).mode == "RGBA"
    assert opening.open_picture(file[:-12] + chunk.getvalue() + file[-12:]).mode == "L"


def test_the_largest_pictures_that_are_accepted_take_no_more_memory_than_planned(tmp_path):
    sizes = []
    for number, (name, mode, options) in enumerate(LARGEST):
        with Image.open(io.BytesIO(encode(Image.new(mode, (10, 10)), name, **options))) as small:
            each = opening.needed_memory(small, 100) // 100
        width = 50_000 if name == "JPEG" else 5_000  # so long that draft() does not reduce it
        image = Image.new(mode, (width, min(opening.MEMORY // each, opening.MAX_PIXELS) // width))
        sizes.append((tmp_path / f"{number:02}").write_bytes(encode(image, name, **options)))
    malloc = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1000000000"}  # as in the images
    env = os.environ | malloc | {"PYTHONPATH": str(stages.TREE / "model-infer")}
    command = [sys.executable, "-c", MEASURE, *sorted(tmp_path.iterdir())]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    base, *peaks = map(int, result.stdout.split())
    taken = [(1024 * (peak - base) - size) // 10**6 for peak, size in zip(peaks, sizes, strict=True)]
    assert max(taken) <= opening.MEMORY // 10**6 + 30  # for the reduced picture


@pytest.mark.parametrize(("name", "mode", "options"), LARGEST)
def test_a_picture_of_more_pixels_than_its_format_and_mode_allow_is_refused(name, mode, options):
    file = encode(Image.new(mode, (500, 500)), name, **options)
    with Image.open(io.BytesIO(file)) as image:
        needed = opening.needed_memory(image, 500 * 500)
    opening.open_picture(file, needed)
    with pytest.raises(opening.TooLarge, match=f"too many pixels: this {name}"):
        opening.open_picture(file, needed - 1)


def test_a_photograph_of_a_telephone_may_have_50_megapixels(prepare):
    photograph = Image.new("RGB", (8160, 6144), "white")
    photograph.paste("black", (3900, 1000, 4300, 5000))
    assert outcome(prepare, encode(photograph, "JPEG", progressive=True)) == (28, 28)


def test_a_picture_of_too_many_pixels_is_refused():
    for file in (encode(Image.new("1", (8000, 7501))), encode(Image.new("L", (20_000, 20_000)))):
        with pytest.raises(Failure, match="60,000,000 pixels"):
            opening.open_picture(file)


def test_only_the_first_frame_of_an_animation_counts(prepare, three):
    file = encode(three, "GIF", save_all=True, append_images=[Image.new("L", three.size, 255)])
    assert difference(prepare(opening.open_picture(file)), prepare(three)) < 2
