"""infer as a process: how many pictures it leaves, of what, and what it says of them."""

import collections
import io
import json
import shutil

import example
import infer
import pytest
import stages
import torch
from PIL import Image


def run(folder, *flags):
    """Runs infer, and returns what predictions.json says afterwards."""
    result = stages.run("infer", *flags, model=folder)
    assert result.returncode == 0, result.stderr
    return stages.read_json(folder / "predictions.json")["predictions"]


def indices(predictions):
    """Which test images they are of."""
    return [sample["index"] for sample in predictions]


@pytest.fixture(scope="module")
def inferred(trained, tmp_path_factory):
    """The volume after infer has run."""
    folder = tmp_path_factory.mktemp("inferred")
    (folder / "mnist_cnn.pt").write_bytes((trained / "mnist_cnn.pt").read_bytes())
    run(folder)
    return folder


def test_five_pictures_are_there_and_named_by_prediction_and_index(inferred):
    predictions = stages.read_json(inferred / "predictions.json")["predictions"]
    assert len(predictions) == 5
    assert stages.pictures(inferred) == {f"{sample['prediction']}_{sample['index']}.png" for sample in predictions}


def test_nothing_but_its_files_is_written(inferred):
    others = {name for name in stages.contents(inferred) if not name.startswith("results/")}
    assert others == {"mnist_cnn.pt"} | stages.MADE_BY["infer"]


def test_the_predictions_are_those_of_the_examples_network(inferred, data):
    images, labels = example.read_test_images(data)
    model = example.load(inferred / "mnist_cnn.pt")
    for sample in stages.read_json(inferred / "predictions.json")["predictions"]:
        index = sample["index"]
        expected = example.read_digits(model, images[index : index + 1]).exp()[0]
        torch.testing.assert_close(torch.tensor(sample["probabilities"]), expected, atol=1e-4, rtol=1e-3)
        assert sample["prediction"] == sample["probabilities"].index(max(sample["probabilities"]))
        assert sample["truth"] == labels[index]


def test_the_predictions_name_the_model_that_made_them(inferred):
    predictions = stages.read_json(inferred / "predictions.json")
    assert predictions["model_sha256"] == stages.sha256(inferred / "mnist_cnn.pt")


def test_a_picture_shows_the_digit_large_and_in_its_own_grey_levels(inferred, data):
    images, _ = example.read_test_images(data)
    for sample in stages.read_json(inferred / "predictions.json")["predictions"]:
        path = inferred / "results" / f"{sample['prediction']}_{sample['index']}.png"
        picture = Image.open(path).convert("RGB")
        shown = collections.Counter(
            {red: count for count, (red, *others) in picture.getcolors(10**6) if {red} == {*others}}
        )
        for grey, count in collections.Counter(images[sample["index"]].flatten().tolist()).items():
            # Its pixels are drawn at least five times as wide and high; colour maps may be out by one.
            assert sum(shown[grey + error] for error in (-1, 0, 1)) >= 25 * count, f"{path.name}: grey level {grey}"


def test_the_sheet_shows_all_samples(inferred):
    sheet = Image.open(inferred / "predictions.png").convert("RGB")
    one = Image.open(next((inferred / "results").iterdir()))
    assert sheet.width * sheet.height == pytest.approx(5 * one.width * one.height, rel=0.1)


@pytest.mark.parametrize("samples", [1, 7])
def test_exactly_as_many_pictures_are_there_as_were_asked_for(volume, samples):
    (volume / "results").mkdir()
    for name in ("3_1.png", "0_9999.png", "notes.txt"):
        (volume / "results" / name).write_text("from an earlier run")
    predictions = run(volume, "--samples", str(samples))
    assert len({*indices(predictions)}) == samples
    assert stages.pictures(volume) == {f"{sample['prediction']}_{sample['index']}.png" for sample in predictions}
    for name in stages.pictures(volume):
        Image.open(volume / "results" / name).verify()


def test_a_seed_chooses_the_same_images_again_and_another_seed_others(volume):
    first, again = (run(volume, "--seed", "3") for _ in range(2))
    assert indices(first) == indices(again) == infer.choose(10_000, 5, 3).tolist()
    assert indices(first) != infer.choose(10_000, 5, 4).tolist()


def test_without_a_seed_every_run_chooses_other_images():
    choices = {tuple(infer.choose(10_000, 5, None).tolist()) for _ in range(20)}
    assert len(choices) == 20


def test_choices_reach_all_test_images_and_name_none_twice():
    assert sorted(infer.choose(10_000, 10_000, 1).tolist()) == [*range(10_000)]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 10, 11, 100])
def test_a_sheet_of_any_number_of_samples_can_be_drawn(count):
    samples = [{"index": 1, "prediction": 2, "truth": 3, "probabilities": [0.1] * 10}] * count
    png = infer.draw(samples, torch.zeros(count, 28, 28, dtype=torch.uint8))
    Image.open(io.BytesIO(png)).verify()


@pytest.mark.parametrize("content", [None, b"garbage"])
def test_without_a_good_model_the_earlier_pictures_stay(inferred, tmp_path, content):
    volume = shutil.copytree(inferred, tmp_path / "volume")
    (volume / "mnist_cnn.pt").unlink()
    if content:
        (volume / "mnist_cnn.pt").write_bytes(content)
    before = stages.contents(volume)
    stages.assert_fails(stages.run("infer", model=volume), 1, "mnist_cnn.pt", "--fresh")
    assert stages.contents(volume) == before


def test_the_accuracy_of_the_evaluated_model_is_in_the_predictions_and_printed(volume):
    sha256 = stages.sha256(volume / "mnist_cnn.pt")
    (volume / "eval_results.json").write_text(json.dumps({"Accuracy": 87.65, "model_sha256": sha256}))
    result = stages.run("infer", model=volume)
    assert result.returncode == 0, result.stderr
    assert stages.read_json(volume / "predictions.json")["evaluated_accuracy"] == 87.65
    assert "87.65" in result.stdout


def test_a_model_that_was_not_evaluated_has_no_accuracy_in_the_predictions(inferred):
    assert stages.read_json(inferred / "predictions.json")["evaluated_accuracy"] is None


@pytest.mark.parametrize(
    "content",
    [
        b"\xff{garbage",
        b'{"Accuracy": 87.65, "model_sha256": "another"}',
        b'{"Accuracy": "good", "model_sha256": "%s"}',
    ],
    ids=["garbage", "another model's", "an accuracy that is a text"],
)
def test_evaluation_results_that_do_not_fit_are_no_accuracy_and_no_failure(volume, content):
    sha256 = stages.sha256(volume / "mnist_cnn.pt").encode()
    (volume / "eval_results.json").write_bytes(content.replace(b"%s", sha256))
    run(volume)
    assert stages.read_json(volume / "predictions.json")["evaluated_accuracy"] is None
