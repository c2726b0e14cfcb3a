"""record.py: what train_results.json says, of this version and of others, and what is refused in it."""

import json
import re

import artifacts
import checkpoint
import plan
import pytest
import record
import settings
import stages
import torch
from process import Failure

NEW_IN_2 = ("schedule", "weight_decay", "max_grad_norm", "augmentation", "dropout")  # settings
RENAMED_IN_2 = {"validation_loss": "held_out_loss", "validation_accuracy": "held_out_accuracy"}
IMAGES = torch.zeros(1, 28, 28, dtype=torch.uint8).expand(settings.TRAINING_IMAGES, 28, 28)
LABELS = torch.zeros(settings.TRAINING_IMAGES, dtype=torch.int64)
OTHER_DATA = dict.fromkeys(stages.RAW_FILES, "0" * 64)


def resume(folder, **requested):
    """The record and the shared state of the training that goes on from a volume."""
    decided = plan.decide(requested, False, folder)
    assert decided.action == "resume"
    return checkpoint.start_or_resume(decided, IMAGES, LABELS, folder)


# What it says ---------------------------------------------------------------------------------------------------------


def test_the_record_of_a_finished_training_names_the_model_and_the_data(trained, data):
    results = stages.results(trained)
    assert results["finished"] is True
    assert results["model_sha256"] == stages.sha256(trained / "mnist_cnn.pt")
    assert results["data_sha256"] == {name: stages.sha256(data / stages.RAW / name) for name in stages.RAW_FILES}


def test_an_unfinished_training_names_its_data(tmp_path):
    record.Record.new(settings.Settings()).publish(tmp_path)
    assert stages.results(tmp_path)["data_sha256"] == artifacts.DATA_SET.sha256


def test_the_record_says_how_fast_the_training_was_and_how_long_each_worker_waited(trained):
    results = stages.results(trained)
    assert results["images_per_second"] == pytest.approx(55_000 / results["seconds"])
    assert all(0 < worker["waited_seconds"] < results["seconds"] for worker in results["workers"])


def test_the_history_has_a_line_for_every_epoch(trained):
    (line,) = stages.results(trained)["history"]
    assert line["epoch"] == 1
    assert line["validation_accuracy"] > 95
    assert 0 < line["validation_loss"] < 0.2


def test_the_record_is_json_that_any_reader_understands(trained):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((trained / "train_results.json").read_text(), parse_constant=refuse)


def test_a_record_is_read_as_it_was_written(trained):
    text = (trained / "train_results.json").read_text()
    assert record.parse_record(text).to_json() == text


# Damaged --------------------------------------------------------------------------------------------------------------

WRONG = [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b"1" * 100_000, b'{"settings": 5}']


@pytest.mark.parametrize("content", WRONG, ids=range(len(WRONG)))
def test_garbage_in_place_of_the_record_is_refused(volume, content):
    (volume / "train_results.json").write_bytes(content)
    before = stages.contents(volume)
    stages.assert_fails(stages.call("train", model=volume), 1, "train_results.json", "--fresh")
    assert stages.contents(volume) == before


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"lr": float("nan")}},
        {"settings": {"num_processes": 3}},
        {"batches": -1},
        {"batches": 2**80},
        {"seconds": float("inf")},
        {"finished": "yes"},
        {"history": ""},
        {"history": [None]},
        {"workers": []},
        {"workers": [1, 2]},
        {"lost_workers": 5},
        {"run": 5},
        {"host": "two\nlines"},
        {"model_sha256": ""},
    ],
    ids=str,
)
def test_a_record_with_a_value_that_is_not_possible_is_refused(volume, change):
    stages.edit_json(volume / "train_results.json", **change)
    with pytest.raises(Failure, match=r"train_results\.json .*--fresh") as refusal:
        record.read_record(volume)
    assert refusal.value.status == 1


def test_settings_that_are_a_list_are_refused(volume):
    path = volume / "train_results.json"
    path.write_text(json.dumps(stages.read_json(path) | {"settings": []}))
    with pytest.raises(Failure, match=r"train_results\.json .*--fresh"):
        record.read_record(volume)


# Of other versions ----------------------------------------------------------------------------------------------------


def as_version_1(content):
    """Makes a record what version 1 would have written."""
    del content["version"], content["data_sha256"]
    for name in NEW_IN_2:
        del content["settings"][name]
    content["history"] = [{RENAMED_IN_2.get(key, key): line[key] for key in line} for line in content["history"]]


def test_a_finished_training_of_version_1_needs_nothing(volume):
    before = stages.results(volume)["history"]
    stages.edit_training(volume, as_version_1)
    assert "validation_loss" not in (volume / "train_results.json").read_text()
    assert plan.decide({"weight_decay": 7e-4, "schedule": "linear"}, False, volume).action == "nothing"
    assert [vars(line) for line in record.read_record(volume).history] == before


def test_an_unfinished_training_of_version_1_resumes(unfinished):
    stages.edit_training(unfinished, as_version_1)
    weights = torch.load(unfinished / "checkpoint.pt", weights_only=True)["model"]
    resumed, shared = resume(unfinished)
    assert resumed.settings == settings.Settings(epochs=3)
    assert (resumed.version, len(resumed.history), resumed.batches) == ("2.0", 1, 573)
    assert all(tensor.equal(weights[name]) for name, tensor in shared.state_dict().items())


@pytest.mark.parametrize("name", {*settings.SETTINGS} - {"epochs"})
def test_a_training_without_a_setting_goes_on_with_its_default(unfinished, name):
    stages.edit_training(unfinished, lambda content: content["settings"].pop(name))
    resumed, _ = resume(unfinished)
    assert resumed.settings == settings.Settings(epochs=3)


@pytest.mark.parametrize(("version", "named"), [("7.8.9", "7.8.9"), (None, "an unknown version")])
def test_a_training_with_an_unknown_setting_is_refused(volume, version, named):
    stages.edit_json(volume / "train_results.json", version=version or named, settings={"layers": 7})
    if not version:
        content = stages.results(volume)
        del content["version"]
        (volume / "train_results.json").write_text(json.dumps(content))
    stages.assert_fails(stages.call("train", model=volume), 1, "layers", named)


@pytest.mark.parametrize("either", ["volume", "unfinished"])
def test_a_training_on_other_data_is_refused(request, either):
    folder = request.getfixturevalue(either)
    stages.edit_json(folder / "train_results.json", data_sha256=OTHER_DATA)
    before = stages.contents(folder)
    stages.assert_fails(stages.call("train", model=folder), 2, "other data", "--fresh")
    assert stages.contents(folder) == before


# The record in a checkpoint -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"run": "another"}, "different trainings"),
        ({"settings": {"lr": 0.2}}, "different settings"),
        ({"batches": 10**9}, "inconsistent"),
        ({"start": 10**6}, "inconsistent"),
        ({"history": [], "batches": 600}, "inconsistent"),
        ({"data_sha256": OTHER_DATA}, "other data"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_record_is_refused(unfinished, edit, reason):
    def change(text):
        content = json.loads(text)
        return json.dumps(content | edit | {"settings": content["settings"] | edit.get("settings", {})})

    stages.edit_checkpoint(unfinished, results=change)
    with pytest.raises(Failure, match=reason):
        resume(unfinished)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", 5),
        ("velocities", None),
        ("velocities", torch.zeros(64, 21_840)),
        ("velocities", torch.full((2, 21_840), torch.nan)),
        ("results", 5),
        ("results", "{"),
    ],
    ids=str,
)
def test_a_checkpoint_with_a_wrong_part_is_refused(unfinished, part, value):
    stages.edit_checkpoint(unfinished, **{part: lambda old: value})
    with pytest.raises(Failure, match=rf"{re.escape(str(unfinished))}/checkpoint\.pt .*--fresh"):
        resume(unfinished)


def test_a_training_that_is_resumed_has_the_velocities_of_its_workers(unfinished):
    velocities = torch.load(unfinished / "checkpoint.pt", weights_only=True)["velocities"]
    _, shared = resume(unfinished)
    assert shared.velocities.equal(velocities)
    assert shared.queue.totals()[1] == 55_000
