"""hogwild.py: the schedule of the learning rate, the augmentation, and a step of SGD."""

import math

import pytest
import torch
from torch.nn import functional

import augmentation
import example
import hogwild
import layers
import net
from training import record
from training.settings import Settings


def new_trainer(count=960, **changes):
    """A worker's trainer on random images; a step is exact unless it is changed: float32, not augmented."""
    torch.manual_seed(4)
    images, labels = torch.randint(256, (count, 28, 28), dtype=torch.uint8), torch.randint(10, (count,))
    wanted = Settings(**{"epochs": 1, "num_processes": 1, "augmentation": 0.0} | changes)
    return hogwild.Trainer(0, hogwild.SharedState(record.Record.new(wanted, count, {}), images, labels))


def rates(trainer):
    shared = trainer.shared
    return [trainer.learning_rate(number) for number in range(shared.schedule_start, shared.schedule_end)]


@pytest.mark.parametrize("start", [0, 300])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(start):
    trainer = new_trainer(epochs=100)
    trainer.shared.schedule_start = start
    course = rates(trainer)
    peak = course.index(max(course))
    assert course[: peak + 1] == sorted(course[: peak + 1])
    assert course[peak:] == sorted(course[peak:], reverse=True)
    assert peak == pytest.approx(hogwild.WARMUP_FRACTION * len(course), abs=1)
    assert 0 < course[0] < 0.1 / 100
    assert 0 < course[-1] < 0.1 / 100
    assert max(course) == pytest.approx(0.1, rel=0.01)


def test_a_constant_learning_rate_is_the_same_for_every_batch():
    assert {*rates(new_trainer(schedule="constant", lr=0.3))} == {0.3}


def test_while_batches_are_averaged_the_learning_rate_stays():
    plain, course = rates(new_trainer(epochs=100)), rates(new_trainer(epochs=100, averaging=0.25))
    assert course[:750] == plain[:750]
    assert {*course[750:]} == {course[750]}
    assert course[750] == pytest.approx(plain[749], rel=0.01)


@pytest.mark.parametrize("averaging", [0.4, 0])
def test_the_model_is_the_mean_over_the_last_batches_or_without_averaging_that_after_the_last_one(averaging):
    trainer = new_trainer(epochs=2, averaging=averaging)
    after = []
    for number in range(20):
        trainer.train_batch(number)
        after.append(trainer.shared.parameters.clone())
    trainer.shared.load_mean(trainer.shared.parameter_sums.sum(0))
    torch.testing.assert_close(trainer.shared.parameters, torch.stack(after[12:]).mean(0) if averaging else after[-1])
    assert trainer.shared.parameters.equal(after[-1]) == (not averaging)


def test_a_worker_that_is_late_with_an_early_batch_leaves_the_sums_of_the_last_batches_alone():
    shared = new_trainer(epochs=2, averaging=0.4, num_processes=2).shared
    workers = [hogwild.Trainer(rank, shared) for rank in range(2)]
    for number in (12, 13, 5, 14):
        workers[number % 2].train_batch(number)
    assert shared.parameter_sums[:, -1].tolist() == [2, 1]


@pytest.mark.parametrize("longest", [0.5, 1e6], ids=["clipped", "not clipped"])
def test_the_steps_are_those_of_torchs_own_sgd(monkeypatch, longest):
    monkeypatch.setattr(hogwild, "PRECISION", torch.float32)
    trainer = new_trainer(max_grad_norm=longest, weight_decay=0.01)
    model = example.untrained()
    model.load_state_dict(trainer.shared.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01)
    norms = []
    for number in range(5):
        images, labels = trainer.load_batch(number)
        optimizer.zero_grad()
        loss = functional.nll_loss(model(net.to_input(images)), labels)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), longest).item())
        optimizer.param_groups[0]["lr"] = trainer.learning_rate(number)
        optimizer.step()
        assert trainer.train_batch(number) == (96, pytest.approx(96 * loss.item(), rel=1e-3))
    assert (max(norms) > longest) == (longest == 0.5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trainer.shared.state_dict()[name], tensor, atol=1e-5, rtol=1e-3, msg=name)


def test_a_loss_that_is_not_finite_ends_the_training():
    trainer = new_trainer()
    trainer.shared.parameters.fill_(math.nan)
    with pytest.raises(ArithmeticError):
        trainer.train_batch(0)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    trainer = new_trainer(count=100, batch_size=30, epochs=2)
    pixels = trainer.shared.images.float().mean((1, 2))
    epochs = [torch.cat([trainer.load_batch(number)[0] for number in range(first, first + 4)]) for first in (0, 4)]
    one, two = ([*images.float().mean((1, 2)).tolist()] for images in epochs)
    assert sorted(one) == sorted(two) == sorted(pixels.tolist())
    assert one != two


def test_without_dropout_the_gradient_is_that_of_layers_py():
    trainer = new_trainer()
    images, labels = trainer.load_batch(0)
    x = net.to_input(images)
    loss, gradient = trainer.loss_and_gradient(x, labels)
    expected_loss, expected = layers.loss_and_gradients(trainer.shared.model, x, labels, hogwild.PRECISION)
    assert loss == expected_loss.item()
    assert gradient.equal(torch.cat([each.flatten() for each in expected]))


def test_with_dropout_the_gradient_is_that_of_the_examples_network_in_training():
    trainer, model = new_trainer(dropout=0.5), example.ExampleNet().train()
    model.load_state_dict(trainer.shared.state_dict())
    images, labels = trainer.load_batch(0)
    x = net.to_input(images)
    torch.manual_seed(6)
    functional.nll_loss(model(x), labels).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.manual_seed(6)
    gradient = trainer.loss_and_gradient(x, labels)[1]
    torch.testing.assert_close(gradient, expected)
    assert not trainer.loss_and_gradient(x, labels)[1].equal(gradient)  # other units are dropped the next time


@pytest.fixture
def x():
    """A batch of noise, as the network gets it."""
    return net.to_input(torch.randint(256, (5, 28, 28), dtype=torch.uint8))


def test_images_of_other_sizes_and_in_colour_are_augmented_as_affine_grid_would():
    x = torch.randn(3, 3, 32, 20)
    torch.manual_seed(1)
    ours = augmentation.augment(x, 1.0)
    torch.manual_seed(1)
    angle, scale_x, scale_y, shift_x, shift_y = torch.rand(5, 3).mul_(2).sub_(1)
    angle, scale_x, scale_y = augmentation.MAX_ROTATION * angle, 1 + 0.1 * scale_x, 1 + 0.1 * scale_y
    top = torch.stack([scale_x * angle.cos(), -angle.sin(), 0.1 * shift_x], 1)
    bottom = torch.stack([angle.sin(), scale_y * angle.cos(), 0.1 * shift_y], 1)
    grid = functional.affine_grid(torch.stack([top, bottom], 1), [3, 3, 32, 20], align_corners=False)
    expected = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_every_image_is_augmented_by_itself_a_seed_repeats_it_and_strength_0_changes_nothing(x):
    same = x[:1].expand(2, 1, 28, 28).contiguous()
    torch.manual_seed(1)
    one = augmentation.augment(same, 1.0)
    assert not torch.allclose(one[0], one[1], atol=0.1)
    torch.manual_seed(1)
    assert augmentation.augment(same, 1.0).equal(one)
    assert augmentation.augment(same, 0.0).equal(same)
