"""The crash contract: a stage is killed or paused, lacks space or memory, or finds broken files; more in chaos.py."""

import json
import time
from functools import partial
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest
import scenarios
from scenarios import FLAGS, kill_once_there_is

import corpus
from pipeline import COMPOSE_FILE, DATA_FOLDER, MODEL, OFTEN, READ_ONLY, Container, Pipeline, docker, output_of
from stages import MADE_BY, STAGES, TREE, assert_fails, assert_succeeds, assert_whole, contents, results

BROKEN = [  # what of the corpus depends on the container: its network, what it may run, its rights
    "train-images-idx3-ubyte: a flipped bit (train)",
    "mnist_cnn.pt: a torch file that runs code (evaluate)",
    "mnist_cnn.pt: forbidden to read (evaluate)",
    "checkpoint.pt: a zip with a pickle that runs code (train)",
]
PAUSED = ("--epochs", "2", "--batch-size", "1000")  # for a training: such a batch takes longer than a look at it
HANG_SECONDS, PAUSE_SECONDS = 4, 8  # the first is half a minute in the program, which is too long to wait for


def test_a_training_killed_at_any_moment_loses_five_seconds_at_most_and_finishes(tmp_path):
    volume = tmp_path / "volume"
    with Pipeline(volume) as project:
        kill = partial(scenarios.kill_training, project, volume, *OFTEN, "--epochs")
        kill("2")
        kill("2", wait=Container.wait_until_it_trains)
        # More epochs each time: a kill that comes a little late may leave a training that has finished.
        for epochs, file in enumerate([*scenarios.PARTS["train"], "mnist_cnn.pt"], 3):
            ended = kill(str(epochs), wait=lambda train, file=file: kill_once_there_is(train, project, file))
            assert ended.returncode == 128 + SIGKILL, f"not in time for {file}"
        assert_succeeds(project.run("train"))
    assert {*contents(volume)} == MADE_BY["train"]
    assert results(volume)["finished"]
    assert results(volume)["history"][-1]["validation_accuracy"] > 95


@pytest.mark.parametrize("stage", ["evaluate", "infer"])
def test_a_stage_killed_whenever_it_publishes_leaves_whole_artifacts_to_the_next_run(volume, stage):
    scenarios.kill_while_publishing(volume, stage)


def test_on_a_full_disk_a_training_fails_and_succeeds_when_there_is_space_again(volume):
    scenarios.fill_disk(volume, 100)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_in_one_line_with_what_fixes_it_and_harms_nothing(complete, tmp_path, name):
    (case,) = [case for case in corpus.cases() if case.name == name]
    corpus.check(case, complete, tmp_path, corpus.run_in_container)


def test_on_a_read_only_volume_the_stages_fail_and_name_it_but_a_finished_model_needs_no_training(volume):
    before = contents(volume)
    with Pipeline(volume, **READ_ONLY) as project:
        for stage in STAGES:
            assert_fails(project.run(stage, *FLAGS[stage]), 1, MODEL)
        assert_succeeds(project.run("train"))
    assert contents(volume) == before


def test_missing_data_in_a_read_only_folder_is_a_failure_that_names_the_folder(tmp_path):
    data, volume = tmp_path / "data", tmp_path / "volume"
    data.mkdir()
    with Pipeline(volume, train={"volumes": [f"{data}:{DATA_FOLDER}:ro"]}) as project:
        assert_fails(project.run("train"), 1, DATA_FOLDER, "make data")
    assert not contents(volume)


def pause_by_the_engine(train):
    docker("pause", train.id)
    time.sleep(PAUSE_SECONDS)
    docker("unpause", train.id)


def stop_all_processes(train):
    for number in (SIGSTOP, SIGCONT):
        train.send(number)  # from outside: within its container, the first process cannot be stopped
        train.inside(f"kill -{number} -1")
        time.sleep(PAUSE_SECONDS if number == SIGSTOP else 0)


@pytest.mark.parametrize("pause", [pause_by_the_engine, stop_all_processes])
def test_a_training_that_stood_still_altogether_goes_on_with_all_workers(tmp_path, pause):
    workers, volume = tmp_path / "workers.py", tmp_path / "volume"
    text = (TREE / "model-train/training/workers.py").read_text()
    assert text.count("\nHANG_SECONDS = 30") == 1
    workers.write_text(text.replace("\nHANG_SECONDS = 30", f"\nHANG_SECONDS = {HANG_SECONDS}"))
    with Pipeline(volume, train={"volumes": [f"{workers}:/opt/app/training/workers.py:ro"]}) as project:
        train = project.start("train", *PAUSED, *OFTEN)
        train.wait_until_it_trains()
        pause(train)
        assert_succeeds(train.end())
    assert results(volume)["finished"]
    assert results(volume)["lost_workers"] == []


def test_all_stages_work_in_half_of_the_memory(volume):
    config = json.loads(output_of("compose", "--file", COMPOSE_FILE, "config", "--format", "json"))
    half = str(int(config["services"]["train"]["mem_limit"]) // 2)
    with Pipeline(volume, environment={"MNIST_MEMORY": half}) as project:
        for stage in STAGES:
            assert_succeeds(project.run(stage, *FLAGS[stage]))
    assert results(volume)["lost_workers"] == []
    assert_whole(volume)


def test_a_quota_of_one_cpu_is_seen_and_warned_of(tmp_path):
    with Pipeline(tmp_path / "volume", environment={"MNIST_CPU_QUOTA": "100000"}) as project:
        ended = project.run("train", "--dry-run")
    assert ended.returncode == 0
    assert "2 workers share 1 core" in ended.stdout


def test_a_stage_without_enough_memory_is_refused_before_it_starts(volume):
    before = contents(volume)
    with Pipeline(volume, environment={"MNIST_MEMORY": "100m"}) as project:
        for stage in STAGES:
            assert_fails(project.run(stage, *FLAGS[stage]), 2, "MNIST_MEMORY")
    assert contents(volume) == before


def test_a_stage_that_gets_no_thread_or_process_names_the_limit_and_publishes_nothing(volume):
    before = contents(volume)
    with Pipeline(volume) as project:
        for stage, processes in (("train", 3), ("train", 4), ("evaluate", 3), ("infer", 3)):
            project.environment["MNIST_PIDS"] = str(processes)
            assert_fails(project.run(stage, *FLAGS[stage]), 1, "MNIST_PIDS")
    assert contents(volume) == before
