"""checks.py: other networks, made by editing net.py alone, are trained as they are, or refused in one line."""

import signal

import pytest
import torch
from torch.nn import functional

import hogwild
import net
import networks
import stages
from stage import weights
from stage.images import read_images
from stage.process import Failure
from training import checkpoint, plan, settings, start
from training.details import checks, needs


@pytest.fixture(scope="module")
def training(data):
    """The first training images and their labels."""
    images, labels = read_images(data, "train")
    return images[:960], labels[:960]


@pytest.fixture
def use(monkeypatch):
    """A function that puts the Net of another net.py in the place of this one."""
    return lambda text: monkeypatch.setattr(net, "Net", networks.module(text).Net)


def begin(images, labels, folder=None, **changes):
    """What a training with its defaults begins with."""
    wanted = settings.Settings(**{"epochs": 1} | changes)
    return start.start_or_resume(plan.Plan("start", "", wanted), {}, images, labels, folder)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_another_network_is_trained_by_autograd_and_saved_and_one_line_says_so(use, training, tmp_path, capsys, name):
    use(networks.NETWORKS[name])
    record, shared = begin(*training)
    output = capsys.readouterr()
    assert (output.out.count("\n"), output.err) == (1, "")
    assert "autograd" in output.out
    assert record.precision == "float32"
    trainer = hogwild.Trainer(0, shared)
    images, labels = trainer.load_batch(0)
    model, x = net.Net(0.0), net.to_input(images)
    torch.save(shared.state_dict(), tmp_path / "mnist_cnn.pt")
    weights.load_model(model, tmp_path)
    loss = functional.nll_loss(model(x), labels)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    own_loss, own_gradient = trainer.loss_and_gradient(x, labels)
    assert own_loss == pytest.approx(loss.item())
    torch.testing.assert_close(own_gradient, gradient)
    assert all(parameter.grad is None for parameter in shared.model.parameters())
    torch.testing.assert_close(net.predict(shared.model, images), model.eval()(x).detach(), rtol=1e-3, atol=1e-4)


def test_the_network_of_net_py_is_trained_by_layers_py_whatever_the_seed(training, capsys):
    for seed in range(20):
        record, shared = begin(*training, seed=seed)
        assert shared.uses_layers
        assert record.precision == str(hogwild.PRECISION).removeprefix("torch.")
    assert not begin(*training, dropout=0.5)[1].uses_layers
    assert capsys.readouterr().out == ""


def test_of_three_batches_one_must_agree(training, monkeypatch):
    answers = iter([False, False, True, True])
    monkeypatch.setattr(hogwild.layers, "gives_the_same", lambda *arguments: next(answers))
    assert begin(*training)[1].uses_layers


@pytest.mark.parametrize("name", networks.BAD_NETWORKS)
def test_a_network_that_cannot_be_trained_is_refused_in_one_line_before_anything_is_written(
    use, training, tmp_path, name
):
    text, names = networks.BAD_NETWORKS[name]
    use(text)
    with pytest.raises(Failure) as refusal:
        begin(*training, tmp_path)
    assert str(refusal.value).startswith("net.py: ")
    assert all(named in str(refusal.value) for named in names.split())
    assert "\n" not in str(refusal.value)
    assert [*tmp_path.iterdir()] == []


def test_dropout_that_the_network_has_not_is_refused(use, training):
    use(networks.NETWORKS["MLP"])
    with pytest.raises(Failure, match=r"^net\.py: .*--dropout"):
        begin(*training, dropout=0.5)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_out_of_range_is_refused(training, label):
    images, labels = training
    labels = labels.clone()
    labels[-1] = label
    with pytest.raises(Failure, match=rf"^stage/dataset\.py: .*{label}"):
        begin(images, labels)


@pytest.mark.parametrize(
    ("module", "reader"), [(checks, "restore"), (checks, "parse_checkpoint"), (weights, "load_weights")]
)
def test_what_could_not_be_read_again_is_refused(training, monkeypatch, tmp_path, module, reader):
    def fail(*arguments):
        raise Failure("it is damaged")

    monkeypatch.setattr(module, reader, fail)
    with pytest.raises(Failure, match=r"^net\.py: .*it is damaged"):
        begin(*training, tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_the_checks_change_nothing(training):
    shared = begin(*training)[1]
    torch.manual_seed(1)
    expected = net.Net().state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in shared.state_dict().items())
    assert not shared.optimizer_state["velocities"].any()
    assert not shared.parameter_sums.any()


def test_the_largest_checkpoint_of_a_network_is_under_the_limit(use, training, tmp_path):
    use(networks.NETWORKS["MLP"])
    record, shared = begin(*training, tmp_path, num_processes=64)
    content = checkpoint.CheckpointWriter(tmp_path, shared, record)
    content.save()
    assert (tmp_path / "checkpoint.pt").stat().st_size > 500_000_000
    checkpoint.read_checkpoint(tmp_path / "checkpoint.pt")


def test_without_a_folder_no_checkpoint_is_ever_due(tmp_path):
    for folder in (tmp_path, None):
        writer = checkpoint.CheckpointWriter(folder, None, None)
        writer.last_saved -= 60
        assert writer.is_due() == bool(folder)


def test_memory_that_is_too_small_for_the_parameters_is_told(use, training, monkeypatch):
    bytes_needed = []
    monkeypatch.setattr(needs.limits, "check_memory", lambda needed, what: bytes_needed.append(needed))
    begin(*training)
    use(networks.NETWORKS["MLP"])
    begin(*training)
    assert bytes_needed[1] - bytes_needed[0] > 10 * 4 * 2_000_000


def test_a_network_of_100_tensors_is_trained_resumed_evaluated_and_used(data, tmp_path):
    tree = stages.copy_tree(tmp_path / "tree", {"net.py": networks.NETWORKS["100 tensors"]})
    folders = {"tree": tree, "model": tree / "model"}
    quick = ("--batch-size", "500", "--lr", "0.2", "--averaging", "0.1", "--augmentation", "0")
    with stages.running(stages.command("train", "--epochs", "2", "--log-interval", "5", *quick, **folders)) as process:
        assert any("images/s" in line for line in process.stdout), process.stderr.read()
        stages.stop(process, signal.SIGTERM)
    assert 0 < stages.batches_saved(tree / "model") < 220
    result = stages.run("train", **folders)
    stages.assert_succeeds(result)
    assert "resuming" in result.stdout
    assert "nothing to do" in stages.run("train", **folders).stdout
    stages.assert_succeeds(stages.run("evaluate", "--min-accuracy", "80", **folders))
    stages.assert_succeeds(stages.run("infer", **folders))
