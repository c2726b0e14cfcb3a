"""The crash contract, once for each row: a stage that is killed, stopped, or robbed of its workers or its numbers."""

from signal import SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM

import faults
import pytest
import scenarios
from pipeline import OFTEN, Pipeline
from stages import MADE_BY, contents, read_json, sha256

# The moments at which a training is killed, in their order, with the file that is there then.
MOMENTS = {
    "starting": None,
    "before its first checkpoint": None,
    "while writing a checkpoint": ".checkpoint.pt.part",
    "between checkpoint and results": ".train_results.json.part",
    "while publishing the curves": ".training.png.part",
    "while publishing the model": ".mnist_cnn.pt.part",
    "between model and results": "mnist_cnn.pt",
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A training that is killed at each of the moments, and then finishes: its volume, its deaths, its last end."""
    volume, deaths = tmp_path_factory.mktemp("killed"), {}
    with Pipeline(volume) as project:
        for moment, file in MOMENTS.items():
            train = project.start("train", "--epochs", "2", *OFTEN)
            if file:
                assert faults.kill_once_there_is(train, project, file), f"not in time for {moment}"
            elif moment != "starting":
                train.wait_until_it_trains()
            train.send(SIGKILL)
            deaths[moment] = faults.death_of(train, volume)
        return volume, deaths, project.run("train")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_training_loses_five_seconds_at_most_and_leaves_every_artifact_whole(killed, moment):
    _, deaths, _ = killed
    earlier = [*deaths][: [*deaths].index(moment)]
    scenarios.check_death(deaths[moment], max((deaths[name].batches for name in earlier), default=0))


def test_a_training_that_was_killed_often_finishes_and_leaves_nothing_behind(killed):
    volume, _, last = killed
    assert scenarios.succeeds(last)
    assert {*contents(volume)} == MADE_BY["train"]
    results = faults.results_of(volume)
    assert results["finished"]
    assert results["history"][-1]["validation_accuracy"] > 95


@pytest.mark.parametrize(
    ("stage", "file"),
    [("evaluate", ".eval_results.json.part"), ("infer", ".predictions.json.part"), ("infer", ".results.new")],
)
def test_a_stage_killed_while_it_publishes_leaves_whole_artifacts_to_the_next_run(volume, stage, file):
    scenarios.kill_while_publishing(volume, stage, file)


@pytest.mark.parametrize(
    "signals", [(SIGTERM,), (SIGINT,), (SIGHUP,), (SIGQUIT,), (SIGTERM, SIGTERM)], ids=lambda signals: len(signals)
)
def test_a_training_that_is_stopped_saves_a_checkpoint_and_ends_within_3_seconds(unfinished, signals):
    scenarios.stop_training(unfinished, *signals)


def test_the_others_take_over_the_work_of_a_killed_worker(nearly_done):
    scenarios.lose_one_worker(nearly_done, faults.kill_one_worker)


def test_a_training_whose_workers_are_all_killed_fails_and_leaves_its_checkpoint(unfinished):
    scenarios.lose_all_workers(unfinished)


@pytest.mark.parametrize("fault", [faults.make_loss_infinite, faults.make_neurons_dead])
def test_a_training_that_comes_to_nothing_fails_and_publishes_nothing(nearly_done, fault):
    scenarios.train_to_nothing(nearly_done, fault)


def test_a_second_training_on_a_volume_is_refused_and_names_the_first(unfinished):
    scenarios.train_twice(unfinished)


def test_evaluate_and_infer_during_a_training_use_the_last_finished_model(volume):
    model = sha256(volume / "mnist_cnn.pt")
    with Pipeline(volume) as project:
        train = faults.start_training(project, "--fresh", "--epochs", "100", "--seed", "5")
        assert scenarios.succeeds(project.run("evaluate"))
        assert scenarios.succeeds(project.run("infer"))
        assert train.state()["Running"]
    for file in ("eval_results.json", "predictions.json"):
        assert read_json(volume / file)["model_sha256"] == model
    assert sha256(volume / "mnist_cnn.pt") == model


@pytest.mark.parametrize(("stage", "left"), [("train", 100), ("evaluate", 8), ("infer", 8)])
def test_on_a_full_disk_a_stage_fails_and_succeeds_when_there_is_space_again(
    complete, nearly_done, tmp_path, stage, left
):
    scenarios.fill_disk(nearly_done if stage == "train" else complete, tmp_path / "copy", stage, left)


def test_a_disk_too_small_for_any_file_gets_nothing_written(tmp_path):
    with Pipeline(disk="4k") as project:
        faults.fill_disk(project)
        assert scenarios.fails(project.run("train"), "No space")
        faults.free_disk(project)
        assert contents(project.copy_out(tmp_path / "copy")) == {}


@pytest.mark.parametrize(("stage", "flags"), [("train", ("--epochs", "9999")), ("evaluate", ()), ("infer", ())])
def test_on_a_read_only_volume_a_stage_fails_and_names_it(volume, stage, flags):
    scenarios.write_protect(volume, stage, *flags)


def test_a_finished_model_on_a_read_only_volume_needs_no_training(volume):
    with Pipeline(volume, **faults.read_only()) as project:
        assert project.run("train").status == 0


def test_missing_data_in_a_read_only_folder_is_a_failure_that_names_the_folder(tmp_path):
    data, volume = tmp_path / "data", tmp_path / "volume"
    data.mkdir()
    with Pipeline(volume, train={"volumes": [f"{data}:/opt/mount/data:ro"]}) as project:
        assert scenarios.fails(project.run("train"), "/opt/mount/data", "make data")
    assert not contents(volume)
