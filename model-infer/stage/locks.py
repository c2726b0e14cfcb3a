"""Locks, held by a file that serves only as one: until the block, or the process, ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stage.files import PUBLISH_LOCK, remove, write_hint
from stage.process import Failure, stop_signals_deferred


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[None]:
    """Have other runs of evaluate and infer, and stop signals, wait while the block publishes files in the volume."""
    with file_lock(folder / PUBLISH_LOCK), stop_signals_deferred():
        yield


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[int]:
    """Lock a file that serves only as a lock until the block or the process ends; yield its descriptor.

    The file stays: over NFS, where names are cached, others could go on to lock one that is removed. If it is locked,
    wait, or raise BlockingIOError. Raise Failure if it cannot be made or locked.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = open_lock(path)
            stack.callback(os.close, file)
            with contextlib.suppress(PermissionError):  # made by another user
                os.fchmod(file, 0o666)  # another user who cannot open it would replace it
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            raise Failure(f"cannot lock {path} ({error.strerror}). {write_hint(error)}") from None
        yield file


def open_lock(path: Path) -> int:
    """Open a lock file, for writing: only then NFS's server, and so other hosts, get to know of the lock (flock(2)).

    What cannot be opened so, such as a link or a folder, is replaced, since it would block every later run.
    """
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # never wait for the reader of a pipe
    try:
        return os.open(path, flags)  # not with O_CREAT: it refuses files of others in a sticky folder
    except FileNotFoundError:  # not to be removed: another process may be making it
        pass
    except OSError:
        remove(path)
    return os.open(path, flags | os.O_CREAT, 0o666)
