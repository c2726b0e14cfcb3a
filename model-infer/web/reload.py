"""Reloads the served model when its file in the volume changes."""

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pictures.prediction import Predictor, load_predictor
from stage.dataset import DATA_SET
from stage.files import EVAL_RESULTS, WEIGHTS
from stage.process import Failure, command, percent, print_error, say
from web.metrics import Metrics

FIRST_SECOND, LAST_SECOND = -62_135_596_800, 253_402_300_799  # of the years 1 to 9999, which datetime can represent
LOADING = "the model is being loaded"
NO_MODEL = f"there is no model yet. Train one with: {command('train')}"


class Served(NamedTuple):
    """A model that the service predicts with."""

    predictor: Predictor
    published: str  # when train published it, in ISO 8601
    loaded: str  # when the service loaded it, in ISO 8601


class ServedModel:
    """The model that the service predicts with. A new one is loaded completely before it replaces the old one."""

    def __init__(self, model: Path, data: Path, metrics: Metrics) -> None:
        self.folder, self.metrics = model, metrics
        self.data = data
        # What a loaded model depends on: its file, its evaluation, and the images that its threshold is found on.
        self.paths = (model / WEIGHTS, model / EVAL_RESULTS, DATA_SET.training_path(data))
        self.seen: tuple[object, ...] = ()  # the fingerprints of these files when they were last read
        self.served: Served | None = None  # None until a model has been loaded
        self.problem = LOADING  # why the model in the volume is not served, or ""
        self.failed = False  # whether it could not be loaded
        self.watched = True  # whether the service still looks for a new one

    def refresh(self) -> None:
        """Load the model if one of its files has changed since the last call."""
        seen = tuple(fingerprint(path) for path in self.paths)
        if seen == self.seen:
            return
        self.seen = seen  # taken before reading, so that a change during it is noticed by the next call
        if seen[0] is None:
            gone = f"{self.paths[0]} is gone; the model loaded from it stays in use. Train one with: {command('train')}"
            self.report(gone if self.served else NO_MODEL, failed=False)
            return
        if self.failed or not self.served:
            self.problem, self.failed = LOADING, False
        try:
            predictor = load_predictor(self.folder, self.data)
        except Failure as failure:
            self.report(str(failure), failed=True)
            return
        except (
            MemoryError,
            RuntimeError,
        ) as error:  # such as a thread that cannot be started: the next call tries again
            self.seen = ()
            self.report(f"loading the model failed ({error})", failed=True)
            return
        self.served = Served(predictor, as_iso(seen[0][0] / 1e9), as_iso(datetime.now(UTC).timestamp()))
        self.problem, self.failed = "", False
        self.metrics.set_model(predictor.sha256, predictor.accuracy)
        say(f"serve: loaded the model {predictor.sha256[:12]}, {as_text(predictor.accuracy)}")

    def report(self, problem: str, failed: bool) -> None:
        """Note why the model in the volume is not served, and print it."""
        self.problem, self.failed = problem, failed
        print_error(f"serve: {problem}")


def fingerprint(path: Path) -> tuple[int, int, int] | None:
    """Return modification time (ns), inode and size of a file, which tell whether it changed; None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def as_iso(seconds: float) -> str:
    """Return a time, in seconds since 1970, in ISO 8601; the nearest one, if it is before year 1 or after 9999."""
    return datetime.fromtimestamp(min(max(seconds, FIRST_SECOND), LAST_SECOND), UTC).isoformat(timespec="seconds")


def as_text(accuracy: float | None) -> str:
    """Format an accuracy, in percent, for the terminal."""
    return "not evaluated yet" if accuracy is None else f"{percent(accuracy)} accuracy on the test images"
