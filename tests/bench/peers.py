"""Trains the same network on the same data with what a user might pick instead: plain PyTorch, torch.compile, JAX.

One process with two threads takes steps of SGD with momentum on batches of 96, without augmentation. Prints one line of
JSON: the images/s of an epoch after the first steps, and the seconds that the first step takes, compilation included.

    python tests/bench/peers.py --data data pytorch
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "model-train"))
import torch
from torch.nn import functional

import net
from stage.images import read_images

BATCH_SIZE, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 96, 0.05, 0.8, 0.0007
THREADS, WARM_UP_STEPS = 2, 20


def main():
    """Measures a peer and prints the results."""
    peers = {"pytorch": pytorch_step, "compile": partial(pytorch_step, torch.compile), "jax": jax_step}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=peers)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(THREADS)
    images, labels = read_images(args.data, "train")
    batches = torch.randperm(len(images))[: len(images) // BATCH_SIZE * BATCH_SIZE].view(-1, BATCH_SIZE)
    print(json.dumps(measure(peers[args.peer](), images, labels, batches)))


def measure(step, images, labels, batches):
    """Takes a step on each batch; images/s, and the seconds of the first step."""
    began = time.monotonic()
    for number, batch in enumerate(batches):
        loss = step(net.to_input(images.index_select(0, batch)), labels.index_select(0, batch))
        if number == 0:
            first_seconds = time.monotonic() - began
        if number == WARM_UP_STEPS:
            loss.item()  # JAX does not wait for the results of a step
            began = time.monotonic()
    assert loss.item() < 0.5, f"it does not learn: the last loss is {loss.item():.2f}"
    count = (len(batches) - WARM_UP_STEPS - 1) * BATCH_SIZE
    return {"images_per_second": count / (time.monotonic() - began), "first_step_seconds": first_seconds}


def pytorch_step(compiler=lambda function: function):
    """A step of PyTorch's layers, in channels_last, which is twice as fast; compiled if a compiler is given."""
    model = net.Net(0).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    loss_of = compiler(lambda images, labels: functional.nll_loss(model(images), labels))

    def step(images, labels):
        optimizer.zero_grad()
        loss = loss_of(images.contiguous(memory_format=torch.channels_last), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def jax_step():
    """A step compiled by XLA, in its layout for the CPU: [batch, height, width, channels]."""
    import jax
    from jax import lax, numpy

    def pool_relu(x):
        window = 1, 2, 2, 1
        return jax.nn.relu(lax.reduce_window(x, -numpy.inf, lax.max, window, window, "VALID"))

    def loss_of(parameters, images, labels):
        w1, b1, w2, b2, w3, b3, w4, b4 = parameters
        layout = ("NHWC", "OIHW", "NHWC")
        x = pool_relu(lax.conv_general_dilated(images, w1, (1, 1), "VALID", dimension_numbers=layout) + b1)
        x = pool_relu(lax.conv_general_dilated(x, w2, (1, 1), "VALID", dimension_numbers=layout) + b2)
        x = jax.nn.relu(x.transpose(0, 3, 1, 2).reshape(len(x), -1) @ w3.T + b3)
        log_probabilities = jax.nn.log_softmax(x @ w4.T + b4)
        return -log_probabilities[numpy.arange(len(labels)), labels].mean()

    def update(parameters, velocities, images, labels):
        loss, gradients = jax.value_and_grad(loss_of)(parameters, images, labels)
        triples = zip(parameters, velocities, gradients, strict=True)
        velocities = [MOMENTUM * v + g + WEIGHT_DECAY * p for p, v, g in triples]
        return loss, [p - LEARNING_RATE * v for p, v in zip(parameters, velocities, strict=True)], velocities

    update = jax.jit(update, donate_argnums=(0, 1))
    state = [numpy.asarray(p.detach().numpy().copy()) for p in net.Net(0).parameters()]
    state = state, [numpy.zeros_like(p) for p in state]

    def step(images, labels):
        nonlocal state
        loss, *state = update(*state, images.permute(0, 2, 3, 1).numpy(), labels.numpy().astype("int32"))
        return loss

    return step


if __name__ == "__main__":
    main()
