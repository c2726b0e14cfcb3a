"""net.py: the network, its input and its predictions, compared with those of PyTorch's example."""

import io

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import example
import net
import networks
from stage import images as reading
from stage import weights


@pytest.fixture(scope="module")
def images(data):
    return reading.read_images(data, "test")[0][:100]


def test_the_predictions_are_those_of_the_examples_network(trained, images):
    model = net.Net()
    weights.load_model(model, trained)
    expected = example.predict(example.load(trained / "mnist_cnn.pt"), images)
    torch.testing.assert_close(net.predict(model, images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_predictions_do_not_depend_on_batches_and_threads(images, threads):
    model = net.Net()
    expected = net.predict(model, images)
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(net.predict(model, images, batch_size=7), expected)
    finally:
        torch.set_num_threads(1)


def test_a_network_in_training_mode_still_predicts_without_dropout(images):
    model = net.Net().train()
    torch.testing.assert_close(net.predict(model, images), net.predict(model.train(), images))


def test_a_network_may_flatten_by_view_and_have_no_logits(images):
    text = networks.replaced(("x.flatten(1)", "x.view(-1, 320)"))
    for module in (networks.module(text).Net(), example.untrained()):
        with torch.no_grad():
            torch.testing.assert_close(net.predict(module, images), module.eval()(net.to_input(images)))


@pytest.mark.parametrize("name", [None, *networks.NETWORKS])
def test_the_fast_memory_layout_serves_only_where_it_gives_the_same(images, name):
    model = networks.module(networks.NETWORKS[name]).Net() if name else net.Net()
    forward = net.fastest_forward(model.eval(), images)
    assert (forward is model) == (name in ("relu6", "layer norm", "silu and group norm"))


def test_the_input_of_coloured_images_is_normalised_by_channel(monkeypatch):
    images = torch.randint(256, (5, 6, 7, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    monkeypatch.setattr(net, "SCALE", 255 * std.view(3, 1, 1))
    monkeypatch.setattr(net, "SHIFT", (mean / std).view(3, 1, 1))
    x = net.to_input(images)
    torch.testing.assert_close(x, ((images / 255 - mean) / std).permute(0, 3, 1, 2))
    assert x.is_contiguous()


def test_the_input_is_to_the_bit_what_it_was_when_models_were_trained():
    images = torch.arange(256, dtype=torch.uint8).repeat(49).view(16, 28, 28)
    assert net.to_input(images).equal(images.float().div_(255 * 0.3081).sub_(0.1307 / 0.3081).unsqueeze(1))


def run_onnx(model, x, **options):
    """What an ONNX file of the model gives for x, made from the first two of it for any number."""
    file = io.BytesIO()
    torch.onnx.export(model, (x[:2],), file, input_names=["x"], verbose=False, **options)
    return ReferenceEvaluator(onnx.load_from_string(file.getvalue())).run(None, {"x": x.numpy()})[0]


ANY = {0: torch.export.Dim("N")}
EXPORTERS = {
    "torch.export": lambda model, x: torch.export.export(model, (x[:2],), dynamic_shapes=(ANY,)).module()(x),
    "torch.onnx": lambda model, x: run_onnx(model, x, dynamo=True, dynamic_shapes=(ANY,)),
    "torch.onnx by tracing": lambda model, x: run_onnx(model, x, dynamo=False, dynamic_axes={"x": {0: "N"}}),
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, x[:2])(x),
    "torch.compile": lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager")(x),  # without g++
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", EXPORTERS)
def test_every_exporter_of_torch_takes_the_network_for_any_number_of_images(images, name):
    model, x = net.Net().eval(), net.to_input(images)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(EXPORTERS[name](model, x)), model(x))


def test_where_torch_lacks_onednn_the_predictions_are_the_same(images, monkeypatch):
    def fail(tensor):
        raise RuntimeError("PyTorch is built without MKL-DNN")

    model = net.Net()
    expected = net.predict(model, images)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", fail)
    torch.testing.assert_close(net.predict(model, images), expected, atol=1e-4, rtol=1e-4)
