"""The batch queue: hands out each batch number once, from memory shared by the parent and its workers.

Only taking a batch needs a lock: it is what makes an epoch one pass over the images. A worker may be killed at any
instant: another worker then redoes its batch, and the batch counts once.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator

from record import WorkerRecord

LOCK_SECONDS = 30  # a lock is normally held for microseconds; after waiting this long, the parent kills its holder


class RunningClock:
    """Measures time, but not while this process was suspended.

    A paused container, stopped processes or a sleeping laptop appear as one long gap between two calls of seconds(),
    which counts as LONGEST_GAP at most.
    """

    LONGEST_GAP = 1.0  # seconds

    def __init__(self) -> None:
        self.elapsed, self.last_call = 0.0, time.monotonic()

    def seconds(self) -> float:
        """Return the seconds since the clock was created or reset; call it many times a second."""
        now = time.monotonic()
        self.elapsed, self.last_call = self.elapsed + min(now - self.last_call, self.LONGEST_GAP), now
        return self.elapsed

    def reset(self) -> None:
        """Restart from 0."""
        self.elapsed, self.last_call = 0.0, time.monotonic()


class Totals(ctypes.Structure):
    """What a worker has done: steps, images, and the sum of the images' losses."""

    _fields_ = [("steps", ctypes.c_int64), ("images", ctypes.c_int64), ("loss_sum", ctypes.c_double)]


class WorkerState(ctypes.Structure):
    """The state of one worker, in shared memory.

    It is busy with `current_batch` if `taken` is greater than `finished`. finish() writes the new totals to the unused
    slot, then increments `finished`; this single store makes them valid and marks the batch as done. (This relies on
    stores becoming visible in order, which x86 guarantees. Other CPUs do not.) One gap remains: if a worker is killed
    between its update of the parameters and this store, all or part of the update is applied twice.
    """

    _fields_ = [
        ("current_batch", ctypes.c_int64),
        ("taken", ctypes.c_int64),  # batches done, plus 1 while busy
        ("finished", ctypes.c_int64),  # batches done; totals[finished % 2] is valid
        ("dead", ctypes.c_int64),
        ("waited_seconds", ctypes.c_double),
        ("totals", Totals * 2),
    ]

    def is_busy(self) -> bool:
        """Return whether the worker has taken a batch that is not finished."""
        return bool(self.taken > self.finished)

    def finish(self, images: int, loss_sum: float) -> None:
        """Count the current batch as done."""
        old, new = self.totals[self.finished % 2], self.totals[(self.finished + 1) % 2]
        new.steps, new.images, new.loss_sum = old.steps + 1, old.images + images, old.loss_sum + loss_sum
        self.finished += 1

    def read_totals(self) -> tuple[int, int, float]:
        """Return steps, images and loss sum of the same moment, even while the worker finishes batches."""
        while True:
            finished = self.finished
            totals = self.totals[finished % 2]
            copy = totals.steps, totals.images, totals.loss_sum
            if self.finished == finished:
                return copy


class BatchQueue:
    """Batches are numbered consecutively over all epochs. Workers may take those in [next, limit), every `step`-th one.

    The parent raises the limit to the end of an epoch to start the workers, sets it to `next` to drain the queue, and
    sets `closed` to 1 to end the workers.
    """

    def __init__(self, next_batch: int, workers: list[WorkerRecord]) -> None:
        self.next, self.limit, self.closed = (ctypes.c_int64.from_buffer(mmap.mmap(-1, 8)) for _ in range(3))
        self.next.value = self.limit.value = next_batch
        self.step = 1  # or the number of nodes, each of which has a queue of its own (cluster.py)
        self.workers = (WorkerState * len(workers)).from_buffer(
            mmap.mmap(-1, ctypes.sizeof(WorkerState) * len(workers))
        )
        for state, record in zip(self.workers, workers, strict=True):
            state.totals[0] = record.steps, record.images, record.loss_sum
            state.waited_seconds = record.waited_seconds
        self.parent = os.getpid()
        # For an fcntl() lock: the kernel releases it when its holder dies, however that happens.
        self.lock_file = os.memfd_create("batch_queue")

    def totals(self) -> tuple[int, int, float]:
        """Return the sums over all workers: steps, images, and the images' losses."""
        steps, images, loss_sums = zip(*[state.read_totals() for state in self.workers], strict=True)
        return sum(steps), sum(images), sum(loss_sums)

    def worker_records(self) -> list[WorkerRecord]:
        """Return what each worker has done so far."""
        records = []
        for rank, state in enumerate(self.workers):
            steps, images, loss_sum = state.read_totals()
            records.append(WorkerRecord(rank, images, steps, loss_sum, state.waited_seconds))
        return records

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the queue's lock during the block. After waiting LOCK_SECONDS, the parent kills its holder."""
        clock = RunningClock()
        while not self.try_lock():
            time.sleep(0.00005)
            if os.getpid() == self.parent and clock.seconds() > LOCK_SECONDS:
                self.kill_lock_holder()
                clock.reset()
        try:
            yield
        finally:
            fcntl.lockf(self.lock_file, fcntl.LOCK_UN)

    def try_lock(self) -> bool:
        """Take the lock if it is free, and return whether it was."""
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def kill_lock_holder(self) -> None:
        """Kill the process that has the lock, if there is one."""
        layout = "hhqqi4x"  # struct flock, see fcntl(2): type, whence, start, length, pid
        request = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, *_, pid = struct.unpack(layout, fcntl.fcntl(self.lock_file, fcntl.F_GETLK, request))
        if kind != fcntl.F_UNLCK:
            os.kill(pid, signal.SIGKILL)

    def take(self, rank: int) -> int | None:
        """Return the number of a batch for the worker, or None if there is none now.

        The new owner is recorded before the old one is cleared: if it is killed in between, no batch is lost.
        """
        with self.locked():
            self.skip_taken()  # a worker may have been killed before its own call below
            number = self.first_available()
            if number is None:
                return None
            state = self.workers[rank]
            state.current_batch = number
            state.taken = state.finished + 1
            self.skip_taken()
            # If another worker has this batch too, it was killed, even if `dead` is not set yet: the batch of a living
            # worker is never handed out.
            for other_rank, other in enumerate(self.workers):
                if other_rank != rank and other.is_busy() and other.current_batch == number:
                    other.taken = other.finished
            return number

    def skip_taken(self) -> None:
        """Move `next` past every batch that a worker is busy with."""
        taken = [state.current_batch + self.step for state in self.workers if state.is_busy()]
        self.next.value = max(self.next.value, *taken) if taken else self.next.value

    def first_available(self) -> int | None:
        """Return the batch of a dead worker, else the next one below the limit, else None."""
        for state in self.workers:
            if state.dead and state.is_busy():
                return int(state.current_batch)
        return int(self.next.value) if self.next.value < self.limit.value else None

    def set_limit(self, limit: int) -> None:
        """Let the workers take batches numbered below `limit`."""
        with self.locked():
            self.limit.value = limit

    def all_handed_out(self) -> bool:
        """Return whether all batches below the limit are handed out; some may not be finished yet."""
        return bool(self.next.value >= self.limit.value)

    def stop_handing_out(self) -> None:
        """Hand out no new batches. The workers finish theirs, and redo those of dead workers."""
        with self.locked():
            self.limit.value = self.next.value

    def is_drained(self) -> bool:
        """Return whether all batches below the limit are handed out and finished."""
        with self.locked():
            return self.all_handed_out() and not any(state.is_busy() for state in self.workers)
