"""layers.py, the arithmetic of a training step, held against torch's own convolution, pooling and gradients."""

import example
import layers
import pytest
import torch
from torch.nn import functional


def gradients(log_probabilities, labels, model):
    """The gradients of the loss of these log-probabilities, one for each of the model's parameters."""
    return torch.autograd.grad(functional.nll_loss(log_probabilities, labels), list(model.parameters()))


@pytest.fixture(params=["noise", "blank in part"])
def batch(request):
    """Images, float32 [7, 1, 28, 28], and labels. In what is blank, the values that are pooled into one are equal."""
    torch.manual_seed(2)
    images = torch.randn(7, 1, 28, 28)
    if request.param == "blank in part":
        images[:, :, 9:, :11] = -0.4242
    return images, torch.randint(10, (7,))


def test_the_log_probabilities_are_those_of_the_examples_network(batch):
    model, (images, _) = example.untrained(), batch
    torch.testing.assert_close(layers.forward(model, images, torch.float32), model(images))


def test_the_gradients_are_those_of_the_examples_network(batch):
    model, (images, labels) = example.untrained(), batch
    ours = gradients(layers.forward(model, images, torch.float32), labels, model)
    expected = gradients(model(images), labels, model)
    for name, one, other in zip(model.state_dict(), ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_in_bfloat16_the_gradients_point_the_same_way(batch):
    model, (images, labels) = example.untrained(), batch
    ours = gradients(layers.forward(model, images, torch.bfloat16), labels, model)
    expected = gradients(model(images), labels, model)
    for name, one, other in zip(model.state_dict(), ours, expected, strict=True):
        assert one.dtype == torch.float32
        assert functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.97, name


@pytest.mark.parametrize(("inputs", "size"), [(1, 28), (10, 12), (2, 6)])
def test_of_equal_values_the_first_one_gets_the_gradient(inputs, size):
    torch.manual_seed(3)
    # Whole numbers, so that sums are exact in whichever order they are added up, and many are the same.
    x = torch.randint(-1, 2, (4, inputs, size, size)).float().requires_grad_()
    weight = torch.randint(-1, 2, (3, inputs, 5, 5)).float().requires_grad_()
    bias = torch.tensor([-1.0, 0.0, 1.0]).requires_grad_()
    expected = functional.relu(functional.max_pool2d(functional.conv2d(x, weight, bias), 2))
    ours = layers.ConvPoolRelu.apply(x.permute(1, 2, 3, 0).contiguous(), weight, bias).permute(3, 0, 1, 2)
    assert torch.equal(ours, expected)
    grad = torch.randint(-3, 4, expected.shape).float()
    inputs = [x, weight, bias]
    for one, other in zip(*(torch.autograd.grad(output, inputs, grad) for output in (ours, expected)), strict=True):
        assert torch.equal(one, other)
