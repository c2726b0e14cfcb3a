"""Checks, in 0.03 s, before anything is written, that a training with this net.py and this data can be finished."""

import contextlib
import copy
import io
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from msgspec.structs import replace

import net
from hogwild import SharedState, Trainer
from stage import weights
from stage.dataset import DATA_SET
from stage.files import CHECKPOINT, WEIGHTS
from stage.process import Failure
from training.checkpoint import parse_checkpoint, restore, serialize
from training.record import Record

CLASSES = len(DATA_SET.classes)


@contextlib.contextmanager
def blaming_net(what: str) -> Iterator[None]:
    """Turn an exception in the block into a Failure that names net.py and what does not work."""
    try:
        yield
    except Exception as error:  # it comes from what the user has written
        text = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        raise Failure(f"net.py: {what}: {text.splitlines()[0]}") from None


def count_parameters(dropout: float) -> int:
    """Return the number of the network's parameters. Raise Failure if it cannot be made, or has buffers."""
    with blaming_net(f"Net(dropout={dropout}) cannot be made"):
        model = net.Net(dropout)
    for name, _ in model.named_buffers():
        hint = "Instead of batch normalisation, use group normalisation (nn.GroupNorm)"
        raise Failure(f"net.py: the network has a buffer, {name}, but workers share parameters only. {hint}")
    return sum(parameter.numel() for parameter in model.parameters())


def check_training(record: Record, shared: SharedState) -> None:
    """Run all checks of a training that is about to start, with the initial weights and a few images."""
    check_labels(shared.labels)
    check_outputs(shared.model, shared.images[:8])
    check_step(shared, net.to_input(shared.images[:8]), shared.labels[:8])
    check_files(record, shared)


def check_labels(labels: torch.Tensor) -> None:
    """Raise Failure unless the labels, int64 [N], are numbers of the data set's classes."""
    low, high = (int(label) for label in labels.aminmax())
    if low < 0 or high >= CLASSES:
        what = f"labels go from {low} to {high}, but DATA_SET has {CLASSES} classes, from 0 to {CLASSES - 1}"
        raise Failure(f"stage/dataset.py: {what}")


def check_outputs(model: net.Net, images: torch.Tensor) -> None:
    """Raise Failure unless the network predicts log-probabilities of all classes, those of its logits()."""
    with blaming_net(f"prediction of images {[*images.shape[1:]]} fails"), torch.inference_mode():
        log_probabilities, logits = net.predict(model, images), model.logits(net.to_input(images))
        if logits.shape != (len(images), CLASSES):
            raise Failure(f"logits() returns {[*logits.shape]} for {len(images)}, but DATA_SET has {CLASSES} classes")
        if not torch.allclose(log_probabilities, F.log_softmax(logits, dim=1), rtol=1e-3, atol=1e-3):
            raise Failure("forward() must return F.log_softmax(self.logits(x), dim=1), and that must be finite")


def check_step(shared: SharedState, x: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise Failure unless a batch gives a finite loss and gradient, and --dropout has an effect."""
    with blaming_net("a training step fails"):
        loss, gradient = Trainer(0, shared).loss_and_gradient(x, labels)
        if not (math.isfinite(loss) and gradient.isfinite().all()):
            raise Failure(f"the loss is {loss}, or its gradient is not finite")
        if shared.settings.dropout and shared.model.train()(x).equal(shared.model(x)):
            raise Failure("--dropout has no effect, since the network has no dropout")


def check_files(record: Record, shared: SharedState) -> None:
    """Raise Failure unless the model and a checkpoint, of one worker, can be read by what reads them later."""
    one_worker, model_file = copy.copy(shared), io.BytesIO()
    one_worker.parameter_sums = shared.parameter_sums[:1].clone()
    one_worker.optimizer_state = {name: state[:1].clone() for name, state in shared.optimizer_state.items()}
    its_record = replace(record, workers=record.workers[:1], settings=replace(record.settings, num_processes=1))
    with blaming_net("what is saved of this network could not be read again"):
        restore(one_worker, parse_checkpoint(serialize(one_worker, its_record), Path(CHECKPOINT)))
        torch.save(shared.state_dict(), model_file)
        path = Path(WEIGHTS)
        weights.load_weights(shared.model, weights.unpickle(model_file.getvalue(), shared.model, path, ""), path, "")
