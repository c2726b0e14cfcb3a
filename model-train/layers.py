"""The arithmetic of a training step: the loss of net.Net and its gradients, as a few matrix products.

This is the network that net.py has for MNIST, once more; where net.py has been changed, is_network_of() says so, and
autograd computes the gradients. A batch of 96 then takes 2.7 times as long as with this file in bfloat16, 1.8 times as
long as in float32 (medians on one core of an AMD EPYC, Zen 5).

Activations are laid out [height, channels, width, batch], so that operations run over long contiguous rows. Two
neighbouring outputs in a row, which max-pooling joins, depend on a window of the input that is 6 wide; a matrix has
each 5x5 kernel at both places in that window. Only windows along the width are copied: those of five rows are adjacent
in memory, so a strided view reads them as one matrix. This takes 6/5 of the multiplications, in matrix shapes that suit
the CPU. The gradients are written out, because autograd would take 6 % longer.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from net import Net

# Rounding makes a difference of 1e-6; where two pooled values are almost equal it may decide which one gets the
# gradient, in 1 of 300 batches of 32. A leaky ReLU of slope 0.001 makes one of 1e-3.
MAX_DIFFERENCE = 1e-4
TEST_IMAGES = 8  # in a batch to compare


def loss_and_gradients(model: Net, images: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss of a batch, and its gradients with respect to the model's parameters in their order.

    Images are float32 [N, C, H, W], labels int64 [N]; gradients are float32. The convolutions use the given dtype,
    bfloat16 or float32; the linear layers, which are small, use float32. There is no dropout.
    """
    w1, b1, w2, b2, w3, b3, w4, b4 = [parameter.detach() for parameter in model.parameters()]
    conv1 = ConvPoolRelu(images.to(dtype).permute(2, 1, 3, 0), w1, b1)
    conv2 = ConvPoolRelu(conv1.output, w2, b2)
    pooled = conv2.output.transpose(0, 1)
    features = pooled.flatten(0, 2).float()
    hidden = torch.addmm(b3[:, None], w3, features).relu_()
    log_probabilities = torch.addmm(b4[:, None], w4, hidden).log_softmax(0)
    loss = F.nll_loss(log_probabilities.t(), labels)

    # The gradient of the logits, and so on backwards.
    grad = (log_probabilities.exp() - F.one_hot(labels, len(b4)).t()) / len(labels)
    grad_fc2 = [grad @ hidden.t(), grad.sum(1)]
    grad = w4.t() @ grad * hidden.sign()
    grad_fc1 = [grad @ features.t(), grad.sum(1)]
    grad = (w3.t() @ grad).to(dtype).view(pooled.shape).transpose(0, 1)
    grad, *grad_conv2 = conv2.gradients(grad)
    _, *grad_conv1 = conv1.gradients(grad, of_input=False)
    return loss, [*grad_conv1, *grad_conv2, *grad_fc1, *grad_fc2]


def is_network_of(model: Net, x: Tensor, labels: Tensor) -> bool:
    """Return whether loss_and_gradients() computes what autograd does for the model, with one of a few batches.

    x is float32 [N, C, H, W]. Weights 4 times as large show what small values do not, such as the upper bound of ReLU6.
    """
    batches = [*zip(torch.split(x, TEST_IMAGES), torch.split(labels, TEST_IMAGES), strict=True)]
    try:
        return all(any(gives_the_same(model, factor, *batch) for batch in batches) for factor in (1, 4))
    except Exception:  # of many kinds, for a network with other layers
        return False


def gives_the_same(model: Net, factor: float, x: Tensor, labels: Tensor) -> bool:
    """Return whether the loss of a batch, and each gradient, are those of autograd, with weights times the factor."""
    model = copy.deepcopy(model).train()
    parameters = list(model.parameters())
    torch._foreach_mul_([parameter.data for parameter in parameters], factor)
    loss = F.nll_loss(model(x), labels)
    # Not backward(): a .grad that exists when the workers are forked would be shared by them.
    expected = [loss, *torch.autograd.grad(loss, parameters)]
    loss, gradients = loss_and_gradients(model, x, labels, torch.float32)
    pairs = zip([loss, *gradients], expected, strict=True)
    return all(bool((one - other).norm() <= MAX_DIFFERENCE * other.norm()) for one, other in pairs)


class ConvPoolRelu:
    """relu(max_pool2d(conv2d(x, weight, bias), 2)), from [H, C, W, N] to [H / 2 - 2, K, W / 2 - 2, N]; H, W even.

    The dtype of x is used throughout; weight and bias are float32. The gradients are those of torch's own layers.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.shape, self.kernels = x.shape, to_both_places(weight).to(x.dtype)
        height, channels, width, batch = x.shape
        columns, outputs = width // 2 - 2, len(weight)
        # float [H, C * 6, W' * N], where W' = W / 2 - 2. (reshape() would not copy a batch of one image.)
        windows = x.unfold(2, 6, 2).permute(0, 1, 4, 2, 3).contiguous()
        self.windows = windows.view(height, channels * 6, columns * batch)
        row, column, _ = self.windows.stride()
        self.rows = self.windows.as_strided((height - 4, 5 * channels * 6, columns * batch), (row, column, 1))
        values = self.kernels.expand(height - 4, -1, -1) @ self.rows
        self.values = values.view(height // 2 - 2, 2, 2, outputs, -1)  # by row, row and place in the pooled square
        self.pairs = torch.maximum(*self.values.unbind(2))
        output = torch.maximum(*self.pairs.unbind(1)).add_(bias.to(x.dtype)[:, None]).relu_()
        self.output = output.view(-1, outputs, columns, batch)

    def gradients(self, grad: Tensor, of_input: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x (empty if not wanted), weight and bias, the latter float32, from the output's.

        For one call: it overwrites what the forward pass has kept, since new memory would take longer than the sums.
        """
        grad = self.output.sign().mul_(grad).flatten(2)  # ReLU: the sign of its output is 0 or 1
        split_gradient(grad, *self.pairs.unbind(1))
        split_gradient(self.pairs, *self.values.unbind(2))
        grad_values = self.values.view(len(self.rows), len(self.kernels), -1)
        # In this order, oneDNN, which multiplies bfloat16, copies the smaller matrix only.
        grad_kernels = (self.rows @ grad_values.transpose(1, 2)).sum(0, dtype=torch.float32).t()
        grad_weight, grad_bias = from_both_places(grad_kernels, self.shape[1]), grad.sum((0, 2), dtype=torch.float32)
        return self.input_gradient(grad_values) if of_input else grad.new_empty(0), grad_weight, grad_bias

    def input_gradient(self, grad_values: Tensor) -> Tensor:
        """Return the gradient of x from that of the convolution's values, [rows, 2 K, W' * N]."""
        height, channels, width, batch = self.shape
        grad_windows = self.windows.zero_()
        for y, kernels in enumerate(self.kernels.view(-1, 5, channels * 6).unbind(1)):
            kernels = kernels.t().expand(height - 4, -1, -1)
            grad_windows[y : y + height - 4].baddbmm_(kernels, grad_values)
        # A window is three parts of two pixels: add up the parts that contain a pixel.
        parts = grad_windows.view(height, channels, 3, 2, -1, batch).transpose(3, 4).unbind(2)
        grad_x = self.windows.new_zeros(height, channels, width // 2, 2, batch)
        for x, part in enumerate(parts):
            grad_x[:, :, x : x + width // 2 - 2].add_(part)
        return grad_x.view(self.shape)


def to_both_places(weight: Tensor) -> Tensor:
    """Return kernels, [K, C, 5, 5], at both places in a window 6 wide: [2 K, 5 * C * 6]."""
    placed = torch.stack([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))])
    return placed.transpose(2, 3).reshape(2 * len(weight), -1)


def from_both_places(grad: Tensor, channels: int) -> Tensor:
    """Return the gradient of kernels, [K, C, 5, 5], from the gradient of to_both_places(kernels)."""
    first, second = grad.reshape(2, -1, 5, channels, 6).unbind()
    return (first[..., :5] + second[..., 1:]).transpose(1, 2)


def split_gradient(grad: Tensor, first: Tensor, second: Tensor) -> None:
    """Overwrite two tensors by their gradients, given that of their maximum: it goes to the larger value.

    If the two are equal, the first one gets it, as in torch.
    """
    second.gt_(first).mul_(grad)  # gt_() makes it 1 where it is the larger, else 0
    torch.sub(grad, second, out=first)
