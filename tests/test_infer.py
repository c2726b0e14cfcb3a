"""infer: how many pictures it leaves, of what, and what it says of them; predictions of single images."""

import collections
import io
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import example
import infer
import stages
from pictures import prediction
from stage import folders
from stage.images import read_images
from stage.process import Failure


def run(folder, *flags):
    stages.assert_succeeds(stages.call("infer", *flags, model=folder))
    return stages.read_json(folder / "predictions.json")


def indices(predictions):
    return [sample["index"] for sample in predictions["predictions"]]


def name(sample):
    return f"{sample['prediction']}_{sample['index']}.png"


@pytest.fixture
def predictions(finished):
    return stages.read_json(finished / "predictions.json")


def test_the_predictions_are_those_of_the_model_to_the_last_bit_and_name_it(finished, predictions, data):
    images, labels = example.read_test_images(data)
    predictor = prediction.load_predictor(finished)
    assert predictions["model_sha256"] == stages.sha256(finished / "mnist_cnn.pt")
    for sample in predictions["predictions"]:
        index = sample["index"]
        expected = predictor.predict(images[index])
        assert (sample["probabilities"], sample["prediction"]) == (expected["probabilities"], expected["prediction"])
        assert sample["truth"] == labels[index]


def test_a_picture_shows_the_digit_large_and_in_its_own_grey_levels(finished, predictions, data):
    images, _ = example.read_test_images(data)
    for sample in predictions["predictions"]:
        colors = Image.open(finished / "results" / name(sample)).convert("RGB").getcolors(10**6)
        shown = collections.Counter({red: count for count, (red, *others) in colors if {red} == {*others}})
        for grey, count in collections.Counter(images[sample["index"]].flatten().tolist()).items():
            # Its pixels are drawn at least five times as wide and high; colour maps may be out by one.
            assert sum(shown[grey + error] for error in (-1, 0, 1)) >= 25 * count, f"{name(sample)}: grey level {grey}"


def test_the_sheet_shows_all_samples(finished):
    sheet = Image.open(finished / "predictions.png").convert("RGB")
    one = Image.open(next((finished / "results").iterdir()))
    assert sheet.width * sheet.height == pytest.approx(5 * one.width * one.height, rel=0.1)


@pytest.mark.parametrize(("samples", "flags"), [(5, ()), (1, ("--samples", "1")), (7, ("--samples", "7"))])
def test_exactly_the_pictures_that_were_requested_are_there_named_by_prediction_and_index(start, samples, flags):
    folder = start("infer")
    (folder / "results").mkdir()
    for stale in ("3_1.png", "0_9999.png", "notes.txt"):
        (folder / "results" / stale).write_text("from an earlier run")
    predictions = run(folder, *flags)
    assert len({*indices(predictions)}) == samples
    pictures = {f"results/{name(sample)}" for sample in predictions["predictions"]}
    assert {*stages.contents(folder)} == {"mnist_cnn.pt"} | stages.MADE_BY["infer"] | pictures
    stages.assert_whole(folder)


@pytest.mark.parametrize("supported", [True, False], ids=["exchanging names", "on a file system that cannot"])
def test_results_are_replaced_and_while_names_can_be_exchanged_never_missing(tmp_path, monkeypatch, supported):
    rename = Path.rename

    def rename_and_look(path, target):
        rename(path, target)
        assert not supported or (tmp_path / "results").exists()

    folders.replace_folder(tmp_path / "results", {"1_1.png": b"old"})
    monkeypatch.setattr(Path, "rename", rename_and_look)
    if not supported:
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    folders.replace_folder(tmp_path / "results", {"2_2.png": b"new"})
    assert stages.contents(tmp_path).keys() == {"results/2_2.png"}
    assert os.listdir(tmp_path) == ["results"]


def test_a_seed_chooses_the_same_images_again_and_another_seed_others(start):
    folder = start("infer")
    first, again = (run(folder, "--seed", "3") for _ in range(2))
    assert indices(first) == indices(again) == infer.choose(10_000, 5, 3)
    assert indices(first) != infer.choose(10_000, 5, 4)


def test_choices_name_no_image_twice_reach_all_and_differ_without_a_seed():
    assert sorted(infer.choose(10_000, 10_000, 1)) == [*range(10_000)]
    assert len({tuple(infer.choose(10_000, 5, None)) for _ in range(20)}) == 20


@pytest.mark.parametrize("count", [1, 2, 5, 6, 10, 11, 100])
def test_a_sheet_of_any_number_of_samples_can_be_drawn(count):
    samples = [{"index": 1, "prediction": 2, "truth": 3, "probabilities": [0.1] * 10}] * count
    Image.open(io.BytesIO(infer.draw(samples, torch.zeros(count, 28, 28, dtype=torch.uint8)))).verify()


def test_the_accuracy_of_the_evaluated_model_is_in_the_predictions_and_printed(finished, predictions, volume):
    assert predictions["evaluated_accuracy"] == stages.read_json(finished / "eval_results.json")["Accuracy"]
    results = {"Accuracy": 87.65, "model_sha256": stages.sha256(volume / "mnist_cnn.pt")}
    (volume / "eval_results.json").write_text(json.dumps(results))
    assert "87.65" in stages.call("infer", model=volume).stdout


def test_probabilities_do_not_depend_on_earlier_predictions(predictor, data):
    images = example.read_test_images(data)[0][:20]
    first = [predictor.predict(image) for image in images]
    assert [predictor.predict(image) for image in images.flip(0)] == first[::-1]


def test_probabilities_agree_with_the_examples_network(predictor, trained, data):
    images = example.read_test_images(data)[0][:100]
    expected = example.predict(example.load(trained / "mnist_cnn.pt"), images).exp()
    actual = torch.tensor([predictor.predict(image)["probabilities"] for image in images])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_the_distance_is_that_of_the_last_layers_features_from_the_nearest_training_image(predictor, data):
    images = read_images(data, "train")[0]
    log_probabilities, features = predictor.forward(images[:50])
    logits = features[:, -10:]  # scaled to length 1
    torch.testing.assert_close(logits.argsort(), log_probabilities.argsort())
    assert features.shape == (50, 380)  # what goes into the first linear layer, and what comes out of each
    distances = predictor.distances(log_probabilities, features)
    assert max(distances[::5]) < 1e-3  # every fifth training image is one of those that images are compared with
    assert max(distances) > 1e-2
    alike = predictor.likeness.known[log_probabilities[1].argmax()]
    cosines = torch.nn.functional.cosine_similarity(features[1], alike.T)
    assert distances[1] == pytest.approx((1 - cosines.max().item()) / predictor.likeness.unlike, abs=1e-3)
    assert sum(each.shape[1] for each in predictor.likeness.known) == 11_000


def test_a_network_without_a_linear_layer_is_compared_by_its_logits(monkeypatch):
    class Mean(torch.nn.Module):
        def logits(self, x):
            return x.flatten(1)[:, 300:310]

        def forward(self, x):
            return self.logits(x).log_softmax(1)

    predictor = prediction.Predictor(Mean(), "sha256")
    images = torch.randint(0, 256, (30, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    predictor.likeness = prediction.learn_likeness(*map(predictor.forward_many, (images[:20], images[20:])))
    assert sum(each.shape[1] for each in predictor.likeness.known) == 20
    assert predictor.predict(images[3])["confidence"] != "no digit"


def test_less_than_one_percent_of_the_validation_images_are_flagged(predictor, data):
    images = read_images(data, "train")[0][-5000:]
    flagged = sum(distance > 1 for distance in predictor.distances(*predictor.forward(images)))
    assert 25 <= flagged <= 35


def test_confidence_depends_on_probability_and_likeness(predictor, data):
    seen = set()
    for image in example.read_test_images(data)[0][:2000]:
        result = predictor.predict(image)
        best = max(result["probabilities"])
        (distance,) = predictor.distances(*predictor.forward(image[None]))
        if distance > 1:
            assert (result["confidence"], result["prediction"]) == ("no digit", None)
        else:
            assert result["confidence"] == ("sure" if best >= 0.9 and distance <= predictor.likeness.like else "unsure")
            assert result["prediction"] == result["probabilities"].index(best)
        seen.add(result["confidence"])
    assert seen == {"sure", "unsure", "no digit"}


def test_half_of_pure_noise_is_flagged(predictor):
    noise = torch.randint(0, 256, (100, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    confidences = [predictor.predict(image)["confidence"] for image in noise]
    assert confidences.count("no digit") >= 50


@pytest.mark.parametrize(
    ("content", "accuracy"),
    [
        ('{"Accuracy": 87.65, "model_sha256": "SHA256"}', 87.65),
        ('{"Accuracy": 87.65, "model_sha256": "another"}', None),
        ('{"Accuracy": "good", "model_sha256": "SHA256"}', None),
        ("{garbage", None),
        pytest.param("[" * 100_000, None, id="deep lists"),
    ],
)
def test_the_accuracy_is_read_only_if_it_is_of_this_model(volume, content, accuracy):
    (volume / "eval_results.json").write_text(content.replace("SHA256", stages.sha256(volume / "mnist_cnn.pt")))
    assert prediction.load_predictor(volume).accuracy == accuracy


def test_missing_training_images_are_an_error_unless_nothing_is_compared_with_them(trained, tmp_path):
    assert prediction.load_predictor(trained).likeness is None
    with pytest.raises(Failure, match="train-images"):
        prediction.load_predictor(trained, tmp_path)
