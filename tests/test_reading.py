"""Reading pictures of the kinds that people take and draw: paper, pens, polarities, several digits, other things."""

import sys

import numpy as np
import pytest
from PIL import Image

import example
import stages
from pictures import pieces, prediction, reading

sys.path.append(str(stages.TREE / "tests/bench"))

import handwriting

COUNT = 30
ROWS = ("plain", "crop dark 0", "crop light 0", "ruled 150 ink 60", "squared 180 ink 140", "panel", "axes", "table",
        "thumb", "strokes 1", "strokes 15", "page drawings", "pairs 0.1", "triples 0.3")  # fmt: skip


@pytest.fixture(scope="module")
def predictor(data, tmp_path_factory):
    """One of a model that is the same in each run of the tests on a machine, and better than after one epoch."""
    folder = tmp_path_factory.mktemp("reading")
    flags = ("--epochs", "3", "--num-processes", "1")
    stages.assert_succeeds(stages.run("train", *flags, model=folder))
    return prediction.load_predictor(folder, data)


@pytest.fixture(scope="module")
def rows(data):
    """The pictures of each row of the benchmark, and what is written on them."""
    images, labels = example.read_test_images(data)
    return dict(handwriting.rows(images.numpy(), labels.numpy()))


def outcomes(predictor, pictures):
    return [handwriting.outcome(predictor, *picture) for picture, _ in zip(pictures, range(COUNT), strict=False)]


@pytest.mark.parametrize("name", ROWS)
def test_what_anybody_can_read_is_read(predictor, rows, name):
    found = outcomes(predictor, rows[name])
    # The model is of three epochs; docs/drawing.md has the figures of a finished one.
    assert sum(is_right for is_right, *_ in found) >= 0.8 * COUNT
    assert sum(confidence == "sure" and not is_right for is_right, _, confidence in found) <= 2


@pytest.mark.parametrize("name", ["x", "tick", "heart", "face"])
def test_other_things_are_not_sure(predictor, rows, name):
    assert [confidence for _, _, confidence in outcomes(predictor, rows[name])].count("sure") <= 2


def test_a_stroke_that_is_no_digit_is_listed_too_and_the_whole_is_not_sure(predictor, data):
    one = 255 - handwriting.enlarge(example.read_test_images(data)[0][2].numpy()) * 255
    cross = np.asarray(handwriting.draw_strokes(handwriting.X, 12, 150, 25))
    read, pixels = reading.read(Image.fromarray(np.concatenate([one, cross], axis=1).astype(np.uint8)), predictor)
    one, other = read["digits"]
    assert one["prediction"] == 1
    assert other["confidence"] != "sure"  # which of the other two depends on the model
    assert (read["prediction"], read["confidence"] != "sure") == (None, True)
    assert pixels.shape == (28, 56)


def test_of_several_digits_the_least_sure_one_counts():
    def digit(prediction, best, confidence):
        rest = [(1 - best) / 9] * 9
        probabilities = [best, *rest]
        return {"prediction": prediction, "probabilities": probabilities, "confidence": confidence, "box": (0, 0, 9, 9)}

    digits = [digit(0, 0.99, "sure"), digit(None, 0.999, "no digit"), digit(0, 0.6, "unsure"), digit(0, 0.95, "sure")]
    for chosen, least in ((digits, 1), (digits[2:], 0), (digits[::3], 1)):
        read = reading.as_reading(chosen)
        assert read["prediction"] is None
        assert (read["probabilities"], read["confidence"]) == tuple(
            chosen[least][key] for key in ("probabilities", "confidence")
        )
        assert read["digits"] == chosen
    assert reading.as_reading(digits[:1])["prediction"] == 0


def test_more_than_20_pieces_are_a_texture_not_a_number(predictor):
    pixels = np.full((60, 800), 255, np.uint8)
    for column in range(30, 780, 30):
        pixels[15:45, column : column + 5] = 0
    assert len(reading.read(Image.fromarray(pixels), predictor)[0]["digits"]) == 1
    assert len(reading.read(Image.fromarray(pixels[:, :620]), predictor)[0]["digits"]) == 20


def test_pieces_are_connected_also_below_and_at_corners():
    mask = np.zeros((5, 9), bool)
    mask[:, 0] = mask[:, 4] = mask[4, :5] = True  # a U, whose sides are connected in the last row
    mask[0, 6] = mask[1, 7] = True
    numbers, boxes = pieces.find_pieces(mask)
    assert sorted(boxes) == [(0, 0, 5, 5), (0, 6, 2, 8)]
    assert (numbers > 0).tolist() == mask.tolist()
    assert numbers[0, 0] == numbers[0, 4] != numbers[0, 6] == numbers[1, 7]
