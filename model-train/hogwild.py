"""Hogwild (Niu et al. 2011): workers update the same parameters, in shared memory, without locks.

A worker reads the parameters while others write them, so it may see a half-updated vector; Hogwild accepts that. No
theory guarantees that it converges for a dense network such as this one; the accuracy it reached is in
train_results.json.

SharedState is what the parent and its workers share. Trainer.train_batch() is the step of a worker: gather and augment
the images of a batch, compute the gradient (layers.py, or autograd), update the shared parameters.
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import layers
import net
from augmentation import augment
from stage import dataset
from training.record import Record

# One thread per process, set before the fork: children of a process that has used OpenMP threads deadlock.
torch.set_num_threads(1)

WARMUP_FRACTION = 0.2  # part of the schedule in which the learning rate rises from 0; in the rest it falls to 0


def has_fast_bfloat16() -> bool:
    """Return whether, going by /proc/cpuinfo, the CPU multiplies bfloat16 matrices faster than float32 ones.

    That is true of Intel's CPUs with AMX and of AMD's with AVX-512 BF16. On an Intel Xeon with AMX disabled, a step
    in bfloat16 took 1.7 times as long.
    """
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "amx_bf16" in words or ("avx512_bf16" in words and "AuthenticAMD" in words)


# What a worker keeps from step to step, of the parameters' size each, by the names that checkpoints have for it.
OPTIMIZER_STATE = ("velocities",)
# The dtype of the convolutions. Parameters, velocities and everything that is saved are float32.
PRECISION = torch.bfloat16 if has_fast_bfloat16() else torch.float32


class SharedState:
    """What the parent and its workers share: training images and labels, model, optimizer state."""

    def __init__(self, record: Record, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.settings, self.images, self.labels = record.settings, images, labels
        self.batches_per_epoch = dataset.batches_per_epoch(self.settings.batch_size, len(images))
        # The learning rate's schedule covers the batches in [schedule_start, schedule_end). It starts at 0, or where
        # a finished training was continued.
        self.schedule_start = record.start
        self.schedule_end = self.settings.epochs * self.batches_per_epoch
        self.peak_lr = self.settings.lr  # higher with several nodes (cluster/nodes.py)
        torch.manual_seed(self.settings.seed)
        self.model = net.Net(self.settings.dropout)
        sample = net.to_input(images[:24]), labels[:24]
        self.uses_layers = not self.settings.dropout and layers.is_network_of(self.model, *sample)
        # The parameters are views of one vector in shared memory: one call updates them all.
        self.parameters = shared_zeros(sum(parameter.numel() for parameter in self.model.parameters()))
        for parameter, view in zip(self.model.parameters(), parameter_views(self.parameters, self.model), strict=True):
            parameter.data = view.copy_(parameter.data)
        # Each worker has its own, shared only so that the parent can checkpoint it.
        size = self.settings.num_processes, len(self.parameters)
        self.optimizer_state = {name: shared_zeros(*size) for name in OPTIMIZER_STATE}
        # For --averaging: of each worker, the sum of the parameters after its last batches, and the number of summands.
        self.parameter_sums = shared_zeros(self.settings.num_processes, len(self.parameters) + 1)

    def part_of_schedule(self, number: int) -> float:
        """Return how much of the schedule is over in the middle of a batch, between 0 and 1."""
        return (number + 0.5 - self.schedule_start) / (self.schedule_end - self.schedule_start)

    def is_averaged(self, number: int) -> bool:
        """Return whether the parameters after a batch are averaged: those after the last batches of the schedule."""
        return self.part_of_schedule(number) > 1 - self.settings.averaging

    def load_mean(self, total: torch.Tensor) -> None:
        """Replace the parameters by their mean over the last batches, from the total of the sums, if there is any.

        Stochastic weight averaging (Izmailov et al. 2018), though over batches, not epochs.
        """
        self.parameter_sums.zero_()[0].copy_(total)
        if total[-1] > 0:
            self.parameters.copy_(total[:-1] / total[-1])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict, with copies: torch.save() would write the whole vector with each view."""
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def shared_zeros(*shape: int) -> torch.Tensor:
    """Return a float32 tensor that forked processes share, without the file in /dev/shm that share_memory_() makes."""
    return torch.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), dtype=torch.float32).view(shape)


def parameter_views(vector: torch.Tensor, model: net.Net) -> Iterator[torch.Tensor]:
    """Yield views of the parts of a vector, float32 [P], in the shapes of the model's parameters."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    for parameter, part in zip(model.parameters(), torch.split(vector, sizes), strict=True):
        yield part.view_as(parameter)


class Trainer:
    """What a worker does with a batch."""

    def __init__(self, rank: int, shared: SharedState) -> None:
        self.shared, self.settings = shared, shared.settings
        self.velocity, self.own_sum = shared.optimizer_state["velocities"][rank], shared.parameter_sums[rank]
        self.permutation_epoch, self.permutation = -1, torch.empty(0)

    def train_batch(self, number: int) -> tuple[int, float]:
        """Do one step of SGD on a batch; return the number of images and the sum of their losses.

        Other workers read and update the parameters at the same time.
        """
        shared, settings = self.shared, self.settings
        images, labels = self.load_batch(number)
        # Randomness depends on the batch, not on the worker. (This call takes 70 us less than torch.manual_seed(),
        # which seeds the generators of all devices.)
        torch.default_generator.manual_seed(self.seed_of(number))
        x = augment(net.to_input(images), settings.augmentation)
        loss, gradient = self.loss_and_gradient(x, labels)
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss} at batch {number}")
        # Gradient clipping. Without it, 1 in 10 one-epoch runs with 2 workers diverged, and most with 4.
        gradient.mul_(settings.max_grad_norm / max(settings.max_grad_norm, gradient.norm().item()))
        gradient.add_(shared.parameters, alpha=settings.weight_decay)
        self.velocity.mul_(settings.momentum).add_(gradient)
        shared.parameters.sub_(self.velocity, alpha=self.learning_rate(number))
        if shared.is_averaged(number):
            self.own_sum[:-1].add_(shared.parameters)
            self.own_sum[-1:].add_(1)
        return len(images), loss * len(images)

    def load_batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images, uint8 [N, H, W (, C)], and labels, int64 [N], of a batch in the epoch's permutation."""
        epoch, place = divmod(number, self.shared.batches_per_epoch)
        if self.permutation_epoch != epoch:
            generator = torch.Generator().manual_seed(self.seed_of(-epoch))
            self.permutation = torch.randperm(len(self.shared.images), generator=generator)
            self.permutation_epoch = epoch
        chosen = self.permutation[place * self.settings.batch_size : (place + 1) * self.settings.batch_size]
        return self.shared.images.index_select(0, chosen), self.shared.labels.index_select(0, chosen)

    def seed_of(self, number: int) -> int:
        """Return a 32-bit seed for a batch number, or for an epoch number, negated.

        Epoch 0 and batch 0 share a seed, which does no harm: one draws a permutation, the other an augmentation. The
        factor (2**32 divided by the golden ratio) keeps the seeds of runs with consecutive settings.seed far apart.
        """
        return (self.settings.seed * 0x9E3779B1 + number) % 2**32

    def loss_and_gradient(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return the mean loss of a batch and its gradient, float32 [P], from layers.py or from autograd."""
        model = self.shared.model
        if self.shared.uses_layers:
            loss, gradients = layers.loss_and_gradients(model, x, labels, PRECISION)
        else:
            loss = F.nll_loss(model.train().forward(x), labels)
            gradients = [*torch.autograd.grad(loss, list(model.parameters()))]
        return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])

    def learning_rate(self, number: int) -> float:
        """Return the learning rate of a batch: constant, or linearly up to its peak, then linearly down to 0.

        While batches are averaged it stays as it is: their parameters must differ for their mean to be better.
        """
        if self.settings.schedule == "constant":
            return self.shared.peak_lr
        progress = self.shared.part_of_schedule(number)
        remaining = max(1 - progress, self.settings.averaging)
        return self.shared.peak_lr * min(progress / WARMUP_FRACTION, remaining / (1 - WARMUP_FRACTION))
