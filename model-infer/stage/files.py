"""The files of the volume: their names, reading them with a limit, publishing them atomically.

It imports only the standard library, so that a stage can check its files before it spends a second on importing torch.
"""

import contextlib
import errno
import os
import shlex
import shutil
from pathlib import Path

from stage.process import Failure, command

DATA = Path("/opt/mount/data")
MODEL = Path("/opt/mount/model")
# The files of the volume: what train, evaluate and infer write.
WEIGHTS, CHECKPOINT, TRAIN_RESULTS, CURVES = "mnist_cnn.pt", "checkpoint.pt", "train_results.json", "training.png"
EVAL_RESULTS, CONFUSION_MATRIX, MISTAKES = "eval_results.json", "confusion_matrix.png", "mistakes.png"
RESULTS, PREDICTIONS, PREDICTIONS_SHEET = "results", "predictions.json", "predictions.png"
# Files that serve only as locks; the last one is in the data folder.
TRAIN_LOCK, PUBLISH_LOCK, DOWNLOAD_LOCK = ".train.lock", ".publish.lock", ".download.lock"
MAX_MODEL_BYTES = 4_000_000_000  # of any network; weights.py has the limit for this one
MAX_RECORD_BYTES = 10_000_000  # of train_results.json: it takes a few kB, and 200 bytes more with every epoch
OWN_RESULTS = "own"  # the pictures of infer and its predictions.json, for pictures of the user's own
EXPORT = "export"  # what evaluate --export writes


def fresh_hint(*flags: str) -> str:
    """Return the advice to start over, with these flags."""
    return f"To start over: {command('train', '--fresh', *flags)} (the old model stays until the new one is finished)"


FRESH_HINT = fresh_hint()
READ_HINT = f"Make it readable for uid {os.getuid()} (data: chmod -R a+rX data), or run as its owner with --user."
LINK_HINT = "Copy the files in its place: a container sees only the folders that are mounted into it."
NO_LOCKS_HINT = (
    "This file system has no locks: use another one, or, if no other host writes to it, mount NFS with -o "
    "local_lock=flock, then run it again."
)
WRITE_HINTS = {
    errno.ENOSPC: "Free some disk space (docker system df shows how much Docker uses), then run it again.",
    errno.EROFS: "Mount the folder writable, then run it again.",
    errno.EACCES: f"Make the folder writable for uid {os.getuid()}, the user of this stage, then run it again.",
    errno.EPERM: f"Change the owner of the folder to uid {os.getuid()}, the user of this stage, or, if lsattr shows "
    "that the folder or the file is immutable, undo that with chattr -i -a; then run it again.",
    **dict.fromkeys((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS), NO_LOCKS_HINT),
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
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise Failure(f"{path} is larger than the limit of {limit:,} bytes. {hint}")
            content = bytearray(size)
            del content[file.readinto(content) :]
            return content
    except FileNotFoundError:
        check_links(path, hint)
        raise Failure(f"{path} does not exist. {hint}") from None
    except OSError as error:
        fix = READ_HINT if error.errno == errno.EACCES else hint
        raise Failure(f"{path} cannot be read ({error.strerror}). {fix}") from None


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
    if DATA in path.parents:  # which is mounted from there
        path = "data" / path.relative_to(DATA)
    # Without DAC_OVERRIDE, root may not remove another user's files.
    inside = "docker compose run --rm --no-deps --cap-add DAC_OVERRIDE --entrypoint rm train -r"
    return f"Remove it with: {inside if MODEL in path.parents else 'rm -r'} {shlex.quote(str(path))}"


def publish(path: Path, content: bytes | bytearray) -> None:
    """Write a file atomically: a temporary file in the same folder, fsync, mode 0644, rename. The caller has a lock.

    Raise Failure if that is not possible; an existing file is then unchanged.
    """
    # Always the same name: a crash leaves at most one such file, which the next run removes.
    part = path.with_name(f".{path.name}.part")
    try:
        remove(part)
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        part.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        kept = "an existing file is unchanged"
        raise Failure(f"cannot write {path} ({error.strerror}); {kept}. {write_hint(error)}") from None


def write_hint(error: OSError) -> str:
    """Return what to do about a file that cannot be written or locked."""
    return WRITE_HINTS.get(error.errno or 0, "Fix the cause, then run it again.")


def remove(path: Path) -> None:
    """Remove a folder with its contents, a file or a link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
