"""files.py: files that are published whole, locks, limits, and failures in one line."""

import errno
import fcntl
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import stages
from stage import files, images, limits, locks, output, process
from stage.process import Failure
from training.details.lock import volume_lock


def test_a_published_file_is_readable_by_all_and_nothing_is_left_beside_it(tmp_path):
    before = os.umask(0o077)
    try:
        files.publish(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_may_not_be_read_is_told_with_the_rights_that_are_missing_not_with_a_new_download(tmp_path):
    (tmp_path / "file").touch(0)
    uid = os.geteuid()
    if uid == 0:  # root may read all
        os.seteuid(65534)
    try:
        with pytest.raises(Failure, match=r"Permission denied\)\. .*chmod.*--user") as failure:
            files.read_limited(tmp_path / "file", 9, images.DATA_HINT)
    finally:
        os.seteuid(uid)
    assert images.DATA_HINT not in str(failure.value)


def test_reading_a_file_takes_the_memory_of_its_size_not_of_its_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert files.read_limited(tmp_path / "file", 10**15, "") == b"content"
    assert files.read_limited(tmp_path / "file", 7, "") == b"content"
    with pytest.raises(Failure, match="larger than the limit of 6 bytes"):
        files.read_limited(tmp_path / "file", 6, "")


def test_a_folder_in_place_of_a_file_of_the_data_is_named_as_it_is_outside_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DATA", tmp_path)
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(Failure, match=r"is a folder, not a file\. Remove it with: rm -r data/MNIST$"):
        files.read_limited(tmp_path / "MNIST", 9, "")


def fail(*args, number=errno.ENOSPC):
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("module", "call", "number", "hint"),
    [
        *((os, call, errno.ENOSPC, "disk space") for call in ("fsync", "fchmod")),
        *((Path, "rename", errno.EPERM, "chattr -i"), (fcntl, "flock", errno.ENOLCK, "no locks")),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_says_what_helps(tmp_path, monkeypatch, module, call, number, hint):
    files.publish(tmp_path / "file", b"old")
    monkeypatch.setattr(module, call, partial(fail, number=number))
    with pytest.raises(Failure, match=f"/file .*{hint}"), locks.file_lock(tmp_path / "file"):
        files.publish(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"] or call == "flock"  # the file with the lock stays


@pytest.mark.parametrize(("stage", "flags"), [("train", ["--fresh"]), ("evaluate", []), ("infer", [])])
def test_no_file_is_replaced_before_its_successor_is_flushed_to_disk(finished, tmp_path, monkeypatch, stage, flags):
    folder = shutil.copytree(finished, tmp_path / "volume")
    monkeypatch.setattr(os, "fsync", fail)
    with stages.unchanged(folder):
        stages.assert_fails(stages.call(stage, *flags, model=folder), 1)


def test_what_a_crash_left_half_written_does_not_reach_the_next_file(tmp_path):
    (tmp_path / ".file.part").write_bytes(b"half of a much longer file")
    files.publish(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_of_several_writers_of_the_same_file_one_is_the_last_and_its_file_is_whole(tmp_path):
    versions = [bytes([number]) * 100_000 for number in range(200)]

    def write(version):
        with locks.file_lock(tmp_path / "lock"):
            files.publish(tmp_path / "file", version)

    with ThreadPoolExecutor(8) as pool:
        assert len([*pool.map(write, versions)]) == 200  # it raises what they raise
    assert (tmp_path / "file").read_bytes() in versions
    assert {*os.listdir(tmp_path)} == {"file", "lock"}


def test_a_lock_is_one_that_other_hosts_see_over_nfs(tmp_path, monkeypatch):
    """NFS's server is told only of locks of regular files that are open for writing: flock(2)."""

    def flock(file, operation, really=fcntl.flock):
        mode, flags = os.stat(getattr(file, "name", file)).st_mode, fcntl.fcntl(file, fcntl.F_GETFL)
        if stat.S_ISREG(mode) and flags & os.O_ACCMODE != os.O_RDONLY:
            really(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with volume_lock(tmp_path), pytest.raises(Failure, match="locked by"), volume_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_volume_without_locks_is_refused_in_one_line(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", partial(fail, number=number))
    stages.assert_fails(stages.call("train", model=tmp_path), 1, tmp_path, "no locks")


def test_a_lock_that_is_linked_from_elsewhere_stays_locked(tmp_path):
    """As after `cp -al` of the volume of a running training."""
    lock, copy = tmp_path / "lock", tmp_path / "copy"
    with locks.file_lock(lock):
        copy.hardlink_to(lock)
        with pytest.raises(BlockingIOError), locks.file_lock(lock, wait=False):
            pass


def test_a_file_that_is_linked_from_elsewhere_is_not_overwritten_there(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"old")
    (tmp_path / ".file.part").hardlink_to(tmp_path / "elsewhere")
    files.publish(tmp_path / "file", b"new")
    assert (tmp_path / "elsewhere").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("stage", "flags", "megabytes"),
    [
        ("train", ("--fresh", "--num-processes", "64"), 1000),
        ("train", ("--fresh", "--num-processes", "8", "--batch-size", "10000"), 1000),
        ("train", ("--epochs", "9999"), 200),
        ("infer", ("--samples", "100"), 200),
    ],
)
def test_work_for_which_there_is_too_little_memory_is_refused(volume, monkeypatch, stage, flags, megabytes):
    read_text = Path.read_text
    limit = {"memory.max": f"{megabytes}000000"}
    monkeypatch.setattr(Path, "read_text", lambda path, *rest: limit.get(path.name) or read_text(path, *rest))
    with stages.unchanged(volume):
        stages.assert_fails(stages.call(stage, *flags, model=volume), 2, "MNIST_MEMORY")


def test_numbers_that_are_rounded_do_not_contradict_what_is_said_of_them(monkeypatch):
    assert [output.percent(value) for value in (100, 99.999, 99.46)] == ["100.00 %", "99.99 %", "99.46 %"]
    assert [output.percent(value, 0) for value in (100, 99.9, 99.4)] == ["100 %", "99 %", "99 %"]
    monkeypatch.setattr(Path, "read_text", lambda path: "317000000")
    with pytest.raises(Failure, match=r"needs about 318 MB .* 317 MB"):
        limits.check_memory(317_000_001, "it")


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1), ("150000 100000", 1)])
def test_the_cores_of_a_container_are_those_of_its_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(8)})
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: quota)
    assert limits.count_cores() == cores


@pytest.mark.parametrize("error", [OSError(errno.EAGAIN, "no fork"), RuntimeError("can't start new thread")])
def test_a_lack_of_processes_or_threads_is_a_failure_that_names_the_variable(capsys, error):
    with pytest.raises(SystemExit) as end, process.exit_on_failure("train"):
        raise error
    assert end.value.code == 1
    assert "MNIST_PIDS" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "path", "named"), [("infer", "two\nlines", "two"), ("train", "file/volume", "file")])
def test_a_folder_that_is_not_there_or_cannot_be_made_is_named_in_one_line(tmp_path, stage, path, named):
    (tmp_path / "file").write_text("in the way")
    stages.assert_fails(stages.call(stage, model=tmp_path / path), 1, tmp_path / named)


def test_a_message_names_the_command_that_works_without_containers(volume):
    words = ".venv/bin/python model-train/train.py --data data --model model --fresh"
    stages.assert_fails(stages.run("train", "--lr", "0.2", model=volume), 2, words)
