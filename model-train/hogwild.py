"""Hogwild (Niu et al. 2011): workers that update the same parameters, in shared memory, without locks.

A worker reads the parameters while others write them, so what it reads may be half updated. That is the technique.
For a dense network such as this one no theory says that it converges: train_results.json says how well it did. The
only thing that goes one at a time is the taking of a batch, so that an epoch is one pass over the images.
"""

import contextlib
import ctypes
import fcntl
import math
import mmap
import os
import signal
import time
from pathlib import Path

import layers
import net
import torch
import torch.nn.functional as F
from artifacts import STOP_SIGNALS

# One thread a process. And a parent that has run OpenMP's threads may not fork: its children would hang in them.
torch.set_num_threads(1)


def has_fast_bfloat16():
    """Whether the CPU multiplies bfloat16 matrices faster than float32, by what the kernel says of it.

    Intel's do with AMX only, AMD's with AVX-512 BF16. An Intel Xeon whose AMX was hidden took a quarter longer with it.
    """
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "amx_bf16" in words or ("avx512_bf16" in words and "AuthenticAMD" in words)


# The type of the convolutions; all that is kept is float32.
PRECISION = torch.bfloat16 if has_fast_bfloat16() else torch.float32
WEIGHT_DECAY = 7e-4
# A longer gradient is cut to this. Without, one in ten trainings of an epoch came to nothing, and most with 4 workers.
LARGEST_GRADIENT = 2.0
ROTATION, SCALING, SHIFT = 0.2, 0.1, 0.1  # at most: radians, part of the size, half widths of the image
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOCK_SECONDS = 30  # the lock is held for microseconds, so whoever waits that long waits for a process that hangs
WARM_UP = 0.2  # the part of a training in which the learning rate rises from 0; in the rest it falls to 0


class RunningClock:
    """Measures time in which this process could run.

    A paused container, a stopped process group or a sleeping laptop shows as one long gap between two looks at the
    clock, and counts as no more than LONGEST_GAP.
    """

    LONGEST_GAP = 1.0  # seconds

    def __init__(self):
        self.elapsed, self.last_look = 0.0, time.monotonic()

    def seconds(self):
        """The seconds since the clock was made or reset; it is to be looked at many times a second."""
        now = time.monotonic()
        self.elapsed, self.last_look = self.elapsed + min(now - self.last_look, self.LONGEST_GAP), now
        return self.elapsed

    def reset(self):
        """Starts again from 0."""
        self.elapsed, self.last_look = 0.0, time.monotonic()


class Totals(ctypes.Structure):
    """What a worker has done: steps, images, the sum of their losses."""

    _fields_ = [("steps", ctypes.c_int64), ("images", ctypes.c_int64), ("loss_sum", ctypes.c_double)]


class WorkerState(ctypes.Structure):
    """What one worker tells the others, in shared memory.

    It has a batch in hand, `current_batch`, while it has taken more batches than it has finished. To finish one, it
    writes its new totals beside the old ones and then counts `finished` up: that one store makes the new totals the
    valid ones and says that the batch is done. So a batch whose worker is killed is counted exactly once, by whoever
    does it in the end. What remains possible: a worker killed between the update of the parameters and that store has
    its batch applied a second time, in whole or in part.
    """

    _fields_ = [
        ("current_batch", ctypes.c_int64),
        ("taken", ctypes.c_int64),
        ("finished", ctypes.c_int64),
        ("dead", ctypes.c_int64),
        ("waited_seconds", ctypes.c_double),
        ("totals", Totals * 2),
    ]

    def is_busy(self):
        """Whether it has a batch in hand."""
        return self.taken > self.finished

    def finish(self, images, loss_sum):
        """Counts the batch in hand as done."""
        old, new = self.totals[self.finished % 2], self.totals[(self.finished + 1) % 2]
        new.steps, new.images, new.loss_sum = old.steps + 1, old.images + images, old.loss_sum + loss_sum
        self.finished += 1

    def read_totals(self):
        """Steps, images and loss sum of one moment, even while the worker finishes batches."""
        while True:
            finished = self.finished
            totals = self.totals[finished % 2]
            copy = totals.steps, totals.images, totals.loss_sum
            if self.finished == finished:
                return copy


class BatchQueue:
    """Hands out batch numbers, each to one worker, from memory that the parent and its workers share.

    Batches are counted through the whole training. Numbers from `next` up to `limit` may be taken; the parent moves
    the limit, and drains the queue by putting it where `next` is.
    """

    def __init__(self, workers):
        self.next, self.limit, self.closed = (ctypes.c_int64.from_buffer(mmap.mmap(-1, 8)) for _ in range(3))
        self.workers = (WorkerState * workers).from_buffer(mmap.mmap(-1, ctypes.sizeof(WorkerState) * workers))
        # A record lock of the kernel's: it ends with the process that holds it, however that process ends.
        self.file = os.memfd_create("queue")

    def resume(self, number, workers):
        """Makes a number the next to be handed out, and the totals those of the workers so far."""
        self.next.value = self.limit.value = number
        for state, known in zip(self.workers, workers, strict=True):
            state.totals[0] = known["steps"], known["images"], known["loss_sum"]
            state.waited_seconds = known["waited_seconds"]

    def totals(self):
        """Of all workers together: steps, images, and the sum of the losses of those images."""
        return tuple(map(sum, zip(*[state.read_totals() for state in self.workers], strict=True)))

    def per_worker(self):
        """What each worker has done so far, for train_results.json."""
        rows = []
        for rank, state in enumerate(self.workers):
            steps, images, loss_sum = state.read_totals()
            rows.append({"rank": rank, "images": images, "steps": steps, "loss_sum": loss_sum})
            rows[-1]["waited_seconds"] = state.waited_seconds
        return rows

    @contextlib.contextmanager
    def locked(self):
        """Keeps the others from taking a batch, for the microseconds that the block takes."""
        clock = RunningClock()
        while not self.try_lock():
            if clock.seconds() > LOCK_SECONDS:
                raise TimeoutError(f"a process has kept the others from taking a batch for {LOCK_SECONDS} s")
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN)

    def try_lock(self):
        """Takes the lock if no other process has it; says whether it did."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def take(self, rank):
        """Hands the worker the number of a batch, or None if there is none at present.

        The worker has it in hand before anybody gives it up, so that a kill in between loses no batch.
        """
        with self.locked():
            self.skip_taken()  # a kill may have come before the worker did it
            number = self.first_available()
            if number is None:
                return None
            state = self.workers[rank]
            state.current_batch = number
            state.taken = state.finished + 1
            self.skip_taken()
            for other in self.workers:
                if other.dead and other.is_busy() and other.current_batch == number:
                    other.taken = other.finished
            return number

    def skip_taken(self):
        """Moves `next` behind every batch that a worker is busy with."""
        taken = [state.current_batch + 1 for state in self.workers if state.is_busy()]
        self.next.value = max(self.next.value, *taken) if taken else self.next.value

    def first_available(self):
        """The number of a batch that a dead worker had in hand, else the next one up to the limit, else None."""
        for state in self.workers:
            if state.dead and state.is_busy():
                return state.current_batch
        return self.next.value if self.next.value < self.limit.value else None

    def set_limit(self, limit):
        """Lets the workers take batches up to a number."""
        with self.locked():
            self.limit.value = limit

    def pause(self):
        """Lets the workers finish what they have in hand and take no more."""
        with self.locked():
            self.limit.value = self.next.value

    def is_drained(self):
        """Whether all that was handed out is done."""
        with self.locked():
            return self.next.value >= self.limit.value and not any(state.is_busy() for state in self.workers)


class Task:
    """What parent and workers share: the images and labels to train on, the model, the queue.

    The batches from number `start` to the last epoch's end have one schedule of the learning rate.
    """

    def __init__(self, settings, images, labels, start):
        self.settings, self.images, self.labels = settings, images, labels
        self.per_epoch = math.ceil(len(images) / settings["batch_size"])
        self.start, self.end = start, settings["epochs"] * self.per_epoch
        torch.manual_seed(settings["seed"])
        self.model = net.Net()
        # The parameters become views of one vector in shared memory: a step is then three operations, not 24.
        self.parameters = shared_zeros(sum(parameter.numel() for parameter in self.model.parameters()))
        for parameter, view in zip(self.model.parameters(), views(self.parameters, self.model), strict=True):
            parameter.data = view.copy_(parameter.data)
        # Each worker has a velocity of its own, in shared memory only so that the parent can keep it in checkpoints.
        self.velocities = shared_zeros(settings["num_processes"], len(self.parameters))
        self.queue = BatchQueue(settings["num_processes"])
        self.order = None, None

    def batch(self, number):
        """The images, uint8 [N, 28, 28], and labels, int64 [N], of a batch."""
        epoch, place = divmod(number, self.per_epoch)
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed_of(-epoch))
            self.order = epoch, torch.randperm(len(self.images), generator=generator)
        size = self.settings["batch_size"]
        chosen = self.order[1][place * size : (place + 1) * size]
        return self.images[chosen], self.labels[chosen]

    def seed_of(self, number):
        """A seed in the 32 bits that torch's generator takes in: of a batch, by its number, or an epoch, negative."""
        return (self.settings["seed"] * 0x9E3779B1 + number) % 2**32

    def learning_rate(self, number):
        """The learning rate of a batch: linearly up to its peak, then linearly down to 0."""
        progress = (number + 0.5 - self.start) / (self.end - self.start)
        return self.settings["lr"] * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def shared_zeros(*shape):
    """A float32 tensor in memory that forked processes share; unlike share_memory_(), it needs no file in /dev/shm."""
    return torch.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), dtype=torch.float32).view(shape)


def views(vector, model):
    """Views of the parts of a vector, float32 [21,840], in the shapes of the model's parameters."""
    for parameter, part in zip(model.parameters(), vector.split([p.numel() for p in model.parameters()]), strict=True):
        yield part.view_as(parameter)


CENTRES = (torch.arange(28) * 2 + 1) / 28 - 1  # of a row's pixels, from -1 to 1
PLACES = torch.stack([CENTRES.repeat(28), CENTRES.repeat_interleave(28), torch.ones(28 * 28)])  # x, y, 1 of each pixel


def augment(x):
    """Turns, scales and shifts each image of a batch a little, at random: float32 [N, 1, 28, 28] -> the same."""
    angle, widen, lengthen, right, down = torch.rand(5, len(x)).mul_(2).sub_(1)
    angle, widen, lengthen = ROTATION * angle, 1 + SCALING * widen, 1 + SCALING * lengthen
    rows = [widen * angle.cos(), -angle.sin(), SHIFT * right, angle.sin(), lengthen * angle.cos(), SHIFT * down]
    # As affine_grid() does it, but one product of matrices for the whole batch: half the time.
    grid = (torch.stack(rows, 1).view(-1, 3) @ PLACES).view(-1, 2, 28, 28).permute(0, 2, 3, 1)
    # The border is what lies beyond it: after normalising, 0 would be grey.
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class Worker:
    """One of the processes that train."""

    def __init__(self, rank, task, errors):
        self.rank, self.task, self.errors = rank, task, errors
        self.state = task.queue.workers[rank]
        self.parent = os.getpid()

    def run(self):
        """Trains on one batch after another until there are no more: the whole life of the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the parent gets it too, and ends its workers in order
        # A worker must not outlive its parent: it would go on to hold the volume's lock.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            self.own_gradient()
            while (number := self.next_batch()) is not None:
                self.train_batch(number)
        except Exception as error:
            message = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            os.write(self.errors, f"{message}\n".encode())
            os._exit(1)

    def own_gradient(self):
        """Makes one flat gradient, of which each parameter's .grad is a view, as parameters are of their vector."""
        self.gradient = torch.zeros_like(self.task.parameters)
        for parameter, view in zip(self.task.model.parameters(), views(self.gradient, self.task.model), strict=True):
            parameter.grad = view

    def next_batch(self):
        """Waits for the number of a batch; None when the training is over or the parent is gone."""
        began = time.monotonic()
        while (number := self.task.queue.take(self.rank)) is None:
            if self.task.queue.closed.value or os.getppid() != self.parent:
                return None
            time.sleep(0.001)
        self.state.waited_seconds += time.monotonic() - began
        return number

    def train_batch(self, number):
        """One step of SGD, on parameters that the other workers read and write meanwhile."""
        task = self.task
        images, labels = task.batch(number)
        # What is random depends on the batch, not on who has it. (torch.manual_seed() would take 70 us.)
        torch.default_generator.manual_seed(task.seed_of(number))
        x = augment(net.to_input(images))
        self.gradient.zero_()
        loss = F.nll_loss(layers.forward(task.model, x, PRECISION), labels)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise ArithmeticError(f"the loss is {loss.item()} at batch {number}")
        self.gradient.mul_(LARGEST_GRADIENT / max(LARGEST_GRADIENT, self.gradient.norm().item()))
        self.gradient.add_(task.parameters, alpha=WEIGHT_DECAY)
        velocity = task.velocities[self.rank].mul_(task.settings["momentum"]).add_(self.gradient)
        task.parameters.sub_(velocity, alpha=task.learning_rate(number))
        self.state.finish(len(images), loss.item() * len(images))
