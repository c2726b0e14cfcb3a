"""artifacts.py: files that are published whole, locks, limits, and failures in one line."""

import contextlib
import errno
import multiprocessing
import os
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import artifacts
import checkpoint
import process
import pytest
import stages
from process import Failure

# Publishing -----------------------------------------------------------------------------------------------------------


def test_a_published_file_is_readable_by_all_and_nothing_is_left_beside_it(tmp_path):
    before = os.umask(0o077)
    try:
        artifacts.publish(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_of_the_old_file_is_not_disturbed_by_a_new_one(tmp_path):
    artifacts.publish(tmp_path / "file", b"old and long")
    with open(tmp_path / "file", "rb") as reader:
        artifacts.publish(tmp_path / "file", b"new")
        assert reader.read() == b"old and long"
    assert (tmp_path / "file").read_bytes() == b"new"


def fail(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("system_call", ["fsync", "fchmod"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, system_call):
    artifacts.publish(tmp_path / "file", b"old")
    monkeypatch.setattr(os, system_call, fail)
    with pytest.raises(Failure, match="disk space"):
        artifacts.publish(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def save_checkpoint(folder):
    """Saves a checkpoint as a training does."""
    parameters = SimpleNamespace(isfinite=lambda: SimpleNamespace(all=lambda: True))
    shared = SimpleNamespace(parameters=parameters, state_dict=dict, velocities=None)
    record = SimpleNamespace(to_json=str, publish=lambda folder: None)
    checkpoint.Checkpoints(folder, shared, record).save()


@pytest.mark.parametrize(
    "write",
    [
        save_checkpoint,
        lambda folder: stages.call("evaluate", model=folder),
        lambda folder: stages.call("infer", model=folder),
    ],
    ids=["a checkpoint", "evaluate", "infer"],
)
def test_no_file_is_replaced_before_its_successor_is_flushed_to_disk(finished, trained, tmp_path, monkeypatch, write):
    for folder in (trained, finished):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            copy = tmp_path / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    before = stages.contents(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    with contextlib.suppress(Failure):
        assert write(tmp_path).returncode == 1
    assert stages.contents(tmp_path) == before


def test_what_a_crash_left_half_written_does_not_reach_the_next_file(tmp_path):
    (tmp_path / ".file.part").write_bytes(b"half of a much longer file")
    artifacts.publish(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_of_several_writers_of_the_same_file_one_is_the_last_and_its_file_is_whole(tmp_path):
    versions = [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=artifacts.publish, args=(tmp_path / "file", content)) for content in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in versions
    assert os.listdir(tmp_path) == ["file"]


def test_publishing_into_a_folder_that_is_not_there_is_a_failure_that_names_the_file(tmp_path):
    with pytest.raises(Failure, match="missing/file"):
        artifacts.publish(tmp_path / "missing" / "file", b"new")


# Locks and limits -----------------------------------------------------------------------------------------------------


def lock_for_ever(folder, locked):
    with artifacts.locked_folder(folder, wait=False):
        locked.set()
        threading.Event().wait()


def test_a_lock_ends_with_the_process_that_has_it(tmp_path):
    context = multiprocessing.get_context("fork")
    locked = context.Event()
    other = context.Process(target=lock_for_ever, args=(tmp_path, locked), daemon=True)
    other.start()
    assert locked.wait(stages.SECONDS)
    with pytest.raises(BlockingIOError), artifacts.locked_folder(tmp_path, wait=False):
        pass
    other.kill()
    other.join()
    with artifacts.locked_folder(tmp_path, wait=False):
        pass


@pytest.mark.parametrize(
    ("stage", "flags"),
    [("train", ("--dry-run", "--num-processes", "64")), ("infer", ("--samples", "100"))],  # evaluate: in containers
)
def test_a_stage_that_lacks_memory_is_refused_before_it_starts(start, monkeypatch, stage, flags):
    folder, read_text = start(stage), Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, *rest: "200000000" if path.name == "memory.max" else read_text(path, *rest)
    )
    before = stages.contents(folder)
    stages.assert_fails(stages.call(stage, *flags, model=folder), 2, "MNIST_MEMORY")
    assert stages.contents(folder) == before


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1), ("150000 100000", 1)])
def test_the_cores_of_a_container_are_those_of_its_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(8)})
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: quota)
    assert process.count_cores() == cores


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.EAGAIN, "no fork"), RuntimeError("can't start new thread")])
def test_a_lack_of_processes_or_threads_is_a_failure_that_names_the_variable(capsys, error):
    with pytest.raises(SystemExit) as end, process.exit_on_failure("train"):
        raise error
    assert end.value.code == 1
    assert "MNIST_PIDS" in capsys.readouterr().err


def test_a_failure_is_one_line_whatever_a_path_has_in_it(tmp_path):
    stages.assert_fails(stages.call("infer", model=tmp_path / "two\nlines"), 1)


def test_a_folder_that_cannot_be_made_is_a_failure_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    stages.assert_fails(stages.call("train", model=tmp_path / "file" / "volume"), 1, tmp_path / "file")
