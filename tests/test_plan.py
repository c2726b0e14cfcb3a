"""plan.py: what a run of train does, by what it is asked for and what is in the volume."""

import os
import platform
import re
from datetime import UTC, datetime, timedelta

import pytest

import stages
from stage.files import TRAIN_LOCK
from stage.process import Failure
from training import first_look, plan, settings
from training.details.lock import volume_lock

OTHERS = {  # a value of each setting that the training in a volume did not have
    name: "constant" if name == "schedule" else type(item.default)(2 * item.default + 1)
    for name, item in settings.SETTINGS.items()
    if name != "epochs"
}


def decide(folder, *, fresh=False, **requested):
    """The action and the settings that are decided; no file is touched."""
    with stages.unchanged(folder):
        decided = plan.decide(requested, fresh, folder)
    return decided.action, decided.settings


def assert_refused(folder, *names, **requested):
    """The request is refused with exit status 2, in a message that has the names; no file is touched."""
    with stages.unchanged(folder), pytest.raises(Failure) as refusal:
        plan.decide(requested, False, folder)
    assert refusal.value.status == 2
    assert all(name in str(refusal.value) for name in names)


@pytest.mark.parametrize("requested", [{}, {"epochs": 3, "seed": 9}], ids=str)
def test_an_empty_volume_gets_the_training_that_is_requested(tmp_path, requested):
    assert decide(tmp_path, **requested) == ("start", settings.Settings(**requested))


@pytest.mark.parametrize("requested", [{}, {"seed": 77, "epochs": 3}, {"epochs": 2}, {"epochs": 4}], ids=str)
def test_an_unfinished_training_resumes_with_its_settings_up_to_the_epochs_requested(unfinished, requested):
    stages.edit_record(unfinished, settings={"seed": 77})
    expected = settings.Settings(seed=77, epochs=requested.get("epochs", 3))
    assert decide(unfinished, **requested) == ("resume", expected)


@pytest.mark.parametrize(("batches", "done", "epochs"), [(573, "1.0", 1), (800, "1.3", 1), (1718, "2.9", 2)])
def test_an_unfinished_training_does_not_become_one_of_fewer_epochs_than_it_has_done(unfinished, batches, done, epochs):
    stages.edit_record(unfinished, batches=batches)
    assert_refused(unfinished, f"done {done} of 3", f"--epochs {epochs}", epochs=epochs)


@pytest.mark.parametrize("requested", [[], *([name] for name in settings.SETTINGS)], ids=str)
def test_a_finished_model_needs_nothing_when_nothing_or_what_it_has_is_requested(volume, requested):
    stages.edit_record(volume, settings={"seed": 77})
    has = stages.results(volume)["settings"]
    expected = ("nothing", settings.Settings(epochs=1, seed=77))
    assert decide(volume, **{name: has[name] for name in requested}) == expected


def test_a_finished_model_of_many_epochs_is_not_undone_by_fewer(volume):
    record = stages.results(volume)
    workers = [{key: 2 * number for key, number in worker.items()} for worker in record["workers"]]
    changes = {"history": 2 * record["history"], "seconds": 2 * record["seconds"], "batches": 2 * record["batches"]}
    stages.edit_record(volume, settings={"epochs": 2}, workers=workers, **changes)
    assert decide(volume, epochs=1)[0] == "nothing"


def test_a_training_that_was_killed_before_its_first_checkpoint_starts_again(unfinished):
    workers = [{"rank": rank} for rank in range(2)]
    stages.edit_record(unfinished, batches=0, history=[], workers=workers, seconds=0.0)
    assert decide(unfinished) == ("start", settings.Settings(epochs=3))


@pytest.mark.parametrize(("state", "names"), [("volume", ("sha256", "--fresh")), ("tmp_path", ("--fresh",))])
def test_a_model_of_another_training_or_from_elsewhere_is_left_as_it_is_and_not_trained_on(request, state, names):
    folder = request.getfixturevalue(state)
    (folder / "mnist_cnn.pt").write_bytes(b"another model")
    assert decide(folder)[0] == "nothing"
    assert_refused(folder, *names, epochs=5)


@pytest.mark.parametrize(
    ("state", "name"),
    [("volume", name) for name in OTHERS] + [("unfinished", name) for name in OTHERS if name != "num_processes"],
)
def test_settings_that_differ_are_refused_and_the_difference_named(request, state, name):
    folder = request.getfixturevalue(state)
    assert_refused(folder, f"{settings.flag(name)} {OTHERS[name]}", "--fresh", **{name: OTHERS[name]})


def test_the_advice_to_start_over_has_the_flags_of_the_training_and_what_was_requested(volume, monkeypatch):
    stages.edit_record(volume, settings={"batch_size": 500}, batches=110)
    has = "--fresh --epochs 1 --batch-size 500"
    assert f"{has} (" in plan.decide({}, False, volume).message
    assert_refused(volume, f"{has} --lr 0.2 (", lr=0.2)
    assert_refused(volume, "--fresh --epochs 1 --batch-size 48 (", batch_size=48)
    monkeypatch.setattr(plan.code, "sha256_by_part", lambda: {"net.py": "another"})
    assert_refused(volume, f"{has} (", "net.py")


@pytest.mark.parametrize("record", [None, "{"], ids=["finished", "garbage"])
def test_fresh_starts_over_from_anything(volume, record):
    if record:
        (volume / "train_results.json").write_text(record)
    assert decide(volume, fresh=True, lr=0.01) == ("start", settings.Settings(lr=0.01))


def test_a_volume_is_locked_for_one_training_at_a_time_and_another_one_is_told_which(volume):
    stages.edit_record(volume, host="of an older training", began="long ago")
    before = stages.contents(volume)
    with volume_lock(volume):
        host, _, time = (volume / TRAIN_LOCK).read_text().partition(" at ")
        with pytest.raises(Failure, match=f"began on {host} at {re.escape(time)}") as refusal, volume_lock(volume):
            pass
    assert refusal.value.status == 2
    assert host == platform.node()
    assert abs(datetime.fromisoformat(time) - datetime.now(UTC)) < timedelta(minutes=5)
    with volume_lock(volume):
        pass
    assert stages.contents(volume) == before
    assert (volume / TRAIN_LOCK).read_bytes() == b""


def test_a_lock_whose_text_is_not_fit_for_a_terminal_names_no_holder(tmp_path):
    with volume_lock(tmp_path):
        (tmp_path / TRAIN_LOCK).write_bytes(b"\x1b[2J")
        with pytest.raises(Failure, match="another train container"), volume_lock(tmp_path):
            pass


def train_beside_another(volume, flags, status):
    """Runs train while another training has the lock: one line says that the model stays in use, or what is refused."""
    with volume_lock(volume), stages.unchanged(volume):
        result = stages.call("train", *flags, model=volume)
    if status:
        stages.assert_fails(result, status, volume, platform.node())
    else:
        stages.assert_succeeds(result)
        assert "stays in use until" in result.stdout
        assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "flags", "status"),
    [
        *[("whole", (), 0), ("whole", ("--log-interval", "9"), 0), ("whole", ("--epochs", "3"), 2)],
        *[("whole", ("--fresh",), 2), ("cut off", (), 2), ("a pipe", (), 2), ("missing", (), 2)],
    ],
)
def test_beside_another_training_a_finished_model_is_a_success_if_nothing_is_asked(volume, model, flags, status):
    stages.edit_record(volume, finished=False, settings={"epochs": 3})
    path = volume / "mnist_cnn.pt"
    if model == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif model != "whole":
        path.unlink()
    if model == "a pipe":
        os.mkfifo(path)
    train_beside_another(volume, flags, status)


@pytest.mark.parametrize(("flags", "status"), [((), 0), (("--epochs", "3"), 2)])
def test_a_training_that_begins_after_the_first_look_leaves_a_finished_model_in_use(volume, monkeypatch, flags, status):
    monkeypatch.setattr(first_look, "end_unless_there_is_work", lambda: None)
    train_beside_another(volume, flags, status)
