"""Publishes a folder of files atomically: until all files are written, the old ones stay.

Only renaming a folder replaces all of its files at once.
"""

import ctypes
import os
from pathlib import Path

from stage.files import publish, removal_hint, remove, write_hint
from stage.process import Failure


def check_destination(folder: Path) -> None:
    """Raise Failure if something else, such as a file, has the name of a folder to be published."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise Failure(f"{folder} is not a folder, but files must be written there. {removal_hint(folder)}")


def replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Replace the contents of a folder with these files. Until all are written, the old ones stay.

    The caller has the lock. Raise Failure if the folder cannot be written.
    """
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
    except OSError as error:
        raise Failure(f"cannot write {error.filename or folder} ({error.strerror}). {write_hint(error)}") from None
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
