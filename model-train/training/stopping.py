"""A request to stop a training: a signal, and the time that is left to save its progress."""

import time
from types import FrameType

# For the batches that the workers have when the training is asked to stop. With saving and ending, that is 3 s at most,
# and Compose kills after 5 (stop_grace_period).
BATCH_SECONDS = 1.5
SAVED = "progress saved"
LOST = "a batch took too long, so progress since the last checkpoint is lost"


class RunningClock:
    """Measures time, but not while this process was suspended.

    A paused container, stopped processes or a sleeping laptop appear as one long gap between two calls of seconds(),
    which counts as LONGEST_GAP at most.
    """

    LONGEST_GAP = 1.0  # seconds

    def __init__(self) -> None:
        self.elapsed, self.last_call = 0.0, time.monotonic()

    def seconds(self) -> float:
        """Return the seconds since the clock was created; call it many times a second."""
        now = time.monotonic()
        self.elapsed, self.last_call = self.elapsed + min(now - self.last_call, self.LONGEST_GAP), now
        return self.elapsed


class Stopped(Exception):
    """A signal has ended the training; `progress` says what has become of it."""

    def __init__(self, number: int, progress: str) -> None:
        super().__init__(number, progress)
        self.number, self.progress = number, progress


class StopRequest:
    """Whether a signal has asked the training to stop: its number, or 0."""

    def __init__(self) -> None:
        self.number, self.clock = 0, RunningClock()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second signal does not extend the time."""
        if not self.number:
            self.number, self.clock = number, RunningClock()

    def is_overdue(self) -> bool:
        """Return whether the time is used up."""
        return bool(self.number) and self.clock.seconds() > BATCH_SECONDS
