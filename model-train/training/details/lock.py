"""The lock of the volume: one training at a time writes to it. Its text names the holder: "HOST at TIME"."""

import contextlib
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from stage.files import TRAIN_LOCK, read_limited
from stage.locks import file_lock
from stage.process import Failure


class Busy(Failure):
    """Another training has the lock of the volume; `holder` says what is known of it."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder} is locked by {holder}. Wait for it to finish, or stop it.", status=2)
        self.holder = holder


@contextlib.contextmanager
def volume_lock(folder: Path) -> Iterator[None]:
    """Lock the volume, for one training at a time, until the block or the process ends.

    Raise Busy if another training has the lock, Failure if there can be no lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(file_lock(folder / TRAIN_LOCK, wait=False))
        except BlockingIOError:
            raise Busy(folder, read_holder(folder / TRAIN_LOCK)) from None
        name = f"{platform.node()} at {datetime.now(UTC).isoformat(timespec='seconds')}"
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            os.truncate(file, 0)
            os.write(file, name.encode())
            os.fsync(file)  # for other hosts
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.truncate(file, 0)  # the next holder's name comes a moment after its lock


def read_holder(lock: Path) -> str:
    """Return what is known of the training that has a lock."""
    with contextlib.suppress(Failure):
        name = read_limited(lock, 1000, "").decode(errors="replace")
        if name and name.isprintable():
            return f"the training that began on {name}"
    return "another train container"
