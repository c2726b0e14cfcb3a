"""The crash contract, row by row, in containers: whatever happens to a stage, the volume's files are whole, the next
run finishes the job, and one line says what happened. `make chaos` tries each row many times.
"""

import json
import shutil
import time

import faults
import pytest
from faults import OFTEN, Pipeline

MOST_SECONDS_LOST = 5


@pytest.fixture(scope="module", autouse=True)
def complete(pipeline):
    """A volume after all three stages. Tests only look at it."""
    faults.IMAGES = pipeline.project.name
    return pipeline.volume


@pytest.fixture(scope="module")
def begun(complete, tmp_path_factory):
    """A volume with a training that was killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("begun")
    with Pipeline(folder) as pipeline:
        train = pipeline.start("train", "--epochs", "100", "--lr", "0.02")  # mild enough to end at any epoch
        train.wait_until_or_end((folder / "checkpoint.pt").exists, "a checkpoint")
        faults.kill(train)
        train.end()
    return folder


@pytest.fixture
def unfinished(begun, tmp_path):
    """A volume with a training of which 100 epochs are wanted, and few are done."""
    return shutil.copytree(begun, tmp_path / "volume")


@pytest.fixture
def nearly_done(unfinished):
    """The same, but the epoch that is under way is the last that is wanted."""
    faults.change_settings(unfinished, epochs=len(faults.progress_of(unfinished)["history"]) + 1)
    return unfinished


def training(pipeline, *flags):
    """A container that is in the middle of its training."""
    train = pipeline.start("train", *flags, *OFTEN)
    train.wait_until_it_trains()
    faults.wait_for_workers(train)
    return train


def batches(folder):
    """The batches that the checkpoint has done."""
    return faults.progress_of(folder)["batches"]


# SIGKILL -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(complete, tmp_path_factory):
    """A training that is killed seven times, each time at another moment, and then left to finish.

    The volume; and by the moment: how the container ended, what was wrong in the volume, the seconds lost, the batches.
    """
    folder, deaths = tmp_path_factory.mktemp("killed"), {}

    def run_until(moment, *files):
        train = pipeline.start("train", "--epochs", "2", *OFTEN)
        if files:
            assert faults.kill_once_there_is(train, pipeline, *files), f"not in time for {moment}"
        else:
            if moment != "starting":
                train.wait_until_it_trains()
            faults.kill(train)
        ended = train.end()
        progress = faults.progress_of(folder)
        lost = faults.seconds_lost(ended, folder)
        deaths[moment] = (ended, faults.faults_in(folder), lost, progress["batches"] if progress else 0)

    with Pipeline(folder) as pipeline:
        run_until("starting")
        run_until("before its first checkpoint")
        run_until("while writing a checkpoint", ".checkpoint.pt.part")
        run_until("between checkpoint and results", ".train_results.json.part")
        run_until("while publishing the curves", ".training.png.part")
        run_until("while publishing the model", ".mnist_cnn.pt.part")
        run_until("between model and results", "mnist_cnn.pt")
        return folder, deaths, pipeline.run("train")


def test_a_killed_training_leaves_every_artefact_whole(killed):
    _, deaths, _ = killed
    assert {moment: wrong for moment, (_, wrong, _, _) in deaths.items() if wrong} == {}


def test_a_killed_training_loses_five_seconds_at_most(killed):
    _, deaths, _ = killed
    assert {moment: lost for moment, (_, _, lost, _) in deaths.items() if lost > MOST_SECONDS_LOST} == {}


def test_the_next_run_goes_on_from_the_last_checkpoint(killed):
    _, deaths, _ = killed
    done = [batches for _, _, _, batches in deaths.values()]
    assert done == sorted(done)
    assert [ended.status for ended, _, _, _ in deaths.values()] == [137] * len(deaths)


def test_a_training_that_was_killed_often_finishes_and_leaves_nothing_behind(killed):
    folder, _, last = killed
    assert last.status == 0
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.pt",
        "mnist_cnn.pt",
        "train_results.json",
        "training.png",
    }
    assert faults.results_of(folder)["finished"]
    assert faults.results_of(folder)["history"][-1]["held_out_accuracy"] > 95


@pytest.mark.parametrize(
    ("stage", "file"),
    [("evaluate", "eval_results.json"), ("infer", "predictions.json"), ("infer", "results")],
)
def test_a_stage_killed_while_it_publishes_leaves_the_old_artefacts_whole(complete, tmp_path, stage, file):
    folder = shutil.copytree(complete, tmp_path / "volume")
    with Pipeline(folder) as pipeline:
        assert faults.kill_once_there_is(
            pipeline.start(stage), pipeline, ".results.new" if file == "results" else f".{file}.part"
        )
        assert faults.faults_in(folder) == []
        assert (folder / file).exists()
        assert pipeline.run(stage).status == 0
    assert {path.name for path in folder.iterdir()} == {path.name for path in complete.iterdir()}
    assert len(list((folder / "results").iterdir())) == 5


# Asked to stop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ask", "status"), [(faults.ask_to_stop, 143), (faults.press_ctrl_c, 130)])
def test_a_training_that_is_asked_to_stop_keeps_a_checkpoint_and_ends_soon(unfinished, ask, status):
    before = batches(unfinished)
    with Pipeline(unfinished) as pipeline:
        train = training(pipeline)
        asked = time.time()
        ask(train)
        ended = train.end()
    assert ended.status == status
    assert ended.is_one_line
    assert ended.ended - asked < 3
    assert batches(unfinished) > before
    assert faults.faults_in(unfinished) == []


@pytest.mark.parametrize("stage", ["train", "evaluate", "infer"])
def test_a_stage_that_is_asked_to_stop_as_it_starts_ends_soon_without_a_traceback(complete, tmp_path, stage):
    folder = shutil.copytree(complete, tmp_path / "volume")
    before = faults.artefacts(folder)
    with Pipeline(folder) as pipeline:
        container = pipeline.start(stage, *(("--epochs", "9999") if stage == "train" else ()))
        container.wait_until_it_listens()
        asked = time.time()
        faults.ask_to_stop(container)
        ended = container.end()
    assert ended.status == 143
    assert "Traceback" not in ended.stderr
    assert ended.ended - asked < 3
    assert faults.artefacts(folder) == before


def test_compose_stop_keeps_evaluate_from_starting(unfinished):
    with Pipeline(unfinished) as pipeline, pipeline.up() as up:
        train = pipeline.container("train")
        train.wait_until_or_end(lambda: "goes on" in train.logs()[0], "the training")
        pipeline.compose("stop")
        up.wait(60)
        assert train.state()["ExitCode"] == 143
        for stage in ("evaluate", "infer"):
            assert not pipeline.has_started(stage)
    assert faults.faults_in(unfinished) == []


# Workers -------------------------------------------------------------------------------------------------------------


def test_the_others_take_over_the_work_of_a_killed_worker(nearly_done):
    with Pipeline(nearly_done) as pipeline:
        train = training(pipeline)
        faults.kill_one_worker(train)
        ended = train.end()
    assert (ended.status, ended.stderr) == (0, "")
    results = faults.results_of(nearly_done)
    assert [(lost["rank"], lost["signal"]) for lost in results["lost_workers"]] == [(0, 9)]
    assert sum(worker["images"] for worker in results["workers"]) == 55_000 * results["settings"]["epochs"]
    assert faults.faults_in(nearly_done) == []


def test_a_training_whose_workers_are_all_killed_fails_and_keeps_its_checkpoint(unfinished):
    with Pipeline(unfinished) as pipeline:
        train = training(pipeline)
        faults.kill_all_workers(train)
        ended = train.end(seconds=30)
    assert ended.status == 1
    assert ended.is_one_line
    assert faults.faults_in(unfinished) == []
    assert not (unfinished / "mnist_cnn.pt").exists()
    assert batches(unfinished) > 0


# Numbers that go bad -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_last_good_checkpoint(unfinished):
    faults.throw_off_course(unfinished)
    before = faults.artefacts(unfinished)
    with Pipeline(unfinished) as pipeline:
        ended = pipeline.run("train")
    assert ended.status == 1
    assert ended.is_one_line
    assert "--lr" in ended.stderr
    assert faults.artefacts(unfinished) == before


def test_a_training_that_learned_nothing_publishes_nothing(nearly_done):
    faults.kill_the_neurons(nearly_done)
    with Pipeline(nearly_done) as pipeline:
        ended = pipeline.run("train")
    assert ended.status == 1
    assert ended.is_one_line
    assert "--lr" in ended.stderr
    assert faults.results_of(nearly_done)["history"][-1]["held_out_accuracy"] < 20
    assert faults.faults_in(nearly_done) == []
    assert not (nearly_done / "mnist_cnn.pt").exists()


# Disks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "flags", "left"), [("train", ("--epochs", "9999"), 100), ("evaluate", (), 8), ("infer", (), 8)]
)
def test_on_a_full_disk_a_stage_fails_in_one_line_and_leaves_what_was_there(complete, tmp_path, stage, flags, left):
    before = faults.artefacts(complete)
    with Pipeline(tmp_path / "volume", disk=faults.small_disk("4m")) as pipeline:
        pipeline.put(complete)
        faults.fill_disk(pipeline, leave=left)
        ended = pipeline.run(stage, *flags)
        faults.free_disk(pipeline)
        after = faults.artefacts(pipeline.look())
    assert ended.status == 1
    assert ended.is_one_line
    assert after == before


def test_a_disk_too_small_for_anything_gets_nothing_written(tmp_path):
    with Pipeline(tmp_path / "volume", disk=faults.small_disk("4k")) as pipeline:
        faults.fill_disk(pipeline)
        ended = pipeline.run("train")
        faults.free_disk(pipeline)
        assert faults.artefacts(pipeline.look()) == {}
    assert ended.status == 1
    assert ended.is_one_line


@pytest.mark.parametrize(("stage", "flags"), [("train", ("--epochs", "9999")), ("evaluate", ()), ("infer", ())])
def test_on_a_read_only_volume_a_stage_fails_in_one_line(complete, stage, flags):
    before = faults.artefacts(complete)
    with Pipeline(complete, **faults.read_only()) as pipeline:
        ended = pipeline.run(stage, *flags)
    assert ended.status == 1
    assert ended.is_one_line
    assert faults.artefacts(complete) == before


def test_a_finished_model_on_a_read_only_volume_needs_no_training(complete):
    with Pipeline(complete, **faults.read_only()) as pipeline:
        assert pipeline.run("train").status == 0


# Several at once -----------------------------------------------------------------------------------------------------


def test_a_second_training_on_a_volume_is_refused_and_told_who_holds_it(unfinished):
    with Pipeline(unfinished) as pipeline:
        first = training(pipeline, "--fresh", "--epochs", "100")
        second = pipeline.run("train", "--epochs", "100")
        assert first.state()["Running"]
        faults.kill(first)
        first.end()
        third = training(pipeline)  # the lock is gone with its holder
        faults.kill(third)
    assert second.status == 2
    assert second.is_one_line
    assert first.id[:12] in second.stderr


def test_evaluate_and_infer_during_a_training_judge_the_last_finished_model(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "volume")
    model = faults.sha256(folder / "mnist_cnn.pt")
    with Pipeline(folder) as pipeline:
        train = training(pipeline, "--fresh", "--epochs", "100", "--seed", "5")
        assert pipeline.run("evaluate").status == 0
        assert pipeline.run("infer").status == 0
        assert train.state()["Running"]
    for file in ("eval_results.json", "predictions.json"):
        assert json.loads((folder / file).read_text())["model_sha256"] == model
    assert faults.sha256(folder / "mnist_cnn.pt") == model


@pytest.mark.parametrize("stage", ["evaluate", "infer"])
def test_before_the_first_model_is_finished_there_is_nothing_to_judge(begun, stage):
    before = faults.artefacts(begun)
    with Pipeline(begun) as pipeline:
        ended = pipeline.run(stage)
    assert ended.status == 1
    assert ended.is_one_line
    assert faults.artefacts(begun) == before


# Limits --------------------------------------------------------------------------------------------------------------


def test_a_quota_of_one_cpu_is_seen_and_said(tmp_path):
    with Pipeline(tmp_path / "volume", **faults.one_cpu()) as pipeline:
        ended = pipeline.run("train", "--dry-run")
    assert ended.status == 0
    assert "2 workers on 1 core" in ended.stdout


def test_all_stages_work_in_half_of_the_memory(nearly_done):
    with Pipeline(nearly_done, **faults.half_the_memory()) as pipeline:
        for stage in faults.STAGES:
            ended = pipeline.run(stage, *(["--min-accuracy", "80"] if stage == "evaluate" else []))
            assert (ended.status, ended.stderr) == (0, "")
    assert faults.results_of(nearly_done)["lost_workers"] == []


def test_a_training_without_enough_memory_does_not_end_without_a_word(unfinished):
    with Pipeline(unfinished, **faults.memory_limit("150m")) as pipeline:
        ended = pipeline.run("train")
    assert ended.status == 137 or (ended.status == 1 and ended.is_one_line)
    assert faults.faults_in(unfinished) == []
