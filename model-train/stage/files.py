"""The files of the volume: their names, reading them with a limit, publishing them atomically, locks.

It imports only the standard library, so that a stage can check its files before it spends a second on importing torch.
"""

import contextlib
import errno
import fcntl
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stage.process import Failure, command

DATA = Path("/opt/mount/data")
MODEL = Path("/opt/mount/model")
# The files of the volume: what train, evaluate and infer write.
WEIGHTS, CHECKPOINT, TRAIN_RESULTS, CURVES = "mnist_cnn.pt", "checkpoint.pt", "train_results.json", "training.png"
EVAL_RESULTS, CONFUSION_MATRIX, MISTAKES = "eval_results.json", "confusion_matrix.png", "mistakes.png"
RESULTS, PREDICTIONS, PREDICTIONS_SHEET = "results", "predictions.json", "predictions.png"
OWN_RESULTS = "own"  # the pictures of infer and its predictions.json, for pictures of the user's own
MAX_MODEL_BYTES = 1_000_000  # this network's state dict takes 90 kB
FRESH_HINT = f"To start over: {command('train', '--fresh')} (the old model stays until the new one is finished)"
READ_HINT = f"Make it readable for uid {os.getuid()}: chmod -R a+rX data; or run this stage as its owner with --user."
LINK_HINT = "Copy the files in its place: a container sees only the folders that are mounted into it."
NO_LOCKS_HINT = (
    "This file system has no locks: use another one, or, if no other host writes to it, mount NFS with -o "
    "local_lock=flock, then run it again."
)
WRITE_HINTS = {
    errno.ENOSPC: "Free some disk space (docker system df shows how much Docker uses), then run it again.",
    errno.EDQUOT: "Free some of the disk quota, then run it again.",
    errno.EROFS: "Mount the folder writable, then run it again.",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f), then run it again.",
    errno.EACCES: f"Make the folder writable for uid {os.getuid()}, the user of this stage, then run it again.",
    errno.EPERM: f"Change the owner of the folder to uid {os.getuid()}, the user of this stage, or, if lsattr shows "
    "that the folder or the file is immutable, undo that with chattr -i -a; then run it again.",
    errno.ENOLCK: NO_LOCKS_HINT,
    errno.EOPNOTSUPP: NO_LOCKS_HINT,
    errno.ENOSYS: NO_LOCKS_HINT,
}


# Reading --------------------------------------------------------------------------------------------------------------


def read_limited(path: Path, limit: int, hint: str) -> bytearray:
    """Read a file of at most `limit` bytes. Raise Failure, with the hint, if that is not possible."""
    try:
        if path.is_dir():
            raise Failure(f"{path} is a folder, not a file. {removal_hint(path)}")
        if path.exists() and not path.is_file():
            raise Failure(f"{path} is not a regular file. {hint}")  # reading a pipe would never end
        with open(path, "rb") as file:
            content = bytearray(limit + 1)
            del content[file.readinto(content) :]
    except FileNotFoundError:
        check_links(path, hint)
        raise Failure(f"{path} does not exist. {hint}") from None
    except OSError as error:
        fix = READ_HINT if error.errno == errno.EACCES else hint
        raise Failure(f"{path} cannot be read ({error.strerror}). {fix}") from None
    if len(content) > limit:
        raise Failure(f"{path} is larger than the limit of {limit:,} bytes. {hint}")
    return content


def check_links(path: Path, hint: str = LINK_HINT) -> None:
    """Raise Failure if a path is a link that leads nowhere, with the hint, or has such a link among its folders."""
    for place in (path, *path.parents):
        if os.path.islink(place) and not os.path.exists(place):
            fix = hint if place == path else LINK_HINT
            raise Failure(f"{place} is a link to {os.readlink(place)}, which does not exist here. {fix}") from None


# Writing --------------------------------------------------------------------------------------------------------------


def check_destinations(folder: Path, *names: str) -> None:
    """Raise Failure if a folder is in the way of a file to publish; anything else is replaced by the rename."""
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            raise Failure(f"{path} is a folder, but a file must be written there. {removal_hint(path)}")


def removal_hint(path: Path) -> str:
    """Return the command that removes what is in the way, in the volume or in a local folder."""
    # Without DAC_OVERRIDE, root may not remove another user's files.
    inside = "docker compose run --rm --no-deps --cap-add DAC_OVERRIDE --entrypoint rm train -r"
    return f"Remove it with: {inside if MODEL in path.parents else 'rm -r'} {shlex.quote(str(path))}"


def publish(path: Path, content: bytes) -> None:
    """Write a file atomically: a temporary file in the same folder, fsync, mode 0644, rename.

    Raise Failure if that is not possible; an existing file is then unchanged.
    """
    # A fixed temporary name: a crash leaves at most one such file, which the next writer reuses.
    part = path.with_name(f".{path.name}.part")
    try:
        with open_locked(part) as file:
            try:
                file.truncate(0)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
                part.rename(path)
            except OSError:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise Failure(
            f"cannot write {path} ({error.strerror}); an existing file is unchanged. {write_hint(error)}"
        ) from None


def write_hint(error: OSError) -> str:
    """Return what to do about a file that cannot be written or locked."""
    return WRITE_HINTS.get(error.errno or 0, "Fix the cause, then run it again.")


@contextlib.contextmanager
def open_locked(part: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing under a lock, since two runs of a stage may publish at once."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            if not is_reusable(part):
                remove(part)  # otherwise it would block every later run
        with open(part, "ab", opener=open_nofollow) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # While this run waited, the other one may have renamed the file; then a new one is needed.
            if is_same_file(part, file):
                if os.fstat(file.fileno()).st_nlink == 1:
                    yield file
                    return
                remove(part)  # linked from elsewhere, where it must not change


def is_same_file(path: Path, file: IO[bytes]) -> bool:
    """Return whether a path still is that of an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def is_reusable(part: Path) -> bool:
    """Return whether this is a regular file, and writable.

    Raise FileNotFoundError if it is gone: os.access() would call that not writable.
    """
    if not stat.S_ISREG(part.lstat().st_mode):
        return False
    try:
        os.close(open_nofollow(part, os.O_WRONLY))
    except PermissionError:
        return False
    return True


def open_nofollow(path: str | Path, flags: int) -> int:
    """Open a file without following links and without blocking on a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)


def remove(path: Path) -> None:
    """Remove a folder with its contents, a file or a link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[int]:
    """Lock a file that serves only as a lock until the block or the process ends; yield its descriptor.

    The file stays: over NFS, where names are cached, others could go on to lock one that is removed. If it is locked,
    wait, or raise BlockingIOError. Raise Failure if it cannot be made or locked.
    """
    with contextlib.ExitStack() as stack:
        try:
            with contextlib.suppress(FileNotFoundError):
                if not is_reusable(path):
                    remove(path)
            # NFS's server, and so other hosts, get to know of a lock only if the file is open for writing (flock(2)).
            # With O_CREAT, files of others in a sticky folder cannot be opened.
            file = open_nofollow(path, os.O_WRONLY | (0 if path.exists() else os.O_CREAT))
            stack.callback(os.close, file)
            with contextlib.suppress(PermissionError):  # made by another user
                os.fchmod(file, 0o666)  # another user who cannot open it would replace it
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            raise Failure(f"cannot lock {path} ({error.strerror}). {write_hint(error)}") from None
        yield file
