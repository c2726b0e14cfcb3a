"""workers.py: each batch is handed out once and counted once, whichever worker is killed at any moment."""

import itertools
import os
import signal
import sys
import time
from functools import partial

import pytest
import torch

import hogwild
from stage.process import Failure
from training import record, stopping, workers
from training.settings import Settings


class FakeTrainer:
    """Takes the place of a worker's trainer: does what a test wants done, a function of rank and batch."""

    def __init__(self, rank, shared, do):
        self.rank, self.do = rank, do

    def train_batch(self, number):
        self.do(self.rank, number)
        return 96, 0.5


@pytest.fixture
def new_workers(monkeypatch):
    """A function that makes workers, whose training is faked, and their record."""

    def make(do=lambda rank, number: None, trainer=FakeTrainer, count=2, node=0, nodes=1, **changes):
        monkeypatch.setattr(workers, "Trainer", partial(trainer, do=do))
        new = record.Record.new(Settings(num_processes=count, **changes), 960, {})
        shared = hogwild.SharedState(new, torch.zeros(960, 28, 28, dtype=torch.uint8), torch.zeros(960).long())
        return workers.Workers(shared, new, stopping.StopRequest(), node, nodes), new

    return make


def finish(pool, limit):
    """Has all batches below the limit trained on."""
    while pool.poll(limit):
        pass


@pytest.mark.parametrize(("node", "nodes", "limit"), [(0, 1, 50), (3, 4, 40)])
def test_each_batch_of_a_share_is_trained_on_once(new_workers, tmp_path, node, nodes, limit):
    def note(worker, number):
        (tmp_path / f"{number}-{worker}").touch()

    pool, done = new_workers(note, node=node, nodes=nodes)
    with pool:
        finish(pool, limit)
    numbers = sorted(int(path.name.split("-")[0]) for path in tmp_path.iterdir())
    assert numbers == [*range(node, limit, nodes)]
    assert done.totals() == (len(numbers), 96 * len(numbers), 0.5 * len(numbers))


def test_few_batches_are_shared_out_evenly(new_workers):
    pool, done = new_workers(count=3)
    with pool:
        finish(pool, 6)
    assert [worker.steps for worker in done.workers] == [2, 2, 2]


@pytest.mark.parametrize(("batch_size", "ahead"), [(1, 6), (96, 6), (200, 3), (10_000, 2)])
def test_a_worker_has_a_few_batches_ahead_and_no_more_when_they_are_large(new_workers, batch_size, ahead):
    pool, _ = new_workers(lambda rank, number: time.sleep(60), batch_size=batch_size)
    with pool:
        pool.poll(1_000)
        assert [len(worker.sent) for worker in pool.living] == [ahead, ahead]
        assert pool.next_to_send == 2 * ahead
        for worker in pool.living:
            worker.process.kill()


def test_to_pause_is_to_hand_out_no_more_and_to_wait(new_workers):
    pool, done = new_workers()
    with pool:
        pool.poll(1_000_000)
        finish(pool, pool.next_to_send)
        assert done.totals()[0] == pool.next_to_send
        finish(pool, pool.next_to_send + 5)
    assert done.totals()[0] == pool.next_to_send


class KillAtLine(FakeTrainer):
    """Worker 0 is killed before it executes a line of workers.py, counted from its first batch."""

    def __init__(self, rank, shared, do, line):
        super().__init__(rank, shared, do)
        if rank == 0:
            self.lines, self.line = itertools.count(1), line
            sys.settrace(self.trace)
            sys._getframe(1).f_trace = self.trace

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename == workers.__file__ and event == "line" and next(self.lines) == self.line:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.trace


def test_each_batch_counts_once_wherever_a_worker_is_killed(new_workers):
    outcomes = {}
    for line in itertools.count(1):
        pool, done = new_workers(trainer=partial(KillAtLine, line=line))
        with pool:
            finish(pool, 10)
        if not done.lost_workers:
            break
        outcomes[line] = done.totals(), len(pool.returned), len(done.lost_workers)
    assert len(outcomes) > 20
    assert {*outcomes.values()} == {((10, 960, 5.0), 0, 1)}


def test_the_batches_of_a_killed_worker_go_to_the_others_before_any_other(new_workers, tmp_path, capsys):
    def train(rank, number):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / str(number)).touch()
        time.sleep(0.01)

    pool, done = new_workers(train)
    with pool:
        finish(pool, 40)
    assert done.totals()[0] == 40
    order = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [int(path.name) for path in order].index(0) < 15
    assert done.lost_workers == [record.LostWorker(0, signal.SIGKILL, 0)]
    assert "killed by SIGKILL; its batches 0, " in capsys.readouterr().out


def test_when_two_workers_fail_one_says_why_and_the_other_is_silent(new_workers, capfd):
    def fail(rank, number):
        time.sleep(0.3 * rank)
        raise ValueError("wrong")

    pool, _ = new_workers(fail)
    with pool, pytest.raises(Failure, match="worker 0 failed: ValueError: wrong"):
        finish(pool, 40)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ValueError(1000 * "\N{GRINNING FACE}"), "\N{GRINNING FACE}. Fix the cause"),
        (ArithmeticError("the loss is nan"), "nan. Try a smaller --lr.*--fresh --epochs 3"),
    ],
)
def test_an_error_in_a_worker_of_any_length_ends_in_advice_that_is_about_it(new_workers, error, hint):
    def fail(rank, number):
        raise error

    pool, _ = new_workers(fail, epochs=3)
    with pool, pytest.raises(Failure, match=hint):
        finish(pool, 40)


def test_a_worker_that_stands_still_is_killed_and_its_batches_redone(new_workers, monkeypatch):
    def train(rank, number):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(workers, "HANG_SECONDS", 0.2)
    pool, done = new_workers(train)
    with pool:
        finish(pool, 40)
    assert done.totals()[0] == 40
    assert [lost.signal for lost in done.lost_workers] == [signal.SIGKILL]


def test_the_message_of_a_killed_worker_says_what_becomes_of_its_batches():
    assert workers.killed_message(1, signal.SIGKILL, []) == "worker 1 was killed by SIGKILL while idle"
    assert workers.killed_message(1, signal.SIGKILL, [7]).endswith(" killed by SIGKILL; its batch 7 will be redone")


def test_a_clock_of_running_time_counts_a_pause_for_little(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    clock = stopping.RunningClock()
    for seconds in (0.5, 65, 0.25):
        now[0] += seconds
        clock.seconds()
    assert clock.seconds() == pytest.approx(0.5 + clock.LONGEST_GAP + 0.25)
