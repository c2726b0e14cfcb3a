"""Stages in containers with little memory, few processes, or little of the CPU."""

import faults
import pytest
import scenarios
from pipeline import SMALL, Pipeline
from stages import contents


def test_all_stages_work_in_half_of_the_memory(nearly_done):
    scenarios.run_within(nearly_done, faults.half_the_memory())


def test_a_quota_of_one_cpu_is_seen_and_warned_of(tmp_path):
    with Pipeline(tmp_path / "volume", environment=faults.ONE_CPU) as project:
        ended = project.run("train", "--dry-run")
    assert ended.status == 0
    assert "2 workers share 1 core" in ended.stdout


@pytest.mark.parametrize(
    ("stage", "flags", "memory"),
    [
        ("train", ("--fresh",), "200m"),
        ("train", ("--fresh", "--num-processes", "64"), "1g"),
        ("train", ("--fresh", "--num-processes", "8", "--batch-size", "10000"), "1g"),
        ("train", ("--epochs", "9999"), "200m"),
        ("evaluate", (), "100m"),
        ("infer", (), "100m"),
    ],
    ids=["train", "many workers", "large batches", "more epochs", "evaluate", "infer"],
)
def test_a_stage_without_enough_memory_is_refused_before_it_starts(volume, stage, flags, memory):
    before = contents(volume)
    with Pipeline(volume, environment={"MNIST_MEMORY": memory}) as project:
        assert scenarios.fails(project.run(stage, *flags), "MNIST_MEMORY", status=2)
    assert contents(volume) == before


@pytest.mark.parametrize(("stage", "processes"), [("train", 3), ("train", 4), ("evaluate", 3), ("infer", 3)])
def test_a_stage_that_gets_no_thread_or_process_names_the_limit_and_publishes_nothing(volume, stage, processes):
    before = faults.published(volume)
    flags = (*SMALL[stage], "--fresh") if stage == "train" else SMALL[stage]
    with Pipeline(volume, environment={"MNIST_PIDS": str(processes)}) as project:
        assert scenarios.fails(project.run(stage, *flags), "MNIST_PIDS")
    assert faults.published(volume) == before
