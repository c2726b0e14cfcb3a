"""infer with the user's own pictures, as a process; and with those of other data sets."""

import dataclasses
import io
import json
import os
import shutil
import struct
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import example
import stages
from pictures import opening, outcome, own, prediction, preparation, reading
from rendering import encode
from stage import figures, images
from stage.dataset import DATA_SET


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A data folder with a few pictures beside the data set."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "MNIST").symlink_to(data / "MNIST")
    (folder / "scans").mkdir()
    images = example.read_test_images(data)[0]
    for name, index in (("photo.png", 0), ("scans/photo.jpg", 1), ("scans/photo.png", 2), ("scans/[a] $b_{.png", 3)):
        Image.fromarray(255 - images[index].numpy()).resize((280, 280)).save(folder / name)
    Image.new("L", (300, 300), 255).save(folder / "blank.png")
    (folder / "broken.png").write_bytes((folder / "photo.png").read_bytes()[:500])
    return folder


@pytest.fixture
def infer(volume, folder):
    """A function that runs infer on pictures of the folder in this process."""
    return lambda *names: stages.call("infer", *names, model=volume, data=folder)


def published(volume):
    """Return the names of the pictures in own/, and its predictions."""
    predictions = stages.read_json(volume / "own" / "predictions.json")["predictions"]
    return {path.name for path in (volume / "own").glob("*.png")}, predictions


def test_own_pictures_have_their_own_folder_and_other_results_stay_also_where_all_are_refused(volume, folder):
    infer = partial(stages.run, "infer", model=volume, data=folder)
    stages.assert_succeeds(infer())
    before = stages.contents(volume)
    stages.assert_succeeds(infer("photo.png", "scans/*.png"))
    names, predictions = published(volume)
    assert len(names) == len(predictions) == 3
    assert all(Image.open(volume / "own" / name).size == (1200, 456) for name in names)
    after = stages.contents(volume)
    assert {name: after[name] for name in after if not name.startswith("own/")} == before
    with stages.unchanged(volume):
        stages.assert_fails(infer("blank.png"), 1, "blank.png", "blank")


def test_results_of_files_with_the_same_stem_are_numbered(volume, folder, infer):
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
        shutil.copy(folder / "photo.png", folder / name)
    stages.assert_succeeds(infer("photo.png", "a/photo.png", "?/photo.png"))
    names, predictions = published(volume)
    stem = f"{predictions[0]['prediction']}_photo".replace("None", "none")
    assert names == {f"{stem}.png", f"{stem}-2.png", f"{stem}-3.png"}
    files = [str(folder / name) for name in ("photo.png", "a/photo.png", "b/photo.png")]
    assert [entry["file"] for entry in predictions] == files


def test_a_file_gets_the_same_probabilities_as_its_prepared_pixels(volume, folder, infer):
    path = folder / "scans/photo.jpg"
    stages.assert_succeeds(infer("scans/photo.jpg"))
    (entry,) = published(volume)[1]
    predictor = prediction.load_predictor(volume, folder)
    read, pixels = reading.read(opening.open_picture(path.read_bytes()), predictor)
    assert entry == json.loads(json.dumps({"file": str(path)} | read))
    assert predictor.predict(pixels).items() <= entry.items()


def test_numbers_are_read_from_left_to_right_and_name_the_result(volume, folder, infer, data):
    digits = [255 - example.read_test_images(data)[0][index].numpy() for index in (2, 0, 2, 4)]  # 1, 7, 1, 4
    Image.fromarray(np.concatenate(digits, axis=1)).resize((1120, 280), Image.Resampling.BICUBIC).save(folder / "n.png")
    stages.assert_succeeds(infer("n.png"))
    names, (entry,) = published(volume)
    assert names == {"1714_n.png"}
    assert entry["prediction"] is None
    assert [digit["prediction"] for digit in entry["digits"]] == [1, 7, 1, 4]
    for number, digit in enumerate(entry["digits"]):
        top, left, bottom, right = digit["box"]
        assert 280 * number <= left < right <= 280 * (number + 1)
        assert 180 <= bottom - top <= 220  # a digit of MNIST is 20 of its image's 28 pixels high


def test_what_is_no_readable_picture_is_named_not_to_be_removed_and_the_others_predicted(volume, folder, infer):
    (folder / "loop.png").symlink_to("loop.p")
    (folder / "loop.p").symlink_to("loop.png")
    files = ("blank.png", "broken.png", "missing.png", "loop.png", "loop.p")
    wrong = (*files, "no/*.png", "scans", "*s", "MNIST", "x" * 300)
    result = infer(*wrong[:2], "photo.p*", *wrong[2:])
    assert result.returncode == 1
    for line, name in zip(result.stderr.splitlines(), wrong, strict=True):
        assert line.startswith(f"infer: {'no file matches ' if '*' in name else ''}{folder}/{name}")
    assert "rm" not in result.stderr.split()
    assert len(published(volume)[0]) == 1


def test_paths_may_start_with_data_and_names_have_any_characters_and_bytes(volume, folder):
    (folder / "my[1]").mkdir()
    for name in ("七.png", os.fsdecode(b"\xff" * 200 + b".png"), "my[1]/photo.png"):
        shutil.copy(folder / "photo.png", folder / name)
    names = ["data/photo.png", "./data/scans/photo.png", str(folder / "scans/photo.jpg"), "scans/[a] $b_{.png"]
    names += ["七.png", os.fsdecode(b"\xff" * 100 + b"*"), "my[[]1]/*"]
    stages.assert_succeeds(stages.run("infer", *names, model=volume, data=folder))
    assert len(published(volume)[0]) == len(names)


def test_names_may_be_typed_as_on_windows_and_wildcards_match_any_case(tmp_path):
    (tmp_path / "scans").mkdir()
    for name in ("IMG_1.JPG", "b.jpg", "scans/A.PNG", "'quoted'.png", "back\\slash.png"):
        (tmp_path / name).touch()
    for name, expected in {
        "*.jpg": ["IMG_1.JPG", "b.jpg"],
        "'img_?.jpg'": ["IMG_1.JPG"],
        '"b.jpg"': ["b.jpg"],
        "[h-j]*.[!q]pg": ["IMG_1.JPG"],
        "scans\\*.png": ["scans/A.PNG"],
        "'data\\scans\\A.PNG'": ["scans/A.PNG"],
        "'quoted'.png": ["'quoted'.png"],
        "back\\slash.png": ["back\\slash.png"],
        "'*.gif'": ["'*.gif'"],  # which is refused later
    }.items():
        assert own.find_pictures([name], tmp_path, tmp_path / "own") == [tmp_path / match for match in expected]


def test_pictures_in_lab_colours_and_with_premultiplied_opacity_are_predicted_and_drawn(volume, folder, infer):
    grey = Image.open(folder / "photo.png")
    Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2]).save(folder / "lab.tif")
    kind = struct.pack("<HHI", 338, 3, 1)  # the tag ExtraSamples of a TIFF: 1 is for premultiplied, 2 for not
    file = encode(grey.convert("LA"), "TIFF").replace(kind + b"\2", kind + b"\1")
    assert Image.open(io.BytesIO(file)).mode == "La"
    (folder / "premultiplied.tif").write_bytes(file)
    stages.assert_succeeds(infer("photo.png", "lab.tif", "premultiplied.tif"))
    one, *others = published(volume)[1]
    assert [other["probabilities"] for other in others] == [one["probabilities"]] * 2


def test_pictures_in_the_folder_that_the_results_replace_are_refused_and_kept(volume, folder):
    (volume / "own").mkdir()
    shutil.copy(folder / "photo.png", volume / "own")
    (volume / "MNIST").symlink_to(folder / "MNIST")
    stages.assert_fails(stages.call("infer", "own/*.png", model=volume, data=volume), 2, volume / "own")
    assert (volume / "own/photo.png").exists()


def test_a_file_in_place_of_the_folder_is_named_and_kept(volume, infer):
    (volume / "own").write_text("mine")
    stages.assert_fails(infer("photo.png"), 1, "own")
    assert (volume / "own").read_text() == "mine"


# Other data sets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def other(monkeypatch):
    """A function that has pictures prepared and drawn for another data set: it gets what differs from MNIST's entry."""

    def choose(**changes):
        data_set = dataclasses.replace(DATA_SET, preparation="resize", **changes)
        for module in (images, reading, own):
            monkeypatch.setattr(module, "DATA_SET", data_set, raising=False)

    return choose


def test_fashion_mnists_own_test_images_as_files_are_predicted_as_their_raw_pixels(other, trained):
    other()
    predictor = prediction.load_predictor(trained, None)  # of any network: only the pixels must be the same
    for pixels in stages.read_fashion_images(200):
        read, seen = reading.read(opening.open_picture(encode(Image.fromarray(pixels.numpy()))), predictor)
        assert seen.equal(pixels)
        assert read == predictor.predict(pixels)


def test_coloured_images_as_files_are_their_own_pixels_and_larger_ones_are_reduced_to_them(other):
    other(shape=(3, 24, 32))
    pixels = torch.randint(0, 256, (24, 32, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    assert preparation.resize(opening.open_picture(encode(image))).equal(pixels)
    enlarged = image.resize((32 * 9, 24 * 9), Image.Resampling.NEAREST)
    flat = Image.new("RGB", (2000, 900), (10, 200, 30))
    assert preparation.resize(enlarged).shape == (24, 32, 3)
    assert preparation.resize(flat).flatten(0, 1).unique(dim=0).tolist() == [[10, 200, 30]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "La", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F", "HSV"]
)
def test_a_picture_of_any_mode_is_resized(other, mode, channels):
    other(shape=(channels, 32, 16))
    prepared = preparation.resize(opening.in_8_bits(Image.new(mode, (50, 40))))
    assert prepared.shape == ((32, 16) if channels == 1 else (32, 16, 3))
    assert prepared.dtype == torch.uint8


@pytest.mark.parametrize(("classes", "shape"), [(26, (32, 32, 3)), (50, (28, 28)), (2, (64, 48, 3))])
def test_the_drawing_has_a_bar_for_each_class_whatever_its_name(other, monkeypatch, classes, shape):
    names = ("$b_{", "a class with a long name", *(f"class {number}" for number in range(2, classes)))
    other(classes=names)
    drawn = []
    monkeypatch.setattr(own, "as_png", lambda figure: drawn.append(figure) or figures.as_png(figure))
    result = {"prediction": 1, "probabilities": [1 / classes] * classes, "confidence": "unsure"}
    png = own.draw("photo.png", Image.new("RGB", (30, 20)), torch.zeros(shape, dtype=torch.uint8), result)
    _, middle, right = drawn[0].axes
    assert [label.get_text() for label in right.get_yticklabels()] == [*names]
    assert middle.get_title().endswith(f"{shape[1]} x {shape[0]}")
    labels = sorted(label.get_window_extent().y0 for label in right.get_yticklabels())
    assert min(b - a for a, b in pairwise(labels)) > 10  # pixels of 120 dpi: readable
    assert Image.open(io.BytesIO(png)).height >= 456


def test_what_is_said_of_several_digits_holds_for_each():
    def digit(number, best, confidence):
        rest = (1 - best) / 9
        probabilities = [best if index == number else rest for index in range(10)]
        return {"prediction": number, "probabilities": probabilities, "confidence": confidence, "box": (0, 0, 9, 9)}

    read = reading.as_reading([digit(1, 0.999, "unsure"), digit(2, 0.95, "sure")])
    assert own.as_text(read) == "predicted 12 (each at least 95.0 %), not sure"


def test_an_image_unlike_the_trained_ones_is_no_digit_only_where_images_are_digits(other, monkeypatch):
    result = {"prediction": None, "probabilities": [0.1] * 9 + [0.1], "confidence": "no digit"}
    assert own.as_text(result).startswith("does not look like a digit; closest to 0")
    other(classes=("top", *"bcdefghij"))
    monkeypatch.setattr(outcome, "UNLIKE", "out of distribution")
    text = own.as_text(result | {"confidence": "out of distribution"})
    assert text.startswith("unlike the images it was trained on; closest to top")
    assert "digit" not in text
