"""hogwild.py, the technique: how batches are dealt out, what the learning rate does, how images are augmented."""

import itertools
import multiprocessing
import sys

import hogwild
import net
import pytest
import torch
from plan import SETTINGS

DEFAULTS = {name: default for name, (_, default, _, _) in SETTINGS.items()}


@pytest.fixture
def queue():
    """One that has ten batches for two workers."""
    queue = hogwild.BatchQueue(2)
    queue.resume(0, queue.per_worker())
    queue.set_limit(10)
    return queue


@pytest.fixture
def x():
    """A batch of noise, as the network gets it."""
    return net.to_input(torch.randint(256, (5, 28, 28), dtype=torch.uint8))


def test_a_batch_is_dealt_once(queue):
    assert [queue.take(rank) for rank in (0, 1, 0, 0, 1)] == [0, 1, 2, 3, 4]


def test_the_batch_of_a_dead_worker_goes_to_a_living_one_before_any_other(queue):
    assert [queue.take(0), queue.take(1)] == [0, 1]
    queue.workers[0].dead = 1
    assert [queue.take(1), queue.take(1)] == [0, 2]


def test_after_a_pause_nothing_is_dealt_before_the_limit_is_moved(queue):
    assert queue.take(0) == 0
    queue.pause()
    assert queue.take(1) is None
    assert not queue.is_drained()
    queue.workers[0].finish(96, 1.0)
    assert queue.is_drained()
    queue.set_limit(2)
    assert queue.take(1) == 1


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    images, labels = torch.zeros(960, 28, 28, dtype=torch.uint8), torch.zeros(960, dtype=torch.int64)
    task = hogwild.Task(DEFAULTS | {"epochs": 100}, images, labels, 0)
    rates = [task.learning_rate(number) for number in range(task.end)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[0] < DEFAULTS["lr"] / 100
    assert 0 < rates[-1] < DEFAULTS["lr"] / 100
    assert max(rates) == pytest.approx(DEFAULTS["lr"], rel=0.01)


@pytest.mark.parametrize(("longest", "expected"), [(0.01, 0.01), (0.02, 0.02), (1e6, None)])
def test_a_gradient_is_cut_to_the_greatest_length_there_is(monkeypatch, longest, expected):
    monkeypatch.setattr(hogwild, "WEIGHT_DECAY", 0)
    monkeypatch.setattr(hogwild, "LARGEST_GRADIENT", longest)
    images, labels = torch.randint(256, (960, 28, 28), dtype=torch.uint8), torch.randint(10, (960,))
    task = hogwild.Task(DEFAULTS | {"momentum": 0.0}, images, labels, 0)
    before = task.parameters.clone()
    worker = hogwild.Worker(0, task, errors=None)
    worker.own_gradient()
    worker.train_batch(50)
    length = (task.parameters - before).norm().item() / task.learning_rate(50)
    assert length == pytest.approx(expected, rel=0.01) if expected else length > 0.1


def test_an_augmentation_by_nothing_leaves_the_images_as_they_are(x, monkeypatch):
    for name in ("ROTATION", "SCALING", "SHIFT"):
        monkeypatch.setattr(hogwild, name, 0)
    assert torch.allclose(hogwild.augment(x), x, atol=1e-4)


def test_a_shift_moves_whole_images(x, monkeypatch):
    for name, strength in (("ROTATION", 0), ("SCALING", 0), ("SHIFT", 2 / 28)):  # a pixel at most
        monkeypatch.setattr(hogwild, name, strength)
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.ones(shape))  # of what is random: the most there can be
    assert torch.allclose(hogwild.augment(x)[:, :, :-1, :-1], x[:, :, 1:, 1:], atol=1e-4)


def test_every_image_is_augmented_by_itself_and_a_seed_repeats_it(x):
    same = x[:1].expand(2, 1, 28, 28).contiguous()
    torch.manual_seed(1)
    one = hogwild.augment(same)
    assert not torch.allclose(one[0], one[1], atol=0.1)
    torch.manual_seed(1)
    assert torch.equal(hogwild.augment(same), one)


# Sums that are right at any moment ------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a worker as a signal does, here: nothing of it runs any more."""


def two_batches():
    """A task of two batches of 96 images for two workers, ready to be trained on."""
    images, labels = torch.randint(256, (192, 28, 28), dtype=torch.uint8), torch.randint(10, (192,))
    task = hogwild.Task(DEFAULTS | {"epochs": 1}, images, labels, 0)
    task.dealer.resume(0, task.dealer.sums())
    task.dealer.deal_up_to(2)
    return task


def work(task, rank, at_line=None):
    """Trains on all the batches that there are, as a worker; calls a function before each line that it executes."""

    def trace(frame, event, argument):
        if frame.f_code.co_filename == hogwild.__file__:
            if event == "line":
                at_line()
            return trace

    worker = hogwild.Worker(rank, task, errors=None)
    worker.own_gradient()
    before = sys.gettrace()
    sys.settrace(trace if at_line else before)
    try:
        while (number := task.dealer.take(rank)) is not None:
            worker.train_batch(number)
    finally:
        sys.settrace(before)


def test_a_reader_never_sees_steps_images_and_loss_of_different_moments():
    task, seen = two_batches(), set()
    ours, theirs = multiprocessing.Pipe()

    def read():
        while theirs.recv():
            theirs.send(task.dealer.totals())

    def ask():
        """Has the reader read; it may wait as long as the worker holds a lock, and answers later then."""
        if not waiting:
            ours.send(True)
            waiting.append(True)
        if ours.poll(0.05):
            seen.add(ours.recv())
            waiting.clear()

    waiting = []
    reader = multiprocessing.get_context("fork").Process(target=read, daemon=True)
    reader.start()
    try:
        work(task, 0, ask)
    finally:
        reader.kill()
        reader.join()
    assert {(steps, images) for steps, images, _ in seen} <= {(steps, 96 * steps) for steps in range(3)}
    assert len({steps for steps, _, _ in seen}) == len(seen)  # of so many steps there is only one sum of losses


def test_each_batch_counts_once_wherever_in_its_step_a_worker_is_killed():
    def kill():
        lines.append(None)
        if len(lines) == last:
            raise Killed

    wrong = {}
    for last in itertools.count(1):
        task, lines = two_batches(), []
        try:
            work(task, 0, kill)
        except Killed:
            task.dealer.rows[0].dead = 1
        else:
            break
        work(task, 1)
        if (counted := task.dealer.totals()[:2]) != (2, 192):
            wrong[last] = counted
    assert last > 10
    assert wrong == {}


# Pauses ---------------------------------------------------------------------------------------------------------------


def test_a_clock_of_running_time_counts_a_pause_for_little(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(hogwild.time, "monotonic", lambda: now[0])
    clock = hogwild.RunningClock()
    for seconds in (0.5, 65, 0.25):
        now[0] += seconds
        clock.seconds()
    assert clock.seconds() == pytest.approx(0.5 + hogwild.RunningClock.LONGEST_GAP + 0.25)
