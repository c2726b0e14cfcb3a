"""The network, its input, and its predictions. All images have a copy: edit the one in model-train, `make copies`."""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
import torch.nn.functional as F

from stage.dataset import DATA_SET


class Net(nn.Module):
    """The network of PyTorch's mnist_hogwild example: 21,840 parameters, and the same state-dict keys.

    Dropout is active in training mode only. `train --dropout` sets its probability, 0 by default; 0.5 is the example's.
    Without dropout, layers.py computes the gradients, and has this network once more: change both.
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities, float32 [N, 10], for x, float32 [N, 1, 28, 28], as made by to_input()."""
        return self.classify(self.convolve(x))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 [N, 10], whose log_softmax forward() returns."""
        x = F.relu(self.fc1(self.convolve(x).flatten(1)))
        x = F.dropout(x, self.dropout, self.training)
        logits: torch.Tensor = self.fc2(x)
        return logits

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the convolutions make of x: float32 [N, 20, 4, 4]."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        return F.relu(F.max_pool2d(F.dropout2d(self.conv2(x), self.dropout, self.training), 2))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities for what convolve() has returned."""
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.dropout(x, self.dropout, self.training)
        return F.log_softmax(self.fc2(x), dim=1)


def to_input(images: torch.Tensor) -> torch.Tensor:
    """Normalise images, uint8 [N, 28, 28] with background 0, to the network's input, float32 [N, 1, 28, 28]."""
    mean, std = DATA_SET.pixel_mean, DATA_SET.pixel_std
    return images.float().div_(255 * std).sub_(mean / std).unsqueeze(1)


def predict(model: Net, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """Return the model's log-probabilities, float32 [N, 10], for images, uint8 [N, 28, 28]; sets evaluation mode."""
    model.eval()

    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

    @torch.inference_mode()  # per thread
    def predict_batch(batch: torch.Tensor) -> torch.Tensor:
        x = to_input(batch)
        if not has_onednn:
            return model.forward(x)
        return model.classify(model.convolve(x.to_mkldnn()).to_dense())  # in this layout, pooling is 3 times as fast

    # One thread per batch. Splitting a batch across threads moves activations between cores after every layer, which
    # made two threads no faster than one where cores share no cache.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.cat([*pool.map(predict_batch, torch.split(images, batch_size))])
