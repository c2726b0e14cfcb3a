"""The network, its input, and its predictions.

To change the network, edit Net in model-train/net.py alone, then run `make copies`. Net(dropout) has logits(), one for
each class of DATA_SET, and forward(), their log_softmax. train first checks that (training/details/checks.py), and
whether layers.py, faster than autograd but made for the network below, still computes the same.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
import torch.nn.functional as F

from stage.dataset import DATA_SET


class Net(nn.Module):
    """The network of PyTorch's mnist_hogwild example: for MNIST, 21,840 parameters and the same state-dict keys.

    Dropout is active in training mode only. `train --dropout` sets its probability, 0 by default; 0.5 is the example's.
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        channels, *size = DATA_SET.shape
        height, width = (((pixels - 4) // 2 - 4) // 2 for pixels in size)  # after the convolutions; 28 becomes 4
        self.conv1 = nn.Conv2d(channels, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.fc1 = nn.Linear(20 * height * width, 50)
        self.fc2 = nn.Linear(50, len(DATA_SET.classes))
        self.dropout = dropout

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 [N, classes], for x, float32 [N, C, H, W], as made by to_input()."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(F.dropout2d(self.conv2(x), self.dropout, self.training), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.dropout(x, self.dropout, self.training)
        return self.fc2(x)  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities, float32 [N, classes], for x as logits() takes it."""
        return F.log_softmax(self.logits(x), dim=1)


PIXELS = (DATA_SET.pixel_mean, DATA_SET.pixel_std)  # of each channel
MEAN, STD = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in PIXELS)
SCALE, SHIFT = (255 * STD).float(), (MEAN / STD).float()


def to_input(images: torch.Tensor) -> torch.Tensor:
    """Normalise images, uint8 [N, H, W] or [N, H, W, C], to the network's input, float32 [N, C, H, W], contiguous."""
    x = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return x.to(torch.float32, memory_format=torch.contiguous_format).div_(SCALE).sub_(SHIFT)


def predict(model: Net, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """Return the model's log-probabilities, float32 [N, classes], for images as to_input() takes them.

    Any module will do. This sets evaluation mode.
    """
    model.eval()
    forward = fastest_forward(model, images[:16])

    @torch.inference_mode()  # per thread
    def predict_batch(batch: torch.Tensor) -> torch.Tensor:
        return forward(to_input(batch))

    # One thread per batch. Splitting a batch across threads moves activations between cores after every layer, which
    # made two threads no faster than one where cores share no cache.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.cat([*pool.map(predict_batch, torch.split(images, batch_size))])


@torch.inference_mode()
def fastest_forward(model: Net, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the model, or a function that computes the same in oneDNN's memory layout, if it does so on the images.

    In this layout pooling is 3 times as fast, but most operations do not know it.
    """

    def in_onednn_layout(x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(model.logits(x.to_mkldnn()).to_dense(), dim=1)

    x = to_input(images)
    try:
        is_same = torch.allclose(in_onednn_layout(x), model(x), rtol=1e-4, atol=1e-4)
    except Exception:  # of many kinds; if it is the model that fails, it does so again, in predict()
        is_same = False
    return in_onednn_layout if is_same else model
