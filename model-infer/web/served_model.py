"""Reloads the served model when its file in the volume changes."""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from stage.dataset import DATA_SET
from stage.files import EVAL_RESULTS, WEIGHTS
from stage.output import percent, print_error, say
from stage.process import Failure, command
from web.pool import Pool

FIRST_SECOND, LAST_SECOND = -62_135_596_800, 253_402_300_799  # of the years 1 to 9999, which datetime can represent
LOADING = "the model is being loaded"
Fingerprint = tuple[int, int, int]  # modification time (ns), inode and size of a file, which tell whether it changed
MISSING: Fingerprint = (0, 0, 0)
NO_MODEL = f"there is no model yet. Train one with: {command('train')}"


class Served(NamedTuple):
    """A model that the service predicts with."""

    pool: Pool
    sha256: str  # of its file
    accuracy: float | None  # on the test images, in percent; None if it has not been evaluated
    published: str  # when train published it, in ISO 8601
    loaded: str  # when the service loaded it, in ISO 8601


class ServedModel:
    """The model that the service predicts with. A new one is loaded completely before it replaces the old one."""

    def __init__(self, model: Path, data: Path) -> None:
        self.folder, self.data = model, data
        # What a loaded model depends on: its file, its evaluation, and the images that its threshold is found on.
        self.paths = (model / WEIGHTS, model / EVAL_RESULTS, DATA_SET.training_path(data))
        self.seen: tuple[Fingerprint, ...] = ()  # the fingerprints of these files when they were last read
        self.pool: Pool | None = None  # which loads the model, or a new one
        self.memory_lock = asyncio.Lock()  # held by whatever takes much memory: a new pool, a large picture
        self.served: Served | None = None  # None until a model has been loaded
        self.problem = LOADING  # why the model in the volume is not served, or ""
        self.printed = ""  # the last problem that was printed
        self.failed = False  # whether it could not be loaded
        self.watched = True  # whether the service still looks for a new one

    def has_changed(self) -> bool:
        """Return whether a file has changed since the last call of start_loading(), or a worker has ended.

        A model that could not be loaded is not tried again for a worker that has ended.
        """
        seen = tuple(fingerprint(path) for path in self.paths)
        return seen != self.seen or bool(self.served and not self.failed and not self.served.pool.is_whole())

    def start_loading(self) -> None:
        """Start to load the model, if there is one."""
        # Taken before reading, so that a change during it is noticed by the next call.
        self.seen = tuple(fingerprint(path) for path in self.paths)
        if self.seen[0] == MISSING:
            gone = f"{self.paths[0]} is gone; the model loaded from it stays in use. Train one with: {command('train')}"
            self.report(gone if self.served else NO_MODEL, failed=False)
            return
        if self.failed or not self.served:
            self.problem, self.failed = LOADING, False
        self.pool = Pool(self.folder, self.data)

    async def refresh(self) -> None:
        """Load the model if one of its files has changed since the last call, or a worker has ended."""
        if self.served and not self.served.pool.workers:  # all have ended
            self.served.pool.end()
            self.served, self.seen = None, ()
        if not self.pool and not self.has_changed():
            return
        async with self.memory_lock:
            try:
                if not self.pool:
                    self.start_loading()
            except OSError as error:  # too many processes or open files
                self.seen = ()  # the next call tries again
                fix = "Raise MNIST_PIDS, or the limit of open files."
                self.report(f"cannot start the workers ({error.strerror}). {fix}", failed=True)
            if not self.pool:
                return
            pool = self.pool
            try:
                await pool.load()
            except Failure as failure:
                self.report(str(failure), failed=True)
            except (OSError, EOFError):
                self.seen = ()  # the next call tries again
                self.report("the worker that loads the model has ended. Raise MNIST_MEMORY.", failed=True)
            self.pool = None
            if not (loaded := pool.loaded):
                pool.end()
                return
        old, accuracy, published = self.served, loaded.accuracy, as_iso(self.seen[0][0] / 1e9)
        self.served = Served(pool, loaded.sha256, accuracy, published, as_iso(time.time()))
        self.problem, self.printed, self.failed = "", "", False
        if old:
            old.pool.replace()
        evaluation = "not evaluated yet" if accuracy is None else f"{percent(accuracy)} accuracy on the test images"
        say(f"serve: loaded the model {loaded.sha256[:12]}, {evaluation}")

    def pools(self) -> list[Pool]:
        """Return the pool that loads a model, and the one that predicts."""
        return [pool for pool in (self.pool, self.served and self.served.pool) if pool]

    def end(self) -> None:
        """End all workers."""
        for pool in self.pools():
            pool.end()

    def report(self, problem: str, failed: bool) -> None:
        """Note why the model in the volume is not served, and print it, once."""
        if problem != self.printed:
            print_error(f"serve: {problem}")
        self.problem, self.printed, self.failed = problem, problem, failed


def fingerprint(path: Path) -> Fingerprint:
    """Return the fingerprint of a file, or MISSING."""
    try:
        status = path.stat()
    except OSError:
        return MISSING
    return status.st_mtime_ns, status.st_ino, status.st_size


def as_iso(seconds: float) -> str:
    """Return a time, in seconds since 1970, in ISO 8601; the nearest one, if it is before year 1 or after 9999."""
    return datetime.fromtimestamp(min(max(seconds, FIRST_SECOND), LAST_SECOND), UTC).isoformat(timespec="seconds")
