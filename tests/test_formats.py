"""The formats of files: each gives what a PNG of the same picture gives, HEIC by a process of its own."""

import io
import random
import struct
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageChops, ImageOps

import example
from pictures import heic, opening
from rendering import encode
from stage.process import Failure

PICTURES = 20  # of each format
EXIF_ORIENTATION = 0x112


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory):
    """The libde265 that pillow-heif brings, for machines that have none."""
    folder = tmp_path_factory.mktemp("library")
    (bundled,) = (Path(pillow_heif.__file__).parents[1] / "pillow_heif.libs").glob("libde265*")
    (folder / "libde265.so.0").symlink_to(bundled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", str(folder))
        yield


@pytest.fixture(scope="module")
def photographs(data):
    """Pictures of digits on paper, in colour, 200 x 150 pixels, with some noise."""
    rng = np.random.default_rng(5)
    return [photograph(digit.numpy(), rng) for digit in example.read_test_images(data)[0][:PICTURES]]


def photograph(digit, rng):
    ink = np.asarray(Image.fromarray(digit).resize((95, 95), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    pixels = np.full((150, 200, 3), (235, 230, 220), dtype=np.float32)
    pixels[15:110, 50:145] *= 1 - 0.8 * ink[..., None]
    return Image.fromarray((pixels + rng.normal(0, 2, (150, 200, 1))).clip(0, 255).astype(np.uint8))


def as_heic(image, orientation=1, **options):
    """Return a picture as a HEIC that is turned or mirrored, as EXIF numbers it, by the properties irot and imir."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {"quality": 90, "enc_params": {"preset": "ultrafast"}} | options
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, exif=exif.tobytes(), **options)
    return buffer.getvalue()


def as_16_bits(image, name):
    """Return a picture as grey in 12 of 16 bits, with a pixel stuck at the lightest level and one at the darkest."""
    values = np.asarray(image.convert("L")).astype(np.uint16) * 16
    values[10, 10], values[10, 20] = 65535, 0
    return encode(Image.fromarray(values), name)


def as_cmyk(image, marker):
    """Return a picture as a JPEG in CMYK, inverted and with Adobe's marker, or neither."""
    if marker:
        return encode(image.convert("CMYK"), "JPEG", quality=90)
    content = encode(ImageChops.invert(image.convert("CMYK")), "JPEG", quality=90)
    start = content.index(b"\xff\xee")
    assert content[start + 4 : start + 9] == b"Adobe"
    return content[:start] + content[start + 16 :]


def truncated(content, number):
    """Return a file without its last 1 to 200 bytes."""
    return content[: -1 - number * 199 // (PICTURES - 1)]


FORMATS = {
    **{f"HEIC, orientation {turn}": lambda image, _, turn=turn: as_heic(image, turn) for turn in range(1, 9)},
    "HEIC, 4:4:4": lambda image, _: as_heic(image, chroma=444),
    "HEIC, grey": lambda image, _: as_heic(image.convert("L")),
    "HEIC, limited range": lambda image, _: as_heic(image, full_range_flag=0),
    "AVIF": lambda image, _: encode(image, "AVIF", quality=85),
    "JPEG 2000": lambda image, _: encode(image, "JPEG2000"),
    "MPO": lambda image, _: encode(image, "MPO", save_all=True, append_images=[Image.new("RGB", image.size)]),
    "PNG, 16 bits": lambda image, _: as_16_bits(image, "PNG"),
    "TIFF, 16 bits": lambda image, _: as_16_bits(image, "TIFF"),
    "JPEG, CMYK": lambda image, _: as_cmyk(image, True),
    "JPEG, CMYK without a marker": lambda image, _: as_cmyk(image, False),
    "JPEG, truncated": lambda image, number: truncated(encode(image, "JPEG"), number),
    "JPEG, grey, truncated": lambda image, number: truncated(encode(image.convert("L"), "JPEG"), number),
    "JPEG, CMYK, truncated": lambda image, number: truncated(as_cmyk(image, False), number),
    "JPEG, progressive, truncated": lambda image, number: truncated(encode(image, "JPEG", progressive=True), number),
    "MPO, truncated": lambda image, number: truncated(encode(image, "MPO"), number),
}


def grey(image):
    return np.asarray(image.convert("L"), dtype=np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_read_as_its_png_is(photographs, name):
    read = number = 0
    for number, image in enumerate(photographs[:3] if name.startswith("HEIC") else photographs):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = int(name[-1]) if "orientation" in name else 1
        expected = grey(opening.open_picture(encode(image, exif=exif)))
        opened = opening.open_picture(FORMATS[name](image, number))
        if "16 bits" in name:
            expected = grey(ImageOps.autocontrast(image.convert("L")))
        found = grey(opened)
        height, width = expected.shape
        assert found.shape == (height, width) or ("truncated" in name and height - 50 < len(found) <= height)
        expected = expected[: found.shape[0], : found.shape[1]]
        # In grey levels; stretched ones begin and end where the noise does.
        read += bool(np.abs(found - expected).mean() < (12 if "16 bits" in name else 3))
    assert read == number + 1


def test_the_rows_that_a_truncated_jpeg_lacks_are_cut_off_and_half_a_picture_is_refused(photographs):
    content = encode(photographs[0], "JPEG", quality=95)
    heights = []
    for percent in range(100, 0, -10):
        try:
            image = opening.open_picture(content[: len(content) * percent // 100])
        except Failure as failure:
            heights.append(str(failure))
        else:
            heights.append(image.height)
            assert np.abs(grey(image) - grey(photographs[0])[: image.height]).max() < 40  # no grey on the paper
    assert heights[0] == 150
    assert 75 <= heights[4] <= heights[3] <= heights[2] <= heights[1] < 150
    assert {*heights[6:9]} == {"a JPEG of which more than half is missing"}


# HEIC in particular ---------------------------------------------------------------------------------------------------


def box(kind, *contents):
    content = b"".join(contents)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def tiled(tiles, columns, size, turn):
    """Return a HEIC as telephones make it: of tiles, HEICs of the same size themselves, and turned as irot says."""
    parts = [heic.Items(tile) for tile in tiles]
    contents = [b"".join(part.contents[part.primary]) for part in parts]
    kept = [parts[0].properties[parts[0].primary]]  # the first tile's apply to all
    properties = [box(kind, content) for kind, content in kept[0] if kind != b"clap"]
    whole = [box(b"ispe", bytes(4), struct.pack(">II", *size)), box(b"irot", bytes([turn]))]
    grid = struct.pack(">BBBBHH", 0, 0, len(tiles) // columns - 1, columns - 1, *size)
    numbers = range(2, len(tiles) + 2)
    entries = [(number, bytes([0x80 | index + 1 for index in range(len(properties))])) for number in numbers]
    entries.append((1, bytes([len(properties) + 1, 0x80 | len(properties) + 2])))
    infe = [box(b"infe", struct.pack(">IHH4sx", 2 << 24, number, 0, b"hvc1")) for number in numbers]
    infe.append(box(b"infe", struct.pack(">IHH4sx", 2 << 24, 1, 0, b"grid")))

    def file(start):
        places, position = [struct.pack(">HHHHII", 1, 1, 0, 1, 0, len(grid))], start
        for number, content in zip(numbers, contents, strict=True):
            places.append(struct.pack(">HHHHII", number, 0, 0, 1, position, len(content)))
            position += len(content)
        ipma = b"".join(struct.pack(">HB", number, len(indices)) + indices for number, indices in entries)
        meta = box(
            b"meta",
            bytes(4),
            box(b"pitm", struct.pack(">IH", 0, 1)),
            box(b"iinf", struct.pack(">IH", 0, len(infe)), *infe),
            box(b"iref", bytes(4), box(b"dimg", struct.pack(f">HH{len(tiles)}H", 1, len(tiles), *numbers))),
            box(b"iprp", box(b"ipco", *properties, *whole), box(b"ipma", struct.pack(">II", 0, len(entries)), ipma)),
            box(b"idat", grid),
            box(b"iloc", struct.pack(">IBBH", 1 << 24, 0x44, 0, len(places)), *places),
        )
        return box(b"ftyp", b"heic", bytes(4), b"mif1heic") + meta + struct.pack(">I4s", 0, b"mdat")

    return file(len(file(0))) + b"".join(contents)  # 0: the last box reaches to the end


def test_the_tiles_of_a_telephones_heic_are_put_together_turned_and_reduced(photographs, monkeypatch):
    monkeypatch.setattr(opening, "WORKING_SIDE", 600)  # of which the picture is four times as long
    large = photographs[3].resize((2400, 2000), Image.Resampling.BICUBIC)
    tiles = [large.crop((x, y, x + 512, y + 512)) for y in range(0, 2000, 512) for x in range(0, 2400, 512)]
    image = opening.open_picture(tiled([as_heic(tile) for tile in tiles], 5, large.size, turn=1))
    assert image.size == (1000, 1200)  # reduced by 2, and turned counter-clockwise
    assert image.info["longer_side"] == 2400
    expected = large.transpose(Image.Transpose.ROTATE_90).reduce(2)
    assert np.abs(np.asarray(image, dtype=np.float32) - np.asarray(expected)).mean() < 2


@pytest.mark.parametrize("size", [(397, 299), (64, 65), (33, 400)])
def test_a_heic_of_an_odd_size_is_cut_to_it(photographs, size):
    image = photographs[0].resize(size)
    opened = opening.open_picture(as_heic(image))
    assert opened.size == size
    assert np.abs(grey(opened) - grey(image)).mean() < 3


def test_a_heic_of_too_many_pixels_is_refused_before_it_is_decoded(photographs):
    content = tiled([as_heic(photographs[0])], 1, (10_000, 6_001), turn=0)
    with pytest.raises(Failure, match="60,000,000 pixels"):
        opening.open_picture(content)


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_heic_is_read_or_refused_in_one_line(photographs, damage):
    content, rng = as_heic(photographs[0]), random.Random(3)
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(content)
        if damage == "truncated":
            del damaged[rng.randrange(40, len(content)) :]
        for _ in range(8 if damage == "changed" else 0):
            damaged[rng.randrange(40, 700)] = rng.randrange(256)
        try:
            outcomes.add(type(opening.open_picture(damaged)))
        except Failure as failure:
            outcomes.add(str(failure))
    assert opening.DAMAGED in outcomes
    assert "\n" not in "".join(map(str, outcomes))
    if damage == "truncated":
        assert outcomes == {opening.DAMAGED}


@pytest.fixture
def change(monkeypatch, tmp_path):
    """A function that has another text in place of a text of heic.py."""

    def change(old, new):
        text = Path(heic.__file__).read_text()
        assert text.count(old) == 1
        (tmp_path / "heic.py").write_text(text.replace(old, new))
        monkeypatch.setattr(heic, "__file__", str(tmp_path / "heic.py"))

    return change


def test_a_decoder_that_crashes_never_ends_or_is_not_installed_is_a_refusal_in_one_line(
    photographs, change, monkeypatch
):
    content = as_heic(photographs[0])
    started = "    Image.preinit()"
    monkeypatch.setattr(opening, "HEIC_SECONDS", 1)
    for old, new, reason in (
        ('"libde265.so.0"', '"libde265-none.so"', "libde265"),
        (started, "    ctypes.string_at(0)", "damaged"),
        (started, f"{started}; sys.stderr.write('a warning')", "damaged"),
        (started, "    while True: pass", "takes more than 1 s"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(heic, "__file__", heic.__file__)
            change(old, new)
            with pytest.raises(Failure, match=reason):
                opening.open_picture(content)
        monkeypatch.setattr(heic, "__file__", str(Path(opening.__file__).with_name("heic.py")))


def test_the_process_that_decodes_a_heic_ends_by_itself_if_nobody_waits_for_it(photographs, change):
    at_most = f"{opening.HEIC_SECONDS} < resource.getrlimit(resource.RLIMIT_CPU)[1] <= 30"
    change("    decoder = Decoder(library", f"    if not {at_most}: return\n    decoder = Decoder(library")
    assert opening.open_picture(as_heic(photographs[0])).size == (200, 150)


@pytest.mark.parametrize("attempt", ["open('/dev/null')", "bytearray(memory)", "__import__('socket').socket()"])
def test_a_hostile_heic_can_open_no_file_and_no_connection_and_take_no_more_memory(photographs, change, attempt):
    change(
        "    decoder = Decoder(library",
        f"    try: {attempt}\n    except (OSError, MemoryError): pass\n    else: return\n    decoder = Decoder(library",
    )
    assert opening.open_picture(as_heic(photographs[0])).size == (200, 150)
