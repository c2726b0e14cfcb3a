"""record.py: what train_results.json says, of this version and of others, and how a training resumes by it."""

import pytest
import torch

import stages
from stage.process import Failure
from training import plan, record, settings, start

IMAGES = torch.zeros(1, 28, 28, dtype=torch.uint8).expand(55_000, 28, 28)
LABELS = torch.zeros(55_000, dtype=torch.int64)
OTHER_DATA = dict.fromkeys(stages.RAW_FILES, "0" * 64)


def resume(folder, **requested):
    """The record and the shared state of the training that goes on from a volume."""
    decided = plan.decide(requested, False, folder)
    assert decided.action == "resume"
    return start.start_or_resume(decided, IMAGES, LABELS, folder)


def test_the_record_of_a_finished_training_names_the_model_and_the_data(trained, data):
    results = stages.results(trained)
    assert results["finished"] is True
    assert results["model_sha256"] == stages.sha256(trained / "mnist_cnn.pt")
    assert results["data_sha256"] == {name: stages.sha256(data / stages.RAW / name) for name in stages.RAW_FILES}


def test_the_record_says_how_fast_the_training_was_and_how_long_each_worker_waited(trained):
    results = stages.results(trained)
    assert results["images_per_second"] == pytest.approx(55_000 / results["seconds"])
    assert all(0 < worker["waited_seconds"] < results["seconds"] for worker in results["workers"])


def test_the_history_has_a_line_for_every_epoch(trained):
    (line,) = stages.results(trained)["history"]
    assert line["epoch"] == 1
    assert line["validation_accuracy"] > 95
    assert 0 < line["validation_loss"] < 0.2


def test_a_record_is_read_as_it_was_written(trained):
    text = (trained / "train_results.json").read_text()
    assert record.parse_record(text).to_json() == text


@pytest.mark.parametrize("name", {*settings.SETTINGS} - {"epochs"})
def test_a_training_without_a_setting_goes_on_with_its_default(unfinished, name):
    stages.edit_training(unfinished, lambda content: content["settings"].pop(name))
    resumed, _ = resume(unfinished)
    assert resumed.settings == settings.Settings(epochs=3)


def test_a_training_with_an_unknown_setting_is_refused(volume):
    stages.edit_training(volume, lambda content: content["settings"].update(layers=7))
    stages.assert_fails(stages.call("train", model=volume), 1, "layers", record.VERSION)


@pytest.mark.parametrize("either", ["volume", "unfinished"])
def test_a_training_on_other_data_is_refused(request, either):
    folder = request.getfixturevalue(either)
    stages.edit_record(folder, data_sha256=OTHER_DATA)
    before = stages.contents(folder)
    stages.assert_fails(stages.call("train", model=folder), 2, "other data", "--fresh")
    assert stages.contents(folder) == before


def test_a_training_that_is_resumed_goes_on_with_its_sum_of_parameters(unfinished):
    summed = torch.randn(21_841)
    stages.edit_checkpoint(unfinished, sum=lambda saved: summed)
    _, shared = resume(unfinished)
    assert shared.sums.sum(0).equal(summed)


@pytest.mark.parametrize("either", ["volume", "unfinished"])
def test_a_training_of_another_number_of_epochs_begins_a_new_sum_of_parameters(request, either):
    folder = request.getfixturevalue(either)
    stages.edit_checkpoint(folder, sum=torch.ones_like)
    _, shared = resume(folder, epochs=4)
    assert not shared.sums.any()


@pytest.mark.parametrize("part", ["model", "velocities", "sum"])
def test_a_part_of_the_checkpoint_that_was_left_out_is_missed(unfinished, part):
    parts = stages.load_checkpoint(unfinished)
    del parts[part]
    torch.save(parts, unfinished / "checkpoint.pt")
    with pytest.raises(Failure, match="state_dict" if part == "model" else part):
        resume(unfinished)


def test_a_training_that_is_resumed_has_the_velocities_of_its_workers(unfinished):
    velocities = stages.load_checkpoint(unfinished)["velocities"]
    resumed, shared = resume(unfinished)
    assert shared.velocities.equal(velocities)
    assert resumed.totals()[1] == 55_000
