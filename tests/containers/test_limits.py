"""Stages in containers with little memory, few processes, or little of the CPU."""

import json

import pytest
from scenarios import FLAGS

from pipeline import COMPOSE_FILE, Pipeline, output_of
from stages import STAGES, assert_fails, assert_succeeds, assert_whole, contents, results


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


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_enough_memory_is_refused_before_it_starts(volume, stage):
    before = contents(volume)
    with Pipeline(volume, environment={"MNIST_MEMORY": "100m"}) as project:
        assert_fails(project.run(stage, *FLAGS[stage]), 2, "MNIST_MEMORY")
    assert contents(volume) == before


@pytest.mark.parametrize(("stage", "processes"), [("train", 3), ("train", 4), ("evaluate", 3), ("infer", 3)])
def test_a_stage_that_gets_no_thread_or_process_names_the_limit_and_publishes_nothing(volume, stage, processes):
    before = contents(volume)
    with Pipeline(volume, environment={"MNIST_PIDS": str(processes)}) as project:
        assert_fails(project.run(stage, *FLAGS[stage]), 1, "MNIST_PIDS")
    assert contents(volume) == before
