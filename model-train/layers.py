"""The arithmetic of a training step: what net.Net computes, and its gradients, as a few products of matrices.

In memory the batch comes last, [channels, height, width, N], so that all work is on long rows. A 5x5 convolution and
the 2x2 max-pool behind it are one product: the four values that are pooled into one see a patch of 6x6 pixels together,
and the matrix holds each kernel four times, at its four places in such a patch. That is 1.44 times the arithmetic,
but on a quarter as many patches, in matrices of a shape that the CPU is fast at, and pooling is three comparisons of
whole rows.
"""

import torch
import torch.nn.functional as F

# float32 [25, 4 * 36]: kernels, [K, 25], times this are the kernels at their four places in a patch, 0 around them.
FOUR_PLACES = torch.stack(
    [F.pad(torch.eye(25).view(25, 5, 5), (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)], dim=1
).view(25, 144)


def forward(model, images, dtype):
    """The model's log-probabilities, float32 [N, 10], of a batch, float32 [N, 1, 28, 28], without dropout.

    Convolutions are in the dtype given, bfloat16 or float32; the linear layers, which are small, in float32.
    """
    x = images.to(dtype).view(-1, 28 * 28).t().reshape(1, 28, 28, -1)
    x = ConvPoolRelu.apply(x, model.conv1.weight, model.conv1.bias)
    x = ConvPoolRelu.apply(x, model.conv2.weight, model.conv2.bias)
    x = F.relu(model.fc1(x.float().flatten(0, 2).t()))
    return F.log_softmax(model.fc2(x), dim=1)


class ConvPoolRelu(torch.autograd.Function):
    """relu(max_pool2d(conv2d(x, weight, bias), 2)), from [C, H, W, N] to [K, H / 2 - 2, W / 2 - 2, N]; H, W even.

    It computes in the type of x; weight and bias are float32. The gradients are those of torch's own functions: of
    equal values, the first one gets it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        """The four values of every place of the output, [4 K, ...], the greater one of each two, and of those."""
        kernels, patches = to_four_places(weight).to(x.dtype), to_patches(x)
        values = kernels @ patches
        pairs = torch.maximum(*values.view(2, 2, -1).unbind(1))
        output = torch.maximum(*pairs).view(len(bias), -1).add_(bias.to(x.dtype)[:, None]).relu_()
        ctx.save_for_backward(kernels, patches, output)
        ctx.values, ctx.pairs, ctx.shape = values, pairs, x.shape
        _, height, width, batch = x.shape
        return output.view(-1, height // 2 - 2, width // 2 - 2, batch)

    @staticmethod
    def backward(ctx, grad):
        """The gradients of x, weight and bias. It writes over what forward() has kept, so it can run once only."""
        kernels, patches, output = ctx.saved_tensors
        grad = output.sign().mul_(grad.reshape(output.shape))  # ReLU: the sign of its output is 0 or 1
        hand_down(grad.view(-1), ctx.pairs)
        hand_down(ctx.pairs, ctx.values.view(2, 2, -1).unbind(1))
        grad_weight = from_four_places(ctx.values @ patches.t(), len(output), ctx.shape[0])
        grad_x = from_patches(kernels.t() @ ctx.values, ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad.sum(1).float()


def to_four_places(weight):
    """Kernels, [K, C, 5, 5], at their four places in a patch: [4 K, C * 36]."""
    outputs, inputs, _, _ = weight.shape
    placed = (weight.view(-1, 25) @ FOUR_PLACES).view(outputs, inputs, 4, 36)
    return placed.permute(2, 0, 1, 3).reshape(4 * outputs, inputs * 36)


def from_four_places(grad, outputs, inputs):
    """The gradient of kernels, float32 [K, C, 5, 5], from that of what to_four_places() made of them."""
    grad = grad.float().view(4, outputs, inputs, 36).permute(1, 2, 0, 3).reshape(-1, 144)
    return (grad @ FOUR_PLACES.t()).view(outputs, inputs, 5, 5)


def to_patches(x):
    """The patches of 6x6 that begin at every other pixel of [C, H, W, N], one a column: [C * 36, ... * N]."""
    return x.unfold(1, 6, 2).unfold(2, 6, 2).permute(0, 4, 5, 1, 2, 3).reshape(len(x) * 36, -1)


def from_patches(grad, shape):
    """The gradient of x, [C, H, W, N], from that of its patches: for each pixel, a sum over those that it is in."""
    channels, height, width, batch = shape
    rows, columns = height // 2 - 2, width // 2 - 2
    # Pixels by their place in a square of 2x2 first, so that what is added lies in long rows.
    grad = grad.view(channels, 3, 2, 3, 2, rows, columns, batch)
    grad_x = grad.new_zeros(channels, 2, 2, height // 2, width // 2, batch)
    for y in range(3):
        for x in range(3):
            grad_x[:, :, :, y : y + rows, x : x + columns].add_(grad[:, y, :, x])
    return grad_x.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def hand_down(grad, pair):
    """Overwrites a pair of tensors with their gradients, from that of their maximum: all of it to the greater one."""
    first, second = pair
    torch.sub(grad, second.gt_(first).mul_(grad), out=first)
