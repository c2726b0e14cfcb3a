"""Predictions of single images: reproducible to the last bit, and their confidence."""

import io

import pytest
import torch
from PIL import Image

import example
import infer
import net
import stages
from pictures import picture, prediction
from stage.images import read_images
from stage.process import Failure


@pytest.fixture(scope="module")
def predictor(trained, data):
    """The predictor of the trained model, with its threshold."""
    return prediction.load_predictor(trained, data)


def test_test_images_and_files_get_the_same_probabilities(predictor, data):
    for index, digit in enumerate(example.read_test_images(data)[0][:50]):
        file = io.BytesIO()
        Image.fromarray(digit.numpy()).resize((140, 140), Image.Resampling.NEAREST).save(file, "PNG")
        prepared = picture.prepare(picture.open_picture(file.getvalue()))
        sample = infer.predict(predictor, prepared, 0, index)
        assert sample["probabilities"] == predictor.predict(prepared.clone())["probabilities"]


def test_probabilities_do_not_depend_on_earlier_predictions(predictor, data):
    images = example.read_test_images(data)[0][:20]
    first = [predictor.predict(image) for image in images]
    assert [predictor.predict(image) for image in images.flip(0)] == first[::-1]


def test_probabilities_agree_with_the_examples_network(predictor, trained, data):
    images = example.read_test_images(data)[0][:100]
    expected = example.predict(example.load(trained / "mnist_cnn.pt"), images).exp()
    actual = torch.tensor([predictor.predict(image)["probabilities"] for image in images])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_the_energy_is_that_of_the_logits(predictor, data):
    images = example.read_test_images(data)[0][:50]
    log_probabilities, energies = predictor.forward(images)
    with torch.inference_mode():
        logits = predictor.model.logits(net.to_input(images))
    # log_softmax() subtracts the logsumexp from the logits, which is the energy.
    torch.testing.assert_close(logits - energies[:, None], log_probabilities)


def test_at_most_one_percent_of_the_validation_images_are_flagged(predictor, data):
    images = read_images(data, "train")[0][-5000:]
    flagged = sum(predictor.predict(image)["confidence"] == "no digit" for image in images)
    print(f"{flagged} of 5,000 validation images are flagged")
    assert 25 <= flagged <= 50


def test_confidence_depends_on_probability_and_energy(predictor, data):
    seen = set()
    for image in example.read_test_images(data)[0][:2000]:
        result = predictor.predict(image)
        best = max(result["probabilities"])
        energy = predictor.forward(image[None])[1].item()
        if energy < predictor.threshold:
            assert (result["confidence"], result["prediction"]) == ("no digit", None)
        else:
            assert result["confidence"] == ("sure" if best >= 0.9 else "unsure")
            assert result["prediction"] == result["probabilities"].index(best)
        seen.add(result["confidence"])
    assert seen == {"sure", "unsure", "no digit"}


def test_half_of_pure_noise_is_flagged(predictor):
    noise = torch.randint(0, 256, (100, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    confidences = [predictor.predict(image)["confidence"] for image in noise]
    assert confidences.count("no digit") >= 50


def test_accuracy_is_read_only_if_it_is_of_this_model(volume, data):
    assert prediction.load_predictor(volume, None).accuracy is None
    assert stages.run("evaluate", "--min-accuracy", "0", model=volume).returncode == 0
    accuracy = stages.read_json(volume / "eval_results.json")["Accuracy"]
    assert prediction.load_predictor(volume, None).accuracy == accuracy
    (volume / "eval_results.json").write_text('{"model_sha256": "0", "Accuracy": 99}')
    assert prediction.load_predictor(volume, None).accuracy is None


def test_missing_training_images_are_an_error_unless_no_threshold_is_wanted(trained, tmp_path):
    assert prediction.load_predictor(trained, None).threshold is None
    with pytest.raises(Failure, match="train-images"):
        prediction.load_predictor(trained, tmp_path)
