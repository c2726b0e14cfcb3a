"""What the pipeline is measured against: Hogwild training as PyTorch's mnist_hogwild example does it.

Every worker is a new process that walks the whole training set, in an order of its own, through a DataLoader with
torchvision's transforms, image by image; each takes plain SGD steps on one model in shared memory. So two workers do
two passes an epoch. How many threads torch takes is left to it, or to OMP_NUM_THREADS.

Checked against the example itself, an epoch with each of three seeds, in turns, with OMP_NUM_THREADS=1: a worker takes
13.4 s of processor time in both, and the mean test accuracy is 96.13 % here and 96.19 % there.

Reads   DATA/MNIST/raw
Prints  one line of JSON: the seconds from the first batch to the last, and the seconds and test accuracy by epoch

    OMP_NUM_THREADS=1 python tests/bench/reference.py --data data --epochs 10
"""

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from example import ExampleNet

WORKERS, BATCH_SIZE, LEARNING_RATE, MOMENTUM = 2, 64, 0.01, 0.5


def main():
    """Trains, then evaluates the model of each epoch, and prints the results."""
    parser = argparse.ArgumentParser(description="Trains as PyTorch's mnist_hogwild example does.")
    parser.add_argument("--data", required=True, help="folder of the data")
    parser.add_argument("--epochs", type=int, default=10, help="passes of each worker (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights; each worker adds its rank")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    network = ExampleNet()
    reports = train(network.share_memory(), load("train", args.data), args)
    test_batches = [*DataLoader(load("test", args.data), batch_size=1000)]
    began = min(report["began"] for report in reports)
    history = []
    for ends in zip(*(report["epochs"] for report in reports), strict=True):
        end, parameters = max(ends, key=lambda pair: pair[0])  # an epoch ends when its last worker ends it
        vector_to_parameters(torch.from_numpy(parameters), network.parameters())
        history.append({"seconds": end - began, "accuracy": evaluate(network, test_batches)})
    print(json.dumps({"seconds": history[-1]["seconds"], "threads": torch.get_num_threads(), "history": history}))


def load(split, data):
    """The images, in torchvision's MNIST, which makes a tensor of an image each time it is read."""
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    return MNIST(data, train=split == "train", transform=prepare)


def train(network, images, args):
    """Trains the network in worker processes, and returns their reports."""
    with ProcessPoolExecutor(WORKERS, mp.get_context("spawn")) as pool:
        reports = [pool.submit(work, network, images, args.epochs, args.seed + rank) for rank in range(WORKERS)]
    return [report.result() for report in reports]


def work(network, images, epochs, seed):
    """What a worker does. It reports when it began, and of each epoch when it ended and the parameters then."""
    torch.manual_seed(seed)
    batches = DataLoader(images, batch_size=BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    network.train()
    began, ends = time.monotonic(), []
    for _ in range(epochs):
        for inputs, labels in batches:
            optimizer.zero_grad()
            F.nll_loss(network(inputs), labels).backward()
            optimizer.step()
        ends.append((time.monotonic(), parameters_to_vector(network.parameters()).detach().numpy()))
    return {"began": began, "epochs": ends}


@torch.inference_mode()
def evaluate(network, batches):
    """The accuracy in percent."""
    network.eval()
    correct = sum((network(inputs).argmax(1) == labels).sum().item() for inputs, labels in batches)
    return 100 * correct / sum(len(labels) for _, labels in batches)


if __name__ == "__main__":
    main()
