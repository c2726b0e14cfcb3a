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
    return start.start_or_resume(decided, decided.data_sha256, IMAGES, LABELS, folder)


def test_the_record_says_how_fast_and_how_well_the_training_went_and_how_long_each_worker_waited(trained):
    results = stages.results(trained)
    assert results["images_per_second"] == pytest.approx(55_000 / results["seconds"])
    assert all(0 < worker["waited_seconds"] < results["seconds"] for worker in results["workers"])
    (line,) = results["history"]
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


def test_the_reason_why_a_checkpoint_cannot_be_used_is_told(unfinished):
    stages.edit_checkpoint(unfinished, results=lambda text: text.replace('"lr"', '"layers"'))
    with pytest.raises(Failure, match="layers"):
        resume(unfinished)


@pytest.mark.parametrize("either", ["volume", "unfinished"])
def test_a_training_on_other_data_is_refused(request, either):
    folder = request.getfixturevalue(either)
    stages.edit_record(folder, data_sha256=OTHER_DATA)
    with stages.unchanged(folder):
        stages.assert_fails(stages.call("train", model=folder), 2, "other data", "--fresh")


@pytest.mark.parametrize(
    ("state", "requested"), [("unfinished", {}), ("unfinished", {"epochs": 4}), ("volume", {"epochs": 4})]
)
def test_a_training_goes_on_with_its_sum_of_parameters_but_not_with_another_number_of_epochs(request, state, requested):
    folder, summed = request.getfixturevalue(state), torch.randn(21_841)
    stages.edit_checkpoint(folder, sum=lambda saved: summed)
    _, shared = resume(folder, **requested)
    assert shared.parameter_sums.sum(0).equal(torch.zeros_like(summed) if requested else summed)


def test_no_more_epochs_than_the_checkpoint_has_done_are_refused_though_the_record_is_older(unfinished):
    stages.edit_record(unfinished, batches=10, history=[])  # train was killed between the publication of the two
    with pytest.raises(Failure, match=r"already done 1\.0 of 3 epochs"):
        resume(unfinished, epochs=1)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_velocities_are_kept_and_another_number_of_workers_is_told(unfinished, workers, capsys):
    velocities = stages.load_checkpoint(unfinished)["velocities"]
    resumed, shared = resume(unfinished, num_processes=workers)
    assert (
        len(resumed.workers) == len(shared.optimizer_state["velocities"]) == resumed.settings.num_processes == workers
    )
    assert resumed.totals()[1] == 55_000
    assert shared.optimizer_state["velocities"].equal(
        torch.cat([velocities, torch.zeros_like(velocities[:1])])[:workers]
    )
    assert ("velocities" in capsys.readouterr().out) == (workers != 2)


def test_the_losses_accuracy_and_seconds_of_an_epoch_are_its_own():
    new = record.Record.new(settings.Settings(epochs=2), 960, {})
    for worker, loss, seconds, validation in ((0, 2.0, 5.0, [10.0, 90, 100]), (1, 1.0, 8.0, [5.0, 95, 100])):
        new.workers[worker].add(960, 10, 960 * loss, 0.0)
        new.update(10, seconds)
        new.add_epoch(validation)
    found = [(e.train_loss, e.validation_loss, e.validation_accuracy, e.seconds) for e in new.history]
    assert found == [(2.0, 0.1, 90.0, 5.0), (1.0, 0.05, 95.0, 3.0)]
