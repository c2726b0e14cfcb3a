"""layers.py, the arithmetic of a training step, held against torch's own convolution, pooling and gradients."""

import dataclasses

import pytest
import torch
from torch.nn import functional

import example
import layers
import net
from stage import dataset


def of_torch(model, images, labels):
    """The loss of the network as torch computes it, and its gradients, one for each parameter."""
    loss = functional.nll_loss(model(images), labels)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.fixture(params=["noise", "blank in part", "one image"])
def batch(request):
    """Images, float32 [N, 1, 28, 28], and labels. In what is blank, the values that are pooled into one are equal."""
    torch.manual_seed(2)
    images = torch.randn(1 if request.param == "one image" else 7, 1, 28, 28)
    if request.param == "blank in part":
        images[:, :, 9:, :11] = -0.4242
    return images, torch.randint(10, (len(images),))


def test_loss_and_gradients_are_those_of_the_examples_network(batch):
    model, before = example.untrained(), batch[0].clone()
    loss, ours = layers.loss_and_gradients(model, *batch, torch.float32)
    expected_loss, expected = of_torch(model, *batch)
    torch.testing.assert_close(loss, expected_loss)
    for name, one, other in zip(model.state_dict(), ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert batch[0].equal(before)


def test_images_in_colour_of_another_size_and_other_classes_are_trained_too(monkeypatch):
    changed = dataclasses.replace(dataset.DATA_SET, shape=(3, 32, 24), classes=tuple("abcdefghijklmnopqrstuvwxyz"))
    monkeypatch.setattr(net, "DATA_SET", changed)
    model, images, labels = net.Net(0.0), torch.randn(7, 3, 32, 24), torch.randint(26, (7,))
    loss, gradients = layers.loss_and_gradients(model, images, labels, torch.float32)
    expected_loss, expected = of_torch(model, images, labels)
    torch.testing.assert_close(loss, expected_loss)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)
    assert layers.is_network_of(model, images, labels)


def test_in_bfloat16_the_gradients_point_the_same_way(batch):
    model = example.untrained()
    ours, expected = layers.loss_and_gradients(model, *batch, torch.bfloat16)[1], of_torch(model, *batch)[1]
    for name, one, other in zip(model.state_dict(), ours, expected, strict=True):
        assert one.dtype == torch.float32
        assert functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.97, name


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("inputs", "size"), [(1, 28), (10, 12), (2, 6)])
def test_of_equal_values_the_first_one_gets_the_gradient(inputs, size, batch_size):
    torch.manual_seed(3)
    # Whole numbers, so that sums are exact in whichever order they are added up, and many are the same.
    x = torch.randint(-1, 2, (batch_size, inputs, size, size)).float().requires_grad_()
    weight = torch.randint(-1, 2, (3, inputs, 5, 5)).float().requires_grad_()
    bias = torch.tensor([-1.0, 0.0, 1.0]).requires_grad_()
    expected = functional.relu(functional.max_pool2d(functional.conv2d(x, weight, bias), 2))
    grad = torch.randint(-3, 4, expected.shape).float()
    expected_gradients = torch.autograd.grad(expected, [x, weight, bias], grad)

    to_ours, from_ours = (2, 1, 3, 0), (3, 1, 0, 2)  # [N, C, H, W] to [H, C, W, N], and back
    layer = layers.ConvPoolRelu(*(tensor.detach() for tensor in (x.permute(to_ours), weight, bias)))
    assert layer.output.permute(from_ours).equal(expected)
    grad_x, grad_weight, grad_bias = layer.gradients(grad.permute(to_ours))
    for one, other in zip((grad_x.permute(from_ours), grad_weight, grad_bias), expected_gradients, strict=True):
        assert one.equal(other)
