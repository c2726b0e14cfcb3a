"""Hogwild (Niu et al. 2011): workers that update the same parameters, in shared memory, without locks.

A worker reads the parameters while others write them, so what it reads may be half updated. That is the technique.
For a dense network such as this one no theory says that it converges: train_results.json says how well it did. The
only thing that goes one at a time is the taking of a batch, so that an epoch is one pass over the images.
"""

import contextlib
import ctypes
import fcntl
import math
import os
import signal
import time
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path

import layers
import net
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

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
LOCK_SECONDS = 30  # the lock is held for microseconds, so whoever waits that long waits for a process that hangs
WARM_UP = 0.2  # the part of a training in which the learning rate rises from 0; in the rest it falls to 0


class Row(ctypes.Structure):
    """What one worker tells the others, in shared memory: the batch that it holds (-1: none), and its sums."""

    _fields_ = [
        ("held", ctypes.c_int64),
        ("dead", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("images", ctypes.c_int64),
        ("loss", ctypes.c_double),
        ("waited", ctypes.c_double),
    ]


class Dealer:
    """Deals out batch numbers, each to one worker, from memory that the parent and its workers share.

    Batches are counted through the whole training. Numbers from `next` up to `limit` may be taken; the parent moves
    the limit, and lets the workers run dry by putting it where `next` is.
    """

    def __init__(self, workers):
        self.next, self.limit, self.closed = (RawValue(ctypes.c_int64, 0) for _ in range(3))
        self.rows = RawArray(Row, workers)
        # A record lock of the kernel's: it ends with the process that holds it, however that process ends.
        self.file = os.memfd_create("dealer")

    def resume(self, number, sums):
        """Makes a number the next to be dealt, and the sums those of the workers so far."""
        self.next.value = self.limit.value = number
        for row, known in zip(self.rows, sums, strict=True):
            row.held, row.dead = -1, 0
            row.steps, row.images = known["steps"], known["images"]
            row.loss, row.waited = known["loss_sum"], known["waited_seconds"]

    def totals(self):
        """Of all workers together: steps, images, and the sum of the losses of those images."""
        rows = list(self.rows)
        return sum(row.steps for row in rows), sum(row.images for row in rows), sum(row.loss for row in rows)

    def sums(self):
        """What each worker has done so far, for train_results.json."""
        return [
            {"rank": rank, "images": row.images, "steps": row.steps, "loss_sum": row.loss, "waited_seconds": row.waited}
            for rank, row in enumerate(self.rows)
        ]

    @contextlib.contextmanager
    def locked(self):
        """Keeps the others from taking a batch, for the microseconds that the block takes."""
        deadline = time.monotonic() + LOCK_SECONDS
        while not self.try_lock():
            if time.monotonic() > deadline:
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
        """Hands the worker the number of a batch, or None if there is none at present."""
        with self.locked():
            for row in self.rows:
                if row.dead and row.held >= 0:  # the batch that a worker died over goes to a living one
                    self.rows[rank].held, row.held = row.held, -1
                    return self.rows[rank].held
            if self.next.value == self.limit.value:
                return None
            self.rows[rank].held = self.next.value
            self.next.value += 1
            return self.rows[rank].held

    def deal_up_to(self, limit):
        """Lets the workers take batches up to a number."""
        with self.locked():
            self.limit.value = limit

    def pause(self):
        """Lets the workers finish what they hold and take no more."""
        with self.locked():
            self.limit.value = self.next.value

    def is_dry(self):
        """Whether all that was dealt is done."""
        with self.locked():
            return self.next.value == self.limit.value and all(row.held < 0 for row in self.rows)


class Task:
    """What parent and workers share: the images and labels to train on, the model, the dealer.

    The batches from number `start` to the last epoch's end have one schedule of the learning rate.
    """

    def __init__(self, settings, images, labels, start):
        self.settings, self.images, self.labels = settings, images, labels
        self.per_epoch = math.ceil(len(images) / settings["batch_size"])
        self.start, self.end = start, settings["epochs"] * self.per_epoch
        torch.manual_seed(settings["seed"])
        self.model = net.Net()
        # The parameters become views of one vector in shared memory: a step is then three operations, not 24.
        self.parameters = parameters_to_vector(self.model.parameters()).detach().share_memory_()
        for parameter, view in zip(self.model.parameters(), views(self.parameters, self.model), strict=True):
            parameter.data = view.copy_(parameter.data)
        # Each worker has a velocity of its own, in shared memory only so that the parent can keep it in checkpoints.
        self.velocities = torch.zeros(settings["num_processes"], len(self.parameters)).share_memory_()
        self.dealer = Dealer(settings["num_processes"])
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
        self.row = task.dealer.rows[rank]
        self.parent = os.getpid()

    def run(self):
        """Trains on one batch after another until there are no more: the whole life of the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the parent gets it too, and ends its workers in order
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
        while (number := self.task.dealer.take(self.rank)) is None:
            if self.task.dealer.closed.value or os.getppid() != self.parent:
                return None
            time.sleep(0.001)
        self.row.waited += time.monotonic() - began
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
        self.row.steps += 1
        self.row.images += len(images)
        self.row.loss += loss.item() * len(images)
        self.row.held = -1
