"""Outputs that nobody reads, that are closed or full: the work goes on, and its exit status is that of the work."""

import os

import pytest

import stages

# How a shell would be told: `"$@"` is the stage. The images have Python write at once; plain Python has a buffer.
GONE = 'exec 3> >(true); wait $!; "$@" >&3'
UNREAD = 'exec 3<> <(:); dd if=/dev/zero of=/dev/fd/3 oflag=nonblock 2>/dev/null; "$@" >&3 2>&3'
OUTPUTS = {
    "stdout closed": '"$@" >&-',
    "both closed": '"$@" >&- 2>&-',
    "a pipe whose reader is gone": GONE,
    "both to a full pipe that nobody reads": UNREAD,
    "stdout full": '"$@" >/dev/full',
    "stdout full at the end": 'PYTHONUNBUFFERED= "$@" >/dev/full',
    "both full": '"$@" >/dev/full 2>/dev/full',
}
SOME = ("stdout closed", "both full", "both to a full pipe that nobody reads")
# Short work that prints several lines; the training publishes nothing.
WORK = {"train": ("--dry-run", "--log-interval", "1"), "evaluate": (), "infer": ()}
PUBLISHED = {"train": set(), "evaluate": stages.MADE_BY["evaluate"], "infer": stages.MADE_BY["infer"] | {"results"}}


def run(script, stage, *flags, model):
    """Runs a stage by a line of bash."""
    before = ("bash", "-o", "pipefail", "-c", script, "bash")
    return stages.run(stage, *flags, model=model, before=before, PYTHONUNBUFFERED=1)


@pytest.mark.parametrize(
    ("stage", "output"),
    [("infer", output) for output in OUTPUTS] + [(stage, each) for stage in ("train", "evaluate") for each in SOME],
)
def test_an_output_that_cannot_be_written_to_does_not_stop_the_work(start, stage, output):
    folder = start(stage)
    stages.assert_succeeds(run(OUTPUTS[output], stage, *WORK[stage], model=folder))
    assert {*os.listdir(folder)} - {"mnist_cnn.pt"} - stages.LOCKS == PUBLISHED[stage]


def test_a_training_whose_reader_leaves_after_a_line_publishes_its_files(start):
    folder = start("train")
    stages.assert_succeeds(run('"$@" | head -n 1', "train", *stages.QUICK, "--log-interval", "1", model=folder))
    assert {*stages.contents(folder)} == stages.MADE_BY["train"]


@pytest.mark.parametrize("output", SOME)
def test_work_that_fails_has_its_exit_status_whatever_the_outputs_are(tmp_path, output):
    result = run(OUTPUTS[output], "infer", model=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == (output == "stdout closed"), result.stderr


@pytest.mark.parametrize("script", ['"$@" >/dev/full', GONE], ids=["full", "a pipe whose reader is gone"])
@pytest.mark.parametrize("stage", ["train", "infer"])
def test_help_that_cannot_be_written_is_no_failure(tmp_path, stage, script):
    stages.assert_succeeds(run(f"export PYTHONUNBUFFERED=; {script}", stage, "--help", model=tmp_path))


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_limit_to_the_size_of_files_is_a_failure_in_one_line_that_leaves_nothing(volume, stage):
    for name in stages.MADE_BY[stage] - {*os.listdir(volume)}:
        (volume / name).write_text("old")
    before, in_memory = stages.contents(volume), {*os.listdir("/dev/shm")}
    flags = ("--fresh", *stages.QUICK) if stage == "train" else ()
    stages.assert_fails(run('ulimit -f 8; exec "$@"', stage, *flags, model=volume), 1)
    assert {*os.listdir("/dev/shm")} <= in_memory
    after = stages.contents(volume)
    if stage == "train":  # which has begun anew
        before["train_results.json"] = after["train_results.json"]
    assert after == before
