"""infer with the user's own pictures, as a process."""

import os
import shutil

import pytest
from PIL import Image

import example
import stages
from pictures import picture, prediction


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


def own(volume):
    """Return the names of the pictures in own/, and its predictions."""
    predictions = stages.read_json(volume / "own" / "predictions.json")["predictions"]
    return {path.name for path in (volume / "own").glob("*.png")}, predictions


def test_own_pictures_have_their_own_folder_and_other_results_stay(volume, folder):
    assert stages.run("infer", model=volume).returncode == 0
    before = stages.contents(volume)
    result = stages.run("infer", "photo.png", "scans/*.png", model=volume, data=folder)
    assert result.returncode == 0, result.stderr
    names, predictions = own(volume)
    assert len(names) == len(predictions) == 3
    assert all(Image.open(volume / "own" / name).size == (1200, 456) for name in names)
    after = stages.contents(volume)
    assert {name: after[name] for name in after if not name.startswith("own/")} == before


def test_results_of_files_with_the_same_stem_are_numbered(volume, folder):
    shutil.copy(folder / "photo.png", folder / "scans" / "photo.bmp.png")
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
        shutil.copy(folder / "photo.png", folder / name / "photo.png")
    assert stages.run("infer", "photo.png", "a/photo.png", "?/photo.png", model=volume, data=folder).returncode == 0
    names, predictions = own(volume)
    stem = f"{predictions[0]['prediction']}_photo".replace("None", "none")
    assert names == {f"{stem}.png", f"{stem}-2.png", f"{stem}-3.png"}
    assert [entry["file"] for entry in predictions] == [
        str(folder / name) for name in ("photo.png", "a/photo.png", "b/photo.png")
    ]


def test_a_file_gets_the_same_probabilities_as_its_prepared_pixels(volume, folder):
    assert stages.run("infer", "scans/photo.jpg", model=volume, data=folder).returncode == 0
    (entry,) = own(volume)[1]
    digit = picture.prepare(picture.open_picture((folder / "scans/photo.jpg").read_bytes()))
    assert entry == {"file": str(folder / "scans/photo.jpg")} | prediction.load_predictor(volume, folder).predict(digit)


def test_unreadable_pictures_are_named_and_the_others_predicted(volume, folder):
    wrong = ("blank.png", "broken.png", "missing.png", "no/*.png", "scans", "x" * 300, "loop.png", "loop.p")
    (folder / "loop.png").symlink_to("loop.p")
    (folder / "loop.p").symlink_to("loop.png")
    result = stages.run("infer", *wrong[:2], "photo.png", *wrong[2:], model=volume, data=folder)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == len(wrong)
    assert all(name in line for name, line in zip(wrong, lines, strict=True))
    assert len(own(volume)[0]) == 1


def test_a_wildcard_matches_files_only_and_nobody_is_advised_to_remove_a_folder(volume, folder):
    result = stages.run("infer", "photo.p*", "*s", "MNIST", model=volume, data=folder)
    assert [line.split()[1] for line in result.stderr.splitlines()] == [f"{folder}/*s", f"{folder}/MNIST"]
    assert "rm" not in result.stderr.split()


def test_file_names_in_any_script_and_of_any_bytes_are_drawn_and_published(volume, folder):
    (folder / "my[1]").mkdir()
    for name in ("七.png", os.fsdecode(b"\xff" * 200 + b".png"), "my[1]/photo.png"):
        shutil.copy(folder / "photo.png", folder / name)
    names = ["七.png", os.fsdecode(b"\xff" * 100 + b"*"), "my[[]1]/*"]
    stages.assert_succeeds(stages.run("infer", *names, model=volume, data=folder))
    assert len(own(volume)[0]) == 3


def test_a_picture_in_lab_colours_is_predicted_and_drawn(volume, folder):
    grey = Image.open(folder / "photo.png")
    Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2]).save(folder / "lab.tif")
    stages.assert_succeeds(stages.run("infer", "photo.png", "lab.tif", model=volume, data=folder))
    one, other = own(volume)[1]
    assert one["probabilities"] == other["probabilities"]


def test_pictures_in_the_folder_that_the_results_replace_are_refused_and_kept(volume, folder):
    (volume / "own").mkdir()
    shutil.copy(folder / "photo.png", volume / "own")
    (volume / "MNIST").symlink_to(folder / "MNIST")
    stages.assert_fails(stages.run("infer", "own/*.png", model=volume, data=volume), 2, volume / "own")
    assert (volume / "own/photo.png").exists()


def test_earlier_results_stay_if_all_pictures_are_refused(volume, folder):
    assert stages.run("infer", "photo.png", model=volume, data=folder).returncode == 0
    before = stages.contents(volume)
    stages.assert_fails(stages.run("infer", "blank.png", model=volume, data=folder), 1, "blank.png", "blank")
    assert stages.contents(volume) == before


def test_paths_may_start_with_data_and_contain_any_characters(volume, folder):
    names = ["data/photo.png", "./data/scans/photo.png", str(folder / "scans/photo.jpg"), "scans/[a] $b_{.png"]
    result = stages.run("infer", *names, model=volume, data=folder)
    assert result.returncode == 0, result.stderr
    assert len(own(volume)[0]) == 4


@pytest.mark.parametrize("flag", ["--samples", "--seed"])
def test_flags_for_test_images_are_refused_with_pictures(tmp_path, flag):
    stages.assert_fails(stages.run("infer", "photo.png", flag, "3", model=tmp_path), 2, flag)


def test_a_file_in_place_of_the_folder_is_named_and_kept(volume, folder):
    (volume / "own").write_text("mine")
    stages.assert_fails(stages.run("infer", "photo.png", model=volume, data=folder), 1, "own")
    assert (volume / "own").read_text() == "mine"
