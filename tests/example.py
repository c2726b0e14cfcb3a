"""MNIST without this project: a network as PyTorch's mnist_hogwild example has it, and a reader of the raw files.

It shares no code with the programs, so that what they say of a model can be compared with it.
"""

import numpy
import torch
from torch import nn
from torch.nn import functional


class ExampleNet(nn.Module):
    """Two convolutions and two linear layers, with the example's names, so that its checkpoints fit here."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, images):
        first = torch.relu(functional.max_pool2d(self.conv1(images), 2))
        second = torch.relu(functional.max_pool2d(self.conv2_drop(self.conv2(first)), 2))
        hidden = functional.dropout(torch.relu(self.fc1(second.reshape(-1, 320))), training=self.training)
        return functional.log_softmax(self.fc2(hidden), dim=1)


def untrained(seed=0):
    torch.manual_seed(seed)
    return ExampleNet().eval()


def load(path):
    """The network of a checkpoint, with exactly the example's keys."""
    model = ExampleNet().eval()
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return model


def read_test_images(data):
    """The 10,000 test images, uint8 [N, 28, 28], and their labels, int64 [N]."""
    raw = data / "MNIST" / "raw"
    pixels = numpy.fromfile(raw / "t10k-images-idx3-ubyte", dtype=numpy.uint8)[16:]
    labels = numpy.fromfile(raw / "t10k-labels-idx1-ubyte", dtype=numpy.uint8)[8:]
    return torch.from_numpy(pixels.reshape(-1, 28, 28)), torch.from_numpy(labels.astype("int64"))


def predict(model, images):
    """The model's log-probabilities, float32 [N, 10], of images that are normalised as in the example."""
    normalised = (images.unsqueeze(1) / 255 - 0.1307) / 0.3081
    with torch.no_grad():
        return model(normalised)
