"""evaluate: its figures against others computed here, and the program as a process."""

import io
import itertools

import evaluate
import example
import pytest
import stages
import torch
from PIL import Image


@pytest.fixture(scope="module")
def judged(trained, tmp_path_factory):
    """The volume after evaluate has run, and what it said."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "mnist_cnn.pt").write_bytes((trained / "mnist_cnn.pt").read_bytes())
    result = stages.run("evaluate", model=folder)
    assert result.returncode == 0, result.stderr
    return folder


def guesses(labels, seed=0):
    """Log-probabilities of a reader that reads no 7, and most others right."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(labels), 10, generator=generator)
    scores[torch.arange(len(labels)), labels] += 2
    scores[:, 7] = -100
    return scores.log_softmax(1)


LABELS = torch.tensor([digit for digit in range(9) for _ in range(20 + digit)])  # there is no 9


def test_loss_and_accuracy_are_those_of_a_computation_by_hand():
    log_probabilities = guesses(LABELS)
    pairs = list(zip(log_probabilities.tolist(), LABELS.tolist(), strict=True))
    results = evaluate.judge(log_probabilities, LABELS)
    assert results["Test loss"] == pytest.approx(-sum(row[label] for row, label in pairs) / len(pairs), rel=1e-5)
    assert results["Accuracy"] == pytest.approx(100 * sum(row.index(max(row)) == label for row, label in pairs) / 216)


def test_the_figures_of_each_digit_are_those_of_a_computation_by_hand():
    log_probabilities = guesses(LABELS)
    reads = [row.index(max(row)) for row in log_probabilities.tolist()]
    pairs = list(zip(LABELS.tolist(), reads, strict=True))
    results = evaluate.judge(log_probabilities, LABELS)
    for digit, figures in enumerate(results["digits"]):
        right, read, count = pairs.count((digit, digit)), reads.count(digit), LABELS.tolist().count(digit)
        precision, recall = right / read if read else 0, right / count if count else 0
        f1 = 2 * precision * recall / (precision + recall) if right else 0
        expected = {"digit": digit, "precision": precision, "recall": recall, "f1": f1, "count": count}
        assert figures == pytest.approx(expected)
    for truth, read in itertools.product(range(10), repeat=2):
        assert results["confusion_matrix"][truth][read] == pairs.count((truth, read))


def test_a_perfect_reader_has_no_mistakes_and_the_pictures_say_so():
    log_probabilities = torch.full((216, 10), -1000.0)
    log_probabilities[torch.arange(216), LABELS] = 0.0
    results = evaluate.judge(log_probabilities, LABELS)
    assert (results["Accuracy"], results["Test loss"]) == (100, 0)
    images = torch.zeros(216, 28, 28, dtype=torch.uint8)
    for png in (
        evaluate.draw_confusion_matrix(results["confusion_matrix"]),
        evaluate.draw_mistakes(images, LABELS, log_probabilities),
    ):
        Image.open(io.BytesIO(png)).verify()


def test_the_mistakes_shown_are_the_25_most_confident_ones():
    # Image n is all of the grey level 5n + 5, and was read wrong with a confidence that grows with n.
    images = torch.arange(5, 205, 5, dtype=torch.uint8).view(40, 1, 1).expand(40, 28, 28)
    labels = torch.zeros(40, dtype=torch.int64)
    scores = torch.zeros(40, 10)
    scores[:, 1] = torch.linspace(3, 6, 40)
    picture = Image.open(io.BytesIO(evaluate.draw_mistakes(images, labels, scores.log_softmax(1)))).convert("L")
    large_areas = {round(grey / 5) for count, grey in picture.getcolors() if count > 1500 and 0 < grey < 255}
    assert large_areas == {n + 1 for n in range(15, 40)}


def test_the_results_are_those_that_the_examples_network_has(judged, data):
    images, labels = example.read_test_images(data)
    log_probabilities = example.read_digits(example.load(judged / "mnist_cnn.pt"), images)
    results = stages.read_json(judged / "eval_results.json")
    loss = torch.nn.functional.nll_loss(log_probabilities, labels).item()
    assert results["Test loss"] == pytest.approx(loss, rel=1e-3)
    right = (log_probabilities.argmax(1) == labels).sum().item()
    assert abs(results["Accuracy"] - right / 100) <= 0.02  # one image or two may be on the edge


def test_the_results_name_the_model_that_they_are_of(judged):
    results = stages.read_json(judged / "eval_results.json")
    assert results["model_sha256"] == stages.sha256(judged / "mnist_cnn.pt")


def test_nothing_but_its_three_files_is_written(judged):
    assert {*stages.contents(judged)} == {"mnist_cnn.pt"} | stages.MADE_BY["evaluate"]


@pytest.mark.parametrize("name", ["confusion_matrix.png", "mistakes.png"])
def test_the_pictures_can_be_looked_at(judged, name):
    picture = Image.open(judged / name).convert("RGB")
    assert min(picture.size) > 500
    assert len(picture.getcolors(10**6)) > 10


def test_a_model_under_the_least_accuracy_fails_and_leaves_the_old_results(volume):
    (volume / "eval_results.json").write_text("old")
    before = stages.contents(volume)
    stages.assert_fails(stages.run("evaluate", "--min-accuracy", "99.999", model=volume), 1, "--min-accuracy")
    assert stages.contents(volume) == before


def test_an_untrained_network_fails_without_being_told_so(tmp_path, data):
    torch.save(example.untrained().state_dict(), tmp_path / "mnist_cnn.pt")
    stages.assert_fails(stages.run("evaluate", model=tmp_path), 1, "--min-accuracy")
    assert {*stages.contents(tmp_path)} == {"mnist_cnn.pt"}


def test_garbage_in_place_of_older_results_is_replaced(volume, data):
    (volume / "eval_results.json").write_bytes(b"\xff{garbage")
    assert stages.run("evaluate", model=volume).returncode == 0
    assert stages.read_json(volume / "eval_results.json")["Accuracy"] > 95
