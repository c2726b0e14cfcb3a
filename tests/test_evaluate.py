"""evaluate: its figures compared with others computed here, its pictures, and its exit status."""

import io

import pytest
import torch
from PIL import Image

import evaluate
import example
import stages

LABELS = torch.tensor([digit for digit in range(9) for _ in range(20 + digit)])  # there is no 9


def test_all_figures_are_those_of_a_computation_by_hand():
    scores = torch.randn(len(LABELS), 10, generator=torch.Generator().manual_seed(0))
    scores[torch.arange(len(LABELS)), LABELS] += 2
    scores[:, 7] = -100  # a model that predicts no 7, and most others right
    log_probabilities = scores.log_softmax(1)
    rows, labels = log_probabilities.tolist(), LABELS.tolist()
    predictions = [row.index(max(row)) for row in rows]
    pairs = [*zip(labels, predictions, strict=True)]
    results = evaluate.evaluate(log_probabilities, LABELS)
    loss = -sum(row[label] for row, label in zip(rows, labels, strict=True)) / len(rows)
    assert results["Test loss"] == pytest.approx(loss, rel=1e-5)
    assert results["Accuracy"] == pytest.approx(100 * sum(label == predicted for label, predicted in pairs) / len(rows))
    for digit, figures in enumerate(results["classes"]):
        right, predicted, count = pairs.count((digit, digit)), predictions.count(digit), labels.count(digit)
        precision, recall = right / predicted if predicted else 0, right / count if count else 0
        f1 = 2 * precision * recall / (precision + recall) if right else 0
        expected = {"class": str(digit), "precision": precision, "recall": recall, "f1": f1, "count": count}
        assert figures == pytest.approx(expected)
        assert results["confusion_matrix"][digit] == [pairs.count((digit, other)) for other in range(10)]


def test_a_perfect_model_has_no_mistakes_and_pictures_all_the_same():
    log_probabilities = torch.full((216, 10), -1000.0)
    log_probabilities[torch.arange(216), LABELS] = 0.0
    results = evaluate.evaluate(log_probabilities, LABELS)
    assert (results["Accuracy"], results["Test loss"]) == (100, 0)
    images = torch.zeros(216, 28, 28, dtype=torch.uint8)
    Image.open(io.BytesIO(evaluate.draw_confusion_matrix(results["confusion_matrix"]))).verify()
    Image.open(io.BytesIO(evaluate.draw_mistakes(images, LABELS, log_probabilities))).verify()


def test_the_mistakes_shown_are_the_25_most_confident_ones():
    # Image n is all of the grey level 5n + 5, and was predicted wrong with a confidence that grows with n.
    images = torch.arange(5, 205, 5, dtype=torch.uint8).view(40, 1, 1).expand(40, 28, 28)
    scores = torch.zeros(40, 10)
    scores[:, 1] = torch.linspace(3, 6, 40)
    png = evaluate.draw_mistakes(images, torch.zeros(40, dtype=torch.int64), scores.log_softmax(1))
    colors = Image.open(io.BytesIO(png)).convert("L").getcolors()
    assert {round(grey / 5) for count, grey in colors if count > 1500 and 0 < grey < 255} == {*range(16, 41)}


def test_the_results_are_those_of_the_examples_network_and_name_the_model(finished, data):
    images, labels = example.read_test_images(data)
    log_probabilities = example.predict(example.load(finished / "mnist_cnn.pt"), images)
    results = stages.read_json(finished / "eval_results.json")
    loss = torch.nn.functional.nll_loss(log_probabilities, labels).item()
    assert results["Test loss"] == pytest.approx(loss, rel=1e-3)
    right = (log_probabilities.argmax(1) == labels).sum().item()
    assert abs(results["Accuracy"] - right / 100) <= 0.02  # one image or two may be on the edge
    assert results["model_sha256"] == stages.sha256(finished / "mnist_cnn.pt")


def test_its_three_files_are_written_over_older_ones_and_nothing_else_is(start):
    folder = start("evaluate")
    (folder / "eval_results.json").write_bytes(b"\xff{garbage")
    stages.assert_succeeds(stages.call("evaluate", model=folder))
    assert {*stages.contents(folder)} == {"mnist_cnn.pt"} | stages.MADE_BY["evaluate"]
    assert stages.read_json(folder / "eval_results.json")["Accuracy"] > 95


@pytest.mark.parametrize("name", ["confusion_matrix.png", "mistakes.png"])
def test_the_pictures_are_large_and_coloured(finished, name):
    picture = Image.open(finished / name).convert("RGB")
    assert min(picture.size) > 500
    assert len(picture.getcolors(10**6)) > 10


def test_an_accuracy_just_under_the_smallest_fails_is_not_rounded_to_it_and_leaves_the_old_results(finished, volume):
    (volume / "eval_results.json").write_text("old")
    accuracy = stages.read_json(finished / "eval_results.json")["Accuracy"]
    with stages.unchanged(volume):
        result = stages.call("evaluate", "--min-accuracy", str(accuracy + 1e-7), model=volume)
    stages.assert_fails(result, 1, f"{accuracy} %", f"--min-accuracy {accuracy + 1e-7}")


def test_a_model_whose_output_is_not_finite_fails(volume):
    weights = torch.load(volume / "mnist_cnn.pt", weights_only=True)
    torch.save({name: 1e30 * tensor for name, tensor in weights.items()}, volume / "mnist_cnn.pt")
    stages.assert_fails(stages.call("evaluate", "--min-accuracy", "0", model=volume), 1, "not finite", "--fresh")
    assert not (volume / "eval_results.json").exists()


def test_an_untrained_network_fails_by_default(tmp_path, data):
    torch.save(example.untrained().state_dict(), tmp_path / "mnist_cnn.pt")
    stages.assert_fails(stages.call("evaluate", model=tmp_path), 1, "--min-accuracy")
    assert {*stages.contents(tmp_path)} == {"mnist_cnn.pt"}
