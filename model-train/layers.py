"""The arithmetic of a training step: what net.Net computes, and its gradients, as a few matrix products.

Tensors are laid out [channels, height, width, batch], so that operations run over long contiguous rows. A 5x5
convolution and its 2x2 max-pool become one matrix product: the four outputs that are pooled together depend on one 6x6
patch, and the matrix has each kernel at its four offsets in that patch. This takes 36/25 = 1.44 times the
multiplications, but on a quarter of the patches, in matrix shapes that suit the CPU; pooling becomes three
elementwise maxima.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from net import Net

# float32 [25, 4 * 36]. Maps kernels, [K, 25], to their four shifted copies in a 6x6 patch, zero-padded.
FOUR_OFFSETS = torch.stack(
    [F.pad(torch.eye(25).view(25, 5, 5), (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)], dim=1
).view(25, 144)


def forward(model: Net, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the model's log-probabilities, float32 [N, 10], for a batch, float32 [N, 1, 28, 28], without dropout.

    The convolutions use the given dtype, bfloat16 or float32; the linear layers, which are small, use float32.
    """
    x = images.to(dtype).view(-1, 28 * 28).t().reshape(1, 28, 28, -1)
    x = conv_pool_relu(x, model.conv1.weight, model.conv1.bias)
    x = conv_pool_relu(x, model.conv2.weight, model.conv2.bias)
    x = F.relu(model.fc1(x.float().flatten(0, 2).t()))
    return F.log_softmax(model.fc2(x), dim=1)


def conv_pool_relu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """relu(max_pool2d(conv2d(x, weight, bias), 2)) of [C, H, W, N]: see ConvPoolRelu."""
    return cast(torch.Tensor, ConvPoolRelu.apply(x, weight, bias))  # type: ignore[no-untyped-call]


class ConvPoolRelu(torch.autograd.Function):
    """relu(max_pool2d(conv2d(x, weight, bias), 2)), from [C, H, W, N] to [K, H / 2 - 2, W / 2 - 2, N]; H, W even.

    The dtype of x is used throughout; weight and bias are float32. The gradients are those of torch's own layers; if
    two values are equal, the first one gets the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Compute the four values of each pooling window, their maximum and ReLU; keep what backward() needs."""
        kernels, patches = to_four_offsets(weight).to(x.dtype), to_patches(x)
        values = kernels @ patches
        pairs = torch.maximum(*values.view(2, 2, -1).unbind(1))
        output = torch.maximum(*pairs).view(len(bias), -1).add_(bias.to(x.dtype)[:, None]).relu_()
        ctx.save_for_backward(kernels, patches, output)
        ctx.values, ctx.pairs, ctx.shape = values, pairs, x.shape  # backward() overwrites these
        _, height, width, batch = x.shape
        return output.view(-1, height // 2 - 2, width // 2 - 2, batch)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return the gradients of x, weight and bias. It overwrites what forward() kept, so it can run only once."""
        kernels, patches, output = ctx.saved_tensors
        grad = output.sign().mul_(grad.reshape(output.shape))  # ReLU: the sign of its output is 0 or 1
        route_gradient(grad.view(-1), ctx.pairs)  # ctx.pairs now is the gradient of the pairs' maxima
        route_gradient(ctx.pairs, ctx.values.view(2, 2, -1).unbind(1))  # and ctx.values that of the values
        grad_weight = from_four_offsets(ctx.values @ patches.t(), len(output), ctx.shape[0])
        grad_x = from_patches(kernels.t() @ ctx.values, ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad.sum(1).float()


def to_four_offsets(weight: torch.Tensor) -> torch.Tensor:
    """Return kernels, [K, C, 5, 5], at their four offsets in a patch: [4 K, C * 36]."""
    outputs, inputs, _, _ = weight.shape
    placed = (weight.view(-1, 25) @ FOUR_OFFSETS).view(outputs, inputs, 4, 36)
    return placed.permute(2, 0, 1, 3).reshape(4 * outputs, inputs * 36)


def from_four_offsets(grad: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """Return the gradient of kernels, float32 [K, C, 5, 5], from the gradient of to_four_offsets(kernels)."""
    grad = grad.float().view(4, outputs, inputs, 36).permute(1, 2, 0, 3).reshape(-1, 144)
    return (grad @ FOUR_OFFSETS.t()).view(outputs, inputs, 5, 5)


def to_patches(x: torch.Tensor) -> torch.Tensor:
    """Return the 6x6 patches at every second row and column of [C, H, W, N], one per column: [C * 36, ... * N]."""
    return x.unfold(1, 6, 2).unfold(2, 6, 2).permute(0, 4, 5, 1, 2, 3).reshape(len(x) * 36, -1)


def from_patches(grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the gradient of x, [C, H, W, N]: for each pixel, the sum over the patches that contain it."""
    channels, height, width, batch = shape
    rows, columns = height // 2 - 2, width // 2 - 2
    # A patch is 3 x 3 squares of 2 x 2 pixels. Index the pixels by their place in a square first, so that the additions
    # run over long rows.
    grad = grad.view(channels, 3, 2, 3, 2, rows, columns, batch)
    grad_x = grad.new_zeros(channels, 2, 2, height // 2, width // 2, batch)
    for y in range(3):
        for x in range(3):
            grad_x[:, :, :, y : y + rows, x : x + columns].add_(grad[:, y, :, x])
    return grad_x.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def route_gradient(grad: torch.Tensor, pair: tuple[torch.Tensor, ...]) -> None:
    """Replace each pair of values by its gradients: the gradient of the maximum goes to the larger value."""
    first, second = pair
    torch.sub(grad, second.gt_(first).mul_(grad), out=first)
