"""Outputs that nobody reads, that are closed or full: the work goes on, and its exit status is that of the work."""

import os
import resource
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stages

# How a shell would be told: `"$@"` is the stage. The images have Python write at once; plain Python has a buffer.
UNREAD = 'exec 3> >(true); wait $!; "$@" >&3'
OUTPUTS = {
    "stdout closed": '"$@" >&-',
    "both closed": '"$@" >&- 2>&-',
    "a pipe that nobody reads": UNREAD,
    "stdout full": '"$@" >/dev/full',
    "stdout full at the end": 'PYTHONUNBUFFERED= "$@" >/dev/full',
    "both full": '"$@" >/dev/full 2>/dev/full',
}
# Short work that prints several lines; the training publishes nothing.
WORK = {"train": ("--dry-run", "--log-interval", "1"), "evaluate": (), "infer": ()}
PUBLISHED = {"train": set(), "evaluate": stages.MADE_BY["evaluate"], "infer": stages.MADE_BY["infer"] | {"results"}}


def run(script, stage, *flags, model):
    """Runs a stage by a line of bash, where it is "$@"."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, "bash", *stages.command(stage, *flags, model=model)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        timeout=stages.SECONDS,
        check=False,
    )


def run_all(script, flags, models):
    """Runs each stage by a line of bash, two at a time; returns stage, exit status, and standard error."""
    with ThreadPoolExecutor(2) as pool:
        runs = {stage: pool.submit(run, script, stage, *flags[stage], model=models[stage]) for stage in stages.STAGES}
    return [(stage, run.result().returncode, run.result().stderr) for stage, run in runs.items()]


@pytest.fixture
def volumes(trained, tmp_path):
    """A volume for each stage: empty for train, else with a model."""
    folders = {stage: tmp_path / stage for stage in stages.STAGES}
    for stage, folder in folders.items():
        folder.mkdir()
        if stage != "train":
            (folder / "mnist_cnn.pt").write_bytes((trained / "mnist_cnn.pt").read_bytes())
    return folders


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_cannot_be_written_to_does_not_stop_the_work(volumes, output):
    assert run_all(OUTPUTS[output], WORK, volumes) == [(stage, 0, "") for stage in stages.STAGES]
    for stage, folder in volumes.items():
        assert {*os.listdir(folder)} - {"mnist_cnn.pt"} == PUBLISHED[stage]


def test_a_training_whose_reader_leaves_after_a_line_publishes_its_files(volumes):
    result = run('"$@" | head -n 1', "train", "--epochs", "1", "--log-interval", "1", model=volumes["train"])
    assert (result.returncode, result.stderr) == (0, "")
    assert {*os.listdir(volumes["train"])} == stages.MADE_BY["train"]


@pytest.mark.parametrize("output", ["stdout closed", "both full"])
def test_work_that_fails_has_its_exit_status_whatever_the_outputs_are(tmp_path, output):
    result = run(OUTPUTS[output], "infer", model=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == (output == "stdout closed"), result.stderr


@pytest.mark.parametrize("script", ['"$@" >/dev/full', UNREAD], ids=["full", "a pipe that nobody reads"])
def test_help_that_cannot_be_written_is_no_failure(volumes, script):
    flags = dict.fromkeys(stages.STAGES, ("--help",))
    assert run_all(f"export PYTHONUNBUFFERED=; {script}", flags, volumes) == [(stage, 0, "") for stage in stages.STAGES]


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_limit_to_the_size_of_files_is_a_failure_in_one_line_that_leaves_nothing(volume, stage):
    for name in stages.MADE_BY[stage] - {*os.listdir(volume)}:
        (volume / name).write_text("old")
    before = stages.contents(volume)
    flags = ("--fresh", "--epochs", "1") if stage == "train" else ()
    command = stages.command(stage, *flags, model=volume)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    ) as process:
        stdout, stderr = process.communicate(timeout=stages.SECONDS)
    left = [path for path in Path("/dev/shm").iterdir() if str(process.pid) in path.name]
    for path in left:
        path.unlink()
    assert left == []
    stages.assert_fails(subprocess.CompletedProcess(command, process.returncode, stdout, stderr), 1)
    after = stages.contents(volume)
    if stage == "train":  # which has begun anew
        before["train_results.json"] = after["train_results.json"]
    assert after == before
