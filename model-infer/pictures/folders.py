"""Publishes a folder of pictures atomically: until all files are written, the old ones stay.

Only renaming a folder replaces all of its files at once.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from stage.files import WRITE_HINTS, open_locked, publish, removal_hint, remove
from stage.process import Failure, stop_signals_deferred


def check_destination(folder: Path) -> None:
    """Raise Failure if something else, such as a file, has the name of a folder to be published."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise Failure(f"{folder} is not a folder, but pictures must be written there. {removal_hint(folder)}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder while the block publishes it; other runs and signals wait. Raise Failure if it cannot write."""
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        with open_locked(lock), stop_signals_deferred():  # nothing is written to the lock
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        hint = WRITE_HINTS.get(error.errno or 0, "Fix this, then run it again.")
        raise Failure(f"cannot write {error.filename or folder} ({error.strerror}). {hint}") from None


def replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Replace the contents of a folder with these files. Until all are written, the old ones stay."""
    new, old = (folder.with_name(f".{folder.name}.{which}") for which in ("new", "old"))
    try:
        clean_up(folder, new, old)  # left by a crash
        new.mkdir()
        new.chmod(0o777)  # like the volume's root, so that a later run under another uid can replace it
        for name, content in files.items():
            publish(new / name, content)
        if not exchange(new, folder):
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    finally:
        clean_up(folder, new, old)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that neither name is ever missing; return whether that was possible.

    It is not if one of them does not exist, nor on some file systems, such as NFS.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # since glibc 2.28; Python has no function for it
    here, flag = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), flag) == 0


def clean_up(folder: Path, new: Path, old: Path) -> None:
    """Restore the old folder if the new one is not in place, and remove temporary folders."""
    if old.is_dir() and not old.is_symlink() and not folder.exists():
        old.rename(folder)
    remove(new)
    remove(old)
