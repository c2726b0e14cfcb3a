"""evaluate --export: the exported files compared with the model, and what is refused. ONNX Runtime: in containers."""

import json
import os
import re
import shutil
from pathlib import Path

import onnx
import pytest
import safetensors
import torch
import yaml
from onnx.reference import ReferenceEvaluator

import evaluate
import net
import stages
from export import card, exporter
from stage import weights
from stage.process import Failure

FILES = {"README.md", "model.onnx", "model.safetensors"}
IMAGES = 300  # of the 10,000 test images: the comparison takes 5 ms an image


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """Has evaluate read only the first test images."""
    read_images = evaluate.read_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "read_images", lambda *words: [part[:IMAGES] for part in read_images(*words)])
        yield


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A volume with the export of a model, to look at."""
    volume = shutil.copytree(trained, tmp_path_factory.mktemp("exported") / "volume")
    stages.assert_succeeds(stages.call("evaluate", "--export", model=volume))
    return volume


@pytest.fixture
def model(exported):
    model = net.Net()
    weights.load_model(model, exported)
    return model


@pytest.fixture
def images(data):
    return evaluate.read_images(data, "test")[0]


def expected_metadata(volume):
    return {
        "model_sha256": stages.sha256(volume / "mnist_cnn.pt"),
        "data_set": "MNIST",
        "classes": json.dumps([*"0123456789"]),
        "pixel_mean": "0.1307",
        "pixel_std": "0.3081",
        "accuracy": str(stages.read_json(volume / "eval_results.json")["Accuracy"]),
    }


def blocks_of_code(volume, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (volume / "export/README.md").read_text(), re.DOTALL)


def test_the_export_has_three_files_beside_those_of_evaluate(exported):
    assert {path.name for path in (exported / "export").iterdir()} == FILES
    names = stages.MADE_BY["train"] | stages.MADE_BY["evaluate"] | {f"export/{name}" for name in FILES}
    assert {*stages.contents(exported)} == names


def test_the_safetensors_are_the_weights_and_name_the_model_classes_normalisation_and_accuracy(exported, model):
    with safetensors.safe_open(exported / "export/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} | expected_metadata(exported)
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    assert found.keys() == model.state_dict().keys()
    assert all(tensor.equal(found[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("count", [1, 7])
def test_the_onnx_model_takes_any_number_of_images_as_they_are(exported, model, images, count):
    file = onnx.load(exported / "export/model.onnx")
    assert {entry.key: entry.value for entry in file.metadata_props} == expected_metadata(exported)
    ((output),) = ReferenceEvaluator(file).run(None, {"images": images[:count].numpy()})
    torch.testing.assert_close(torch.from_numpy(output), net.predict(model, images[:count]))
    for value, kind, shape in (
        (file.graph.input[0], onnx.TensorProto.UINT8, ["N", 28, 28]),
        (file.graph.output[0], onnx.TensorProto.FLOAT, ["N", 10]),
    ):
        tensor = value.type.tensor_type
        assert (tensor.elem_type, [side.dim_param or side.dim_value for side in tensor.shape.dim]) == (kind, shape)


def test_no_exported_file_has_a_path_of_the_machine(exported):
    for path in (exported / "export").iterdir():
        assert not [folder for folder in (stages.TREE, exported) if os.fsencode(folder) in path.read_bytes()], path


def test_the_card_has_metadata_in_the_form_that_the_hub_reads(exported):
    _, block, text = (exported / "export/README.md").read_text().split("---\n", 2)
    metadata, results = yaml.safe_load(block), stages.read_json(exported / "eval_results.json")
    assert (metadata["license"], metadata["datasets"]) == ("mit", ["mnist"])
    ((result,),) = [entry["results"] for entry in metadata["model-index"]]
    assert result["task"]["type"] == metadata["pipeline_tag"] == "image-classification"
    assert result["dataset"] == {"type": "mnist", "name": "MNIST", "split": "test"}
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {
        "accuracy": pytest.approx(results["Accuracy"] / 100),
        "loss": pytest.approx(results["Test loss"], abs=1e-4),
    }
    assert "$" not in text


def test_the_card_tells_how_the_model_was_trained_if_that_is_known(exported, volume):
    (block,) = blocks_of_code(exported, "json")
    record = stages.results(exported)
    assert json.loads(block) == {name: record[name] for name in card.OF_TRAINING}
    stages.edit_record(volume, model_sha256="another")
    results = stages.read_json(exported / "eval_results.json")
    training = exporter.code.training_of(volume, stages.sha256(volume / "mnist_cnn.pt"))
    assert "elsewhere" in card.model_card(results, expected_metadata(exported), training, 1e-7)


def test_the_code_on_the_card_for_safetensors_and_pytorch_works(exported, model, images, monkeypatch):
    monkeypatch.chdir(exported / "export")
    _, for_safetensors, for_pytorch = blocks_of_code(exported)
    names = {"images": images.numpy()}
    exec(for_safetensors, names)
    assert names["weights"]["conv1.weight"].shape == (10, 1, 5, 5)
    exec(for_pytorch, names)
    assert names["predictions"].tolist() == net.predict(model, images).argmax(1).tolist()


# What is refused ------------------------------------------------------------------------------------------------------


def test_an_export_that_does_not_match_the_model_is_not_published(exported, tmp_path, monkeypatch):
    volume = shutil.copytree(exported, tmp_path / "volume")
    load = exporter.safetensors.torch.load
    wrong = lambda content: {name: tensor + 1e-7 for name, tensor in load(content).items()}  # noqa: E731
    monkeypatch.setattr(exporter.safetensors.torch, "load", wrong)
    with stages.unchanged(volume / "export"):
        stages.assert_fails(stages.call("evaluate", "--export", model=volume), 1, "nothing is exported")
    assert [*volume.glob(".export*")] == []


@pytest.mark.parametrize(
    "change", [lambda right: right.roll(1, 1), lambda right: right - 1e-4], ids=["predictions", "probabilities"]
)
def test_an_onnx_model_of_other_predictions_or_probabilities_than_the_models_is_refused(
    exported, model, images, change
):
    right = net.predict(model, images)
    content = (exported / "export/model.onnx").read_bytes()
    assert exporter.check_onnx(content, images, right) < exporter.MAX_DIFFERENCE
    with pytest.raises(Failure, match="nothing is exported"):
        exporter.check_onnx(content, images, change(right))


def test_a_network_that_torch_cannot_export_is_one_line(volume, monkeypatch):
    forward = net.Net.forward
    monkeypatch.setattr(net.Net, "forward", lambda model, x: forward(model, x) + len(bytes(x.flatten().int()[:1])))
    stages.assert_fails(stages.call("evaluate", "--export", model=volume), 1, "net.py", "nothing is exported")
    assert not (volume / "export").exists()


def test_an_evaluation_that_fails_exports_nothing(volume):
    stages.assert_fails(stages.call("evaluate", "--export", "--min-accuracy", "100", model=volume), 1, "--min-accuracy")
    assert not (volume / "export").exists()


def test_what_cannot_end_well_is_refused_before_the_work_begins(volume, monkeypatch):
    (volume / "export").write_text("in the way")
    result = stages.call("evaluate", "--export", model=volume)
    stages.assert_fails(result, 1, volume / "export", "rm -r")
    assert result.stdout == ""
    (volume / "export").unlink()
    read_text, limit = Path.read_text, {"memory.max": "300000000"}
    monkeypatch.setattr(Path, "read_text", lambda path, *rest: limit.get(path.name) or read_text(path, *rest))
    stages.assert_fails(stages.call("evaluate", "--export", model=volume), 2, "MNIST_MEMORY")
    assert not (volume / "eval_results.json").exists()
