"""batch_queue.py: each batch is handed out once and counted once, whichever worker is killed at any moment."""

import itertools
import multiprocessing
import signal
import sys

import batch_queue
import pytest
import record
import stages


def new_queue(limit, workers=2):
    """A queue that has batches up to a limit."""
    queue = batch_queue.BatchQueue(0, [record.WorkerRecord(rank) for rank in range(workers)])
    queue.set_limit(limit)
    return queue


def test_a_batch_is_handed_out_once():
    queue, taken = new_queue(5), []
    for rank in (0, 1, 0, 0, 1, 0):
        taken.append(queue.take(rank))
        queue.workers[rank].finish(96, 1.0)
    assert taken == [0, 1, 2, 3, 4, None]


def test_the_batch_of_a_dead_worker_goes_to_a_living_one_before_any_other():
    queue = new_queue(10)
    assert [queue.take(0), queue.take(1)] == [0, 1]
    queue.workers[0].dead = 1
    queue.workers[1].finish(96, 1.0)
    assert queue.take(1) == 0
    queue.workers[1].finish(96, 1.0)
    assert queue.take(1) == 2


def test_a_queue_that_hands_out_no_more_is_drained_when_what_was_taken_is_done():
    queue = new_queue(10)
    assert queue.take(0) == 0
    queue.stop_handing_out()
    assert queue.take(1) is None
    assert not queue.is_drained()
    queue.workers[0].finish(96, 1.0)
    assert queue.is_drained()
    queue.set_limit(2)
    assert queue.take(1) == 1


def test_a_queue_goes_on_with_the_sums_that_its_workers_had():
    workers = [record.WorkerRecord(0, 96, 1, 0.5, 2.0), record.WorkerRecord(1, 192, 2, 1.5, 3.0)]
    queue = batch_queue.BatchQueue(3, workers)
    assert queue.totals() == (3, 288, 2.0)
    assert queue.worker_records() == workers
    queue.set_limit(4)
    assert queue.take(0) == 3


class Killed(BaseException):
    """Ends a worker as a signal does, here: nothing of it runs any more."""


def work(queue, rank, at_line=None):
    """Finishes all the batches that there are, as a worker; calls a function before each line that it executes."""

    def trace(frame, event, argument):
        if frame.f_code.co_filename == batch_queue.__file__:
            if event == "line":
                at_line()
            return trace

    before = sys.gettrace()
    sys.settrace(trace if at_line else before)
    try:
        while queue.take(rank) is not None:
            queue.workers[rank].finish(96, 0.5)
    finally:
        sys.settrace(before)


def test_a_reader_never_sees_steps_images_and_loss_of_different_moments():
    queue, seen = new_queue(2), []
    work(queue, 0, lambda: seen.append(queue.totals()))
    assert [*dict.fromkeys(seen)] == [(0, 0, 0), (1, 96, 0.5), (2, 192, 1.0)]


def test_each_batch_counts_once_wherever_a_worker_is_killed():
    def kill():
        lines.append(None)
        if len(lines) == last:
            raise Killed

    wrong = {}
    for last in itertools.count(1):
        queue, lines = new_queue(2), []
        try:
            work(queue, 0, kill)
        except Killed:
            queue.workers[0].dead = 1
        else:
            break
        work(queue, 1)
        if queue.totals() != (2, 192, 1.0) or not queue.is_drained():
            wrong[last] = queue.totals()
    assert last > 50
    assert wrong == {}


def test_a_clock_of_running_time_counts_a_pause_for_little(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(batch_queue.time, "monotonic", lambda: now[0])
    clock = batch_queue.RunningClock()
    for seconds in (0.5, 65, 0.25):
        now[0] += seconds
        clock.seconds()
    assert clock.seconds() == pytest.approx(0.5 + clock.LONGEST_GAP + 0.25)
    clock.reset()
    assert clock.seconds() == 0


def test_a_worker_that_has_the_lock_for_too_long_is_killed(monkeypatch):
    def lock_for_ever():
        with queue.locked():
            locked.set()
            signal.pause()

    queue, fork = new_queue(1), multiprocessing.get_context("fork")
    locked = fork.Event()
    worker = fork.Process(target=lock_for_ever, daemon=True)
    worker.start()
    assert locked.wait(stages.SECONDS)
    monkeypatch.setattr(batch_queue, "LOCK_SECONDS", 0.1)
    assert queue.take(0) == 0
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
