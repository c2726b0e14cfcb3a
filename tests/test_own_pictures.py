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


@pytest.fixture
def infer(volume, folder):
    return lambda *names: stages.run("infer", *names, model=volume, data=folder)


def own(volume):
    """Return the names of the pictures in own/, and its predictions."""
    predictions = stages.read_json(volume / "own" / "predictions.json")["predictions"]
    return {path.name for path in (volume / "own").glob("*.png")}, predictions


def test_own_pictures_have_their_own_folder_and_other_results_stay_also_where_all_are_refused(volume, infer):
    stages.assert_succeeds(stages.run("infer", model=volume))
    before = stages.contents(volume)
    stages.assert_succeeds(infer("photo.png", "scans/*.png"))
    names, predictions = own(volume)
    assert len(names) == len(predictions) == 3
    assert all(Image.open(volume / "own" / name).size == (1200, 456) for name in names)
    after = stages.contents(volume)
    assert {name: after[name] for name in after if not name.startswith("own/")} == before
    stages.assert_fails(infer("blank.png"), 1, "blank.png", "blank")
    assert stages.contents(volume) == after


def test_results_of_files_with_the_same_stem_are_numbered(volume, folder, infer):
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
        shutil.copy(folder / "photo.png", folder / name)
    stages.assert_succeeds(infer("photo.png", "a/photo.png", "?/photo.png"))
    names, predictions = own(volume)
    stem = f"{predictions[0]['prediction']}_photo".replace("None", "none")
    assert names == {f"{stem}.png", f"{stem}-2.png", f"{stem}-3.png"}
    files = [str(folder / name) for name in ("photo.png", "a/photo.png", "b/photo.png")]
    assert [entry["file"] for entry in predictions] == files


def test_a_file_gets_the_same_probabilities_as_its_prepared_pixels(volume, folder, infer):
    path = folder / "scans/photo.jpg"
    stages.assert_succeeds(infer("scans/photo.jpg"))
    (entry,) = own(volume)[1]
    digit = picture.prepare(picture.open_picture(path.read_bytes()))
    assert entry == {"file": str(path)} | prediction.load_predictor(volume, folder).predict(digit)


def test_what_is_no_readable_picture_is_named_not_to_be_removed_and_the_others_predicted(volume, folder, infer):
    (folder / "loop.png").symlink_to("loop.p")
    (folder / "loop.p").symlink_to("loop.png")
    files = ("blank.png", "broken.png", "missing.png", "loop.png", "loop.p")
    wrong = (*files, "no/*.png", "scans", "*s", "MNIST", "x" * 300)
    result = infer(*wrong[:2], "photo.p*", *wrong[2:])
    assert result.returncode == 1
    assert [line.split()[1].rstrip(":") for line in result.stderr.splitlines()] == [
        f"{folder}/{name}" for name in wrong
    ]
    assert "rm" not in result.stderr.split()
    assert len(own(volume)[0]) == 1


def test_paths_may_start_with_data_and_names_have_any_characters_and_bytes(volume, folder, infer):
    (folder / "my[1]").mkdir()
    for name in ("七.png", os.fsdecode(b"\xff" * 200 + b".png"), "my[1]/photo.png"):
        shutil.copy(folder / "photo.png", folder / name)
    names = ["data/photo.png", "./data/scans/photo.png", str(folder / "scans/photo.jpg"), "scans/[a] $b_{.png"]
    names += ["七.png", os.fsdecode(b"\xff" * 100 + b"*"), "my[[]1]/*"]
    stages.assert_succeeds(infer(*names))
    assert len(own(volume)[0]) == len(names)


def test_a_picture_in_lab_colours_is_predicted_and_drawn(volume, folder, infer):
    grey = Image.open(folder / "photo.png")
    Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2]).save(folder / "lab.tif")
    stages.assert_succeeds(infer("photo.png", "lab.tif"))
    one, other = own(volume)[1]
    assert one["probabilities"] == other["probabilities"]


def test_pictures_in_the_folder_that_the_results_replace_are_refused_and_kept(volume, folder):
    (volume / "own").mkdir()
    shutil.copy(folder / "photo.png", volume / "own")
    (volume / "MNIST").symlink_to(folder / "MNIST")
    stages.assert_fails(stages.run("infer", "own/*.png", model=volume, data=volume), 2, volume / "own")
    assert (volume / "own/photo.png").exists()


@pytest.mark.parametrize("flag", ["--samples", "--seed"])
def test_flags_for_test_images_are_refused_with_pictures(tmp_path, flag):
    stages.assert_fails(stages.run("infer", "photo.png", flag, "3", model=tmp_path), 2, flag)


def test_a_file_in_place_of_the_folder_is_named_and_kept(volume, infer):
    (volume / "own").write_text("mine")
    stages.assert_fails(infer("photo.png"), 1, "own")
    assert (volume / "own").read_text() == "mine"
