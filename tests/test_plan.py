"""The table "Running a stage again", row by row: what train decides from its flags and from what is in the volume."""

import json

import artifacts
import plan
import pytest
import stages


def edit(folder, **changes):
    """Changes what train_results.json says; `settings` are added to those that are there."""
    results = stages.read_json(folder / "train_results.json")
    changes["settings"] = results["settings"] | changes.get("settings", {})
    (folder / "train_results.json").write_text(json.dumps(results | changes))


@pytest.fixture
def unfinished(volume):
    """A volume whose training, with a seed of its own, has done 1 of 4 epochs."""
    (volume / "mnist_cnn.pt").unlink()
    edit(volume, finished=False, settings={"seed": 77, "epochs": 4})
    return volume


@pytest.fixture
def foreign(tmp_path):
    """A volume with a model that came from elsewhere."""
    (tmp_path / "mnist_cnn.pt").write_bytes(b"a model")
    return tmp_path


def another(name, volume):
    """A value of a setting that the training in a volume did not have."""
    value = stages.read_json(volume / "train_results.json")["settings"][name]
    return value / 2 if isinstance(value, float) else value + 1


def test_an_empty_volume_gets_a_training_with_the_defaults(tmp_path):
    decided = plan.decide({}, False, tmp_path)
    assert decided.action == "start"
    assert decided.settings == {name: default for name, (_, default, _, _) in plan.SETTINGS.items()}


def test_an_empty_volume_gets_the_training_that_is_asked_for(tmp_path):
    decided = plan.decide({"epochs": 3, "seed": 9}, False, tmp_path)
    assert decided.action == "start"
    assert (decided.settings["epochs"], decided.settings["seed"]) == (3, 9)


def test_an_unfinished_training_goes_on_as_it_began(unfinished):
    decided = plan.decide({}, False, unfinished)
    assert decided.action == "resume"
    assert (decided.settings["seed"], decided.settings["epochs"]) == (77, 4)


def test_an_unfinished_training_goes_on_when_the_same_is_asked_for(unfinished):
    assert plan.decide({"seed": 77, "epochs": 4}, False, unfinished).action == "resume"


def test_an_unfinished_training_can_be_given_another_end(unfinished):
    decided = plan.decide({"epochs": 2}, False, unfinished)
    assert decided.action == "resume"
    assert decided.settings["epochs"] == 2


def test_a_training_that_published_its_results_but_no_model_is_unfinished(volume):
    (volume / "mnist_cnn.pt").unlink()
    assert plan.decide({}, False, volume).action == "resume"


def test_a_finished_model_needs_nothing(volume):
    edit(volume, settings={"seed": 77})
    decided = plan.decide({}, False, volume)
    assert decided.action == "nothing"
    assert decided.settings["seed"] == 77


@pytest.mark.parametrize("name", plan.SETTINGS)
def test_a_finished_model_needs_nothing_when_asked_for_what_it_has(volume, name):
    value = stages.read_json(volume / "train_results.json")["settings"][name]
    assert plan.decide({name: value}, False, volume).action == "nothing"


def test_a_finished_model_of_many_epochs_is_not_undone_by_fewer(volume):
    history = stages.read_json(volume / "train_results.json")["history"]
    edit(volume, settings={"epochs": 2}, history=2 * history)
    assert plan.decide({"epochs": 1}, False, volume).action == "nothing"


def test_a_finished_model_trains_on_to_more_epochs(volume):
    edit(volume, settings={"seed": 77})
    decided = plan.decide({"epochs": 5}, False, volume)
    assert decided.action == "resume"
    assert (decided.settings["seed"], decided.settings["epochs"]) == (77, 5)


@pytest.mark.parametrize("name", plan.RECIPE)
@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_another_recipe_is_refused_and_the_difference_named(volume, state, name):
    edit(volume, finished=state == "finished")
    before = stages.contents(volume)
    with pytest.raises(artifacts.Failure, match=f"{plan.flag(name)} .*--fresh") as refusal:
        plan.decide({name: another(name, volume)}, False, volume)
    assert refusal.value.status == 2
    assert stages.contents(volume) == before


def test_every_setting_but_the_epochs_is_part_of_the_recipe():
    assert {*plan.RECIPE, "epochs"} == {*plan.SETTINGS}


@pytest.mark.parametrize("state", ["empty", "unfinished", "finished", "foreign", "garbage"])
def test_fresh_starts_over_from_anything(volume, state):
    if state == "unfinished":
        edit(volume, finished=False)
    elif state == "garbage":
        (volume / "train_results.json").write_text("{")
    elif state == "foreign":
        (volume / "train_results.json").unlink()
    elif state == "empty":
        for path in volume.iterdir():
            path.unlink()
    before = stages.contents(volume)
    decided = plan.decide({"lr": 0.01}, True, volume)
    assert decided.action == "start"
    assert decided.settings["lr"] == 0.01
    assert stages.contents(volume) == before


def test_a_model_from_elsewhere_is_left_as_it_is(foreign):
    assert plan.decide({}, False, foreign).action == "nothing"


def test_a_recipe_for_a_model_from_elsewhere_is_refused(foreign):
    with pytest.raises(artifacts.Failure) as refusal:
        plan.decide({"epochs": 5}, False, foreign)
    assert refusal.value.status == 2


def test_a_model_that_replaced_the_trained_one_is_left_as_it_is(volume):
    (volume / "mnist_cnn.pt").write_bytes(b"another model")
    assert plan.decide({}, False, volume).action == "nothing"


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"settings": 5}', b'{"settings": {"lr": NaN}}'],
)
def test_garbage_in_place_of_the_results_is_a_failure_that_names_the_way_out(volume, garbage):
    (volume / "train_results.json").write_bytes(garbage)
    with pytest.raises(artifacts.Failure, match=r"train_results\.json .*--fresh") as refusal:
        plan.decide({}, False, volume)
    assert refusal.value.status == 1


@pytest.mark.parametrize("name", plan.SETTINGS)
@pytest.mark.parametrize("value", [None, "2", -1, float("nan"), True, []])
def test_results_with_a_setting_that_makes_no_sense_are_garbage(volume, name, value):
    edit(volume, settings={name: value})
    with pytest.raises(artifacts.Failure) as refusal:
        plan.decide({}, False, volume)
    assert refusal.value.status == 1


def test_a_checkpoint_without_its_results_is_a_failure(volume):
    (volume / "train_results.json").unlink()
    (volume / "mnist_cnn.pt").unlink()
    with pytest.raises(artifacts.Failure) as refusal:
        plan.decide({}, False, volume)
    assert refusal.value.status == 1
