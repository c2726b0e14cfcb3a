"""The export in its container, and its files where torch is not installed."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

import example
from environments import make_environment
from pipeline import Pipeline, in_image
from stages import RAW, STAGES, TREE, assert_succeeds, read_json

ALL, FEW = "model, images, log_probabilities, results)", "model, images[:500], log_probabilities[:500], results)"
# Uses an export: saves what ONNX Runtime makes of the test images, and the tensors of the other file.
USE = """
import importlib.util, sys
import numpy, onnxruntime, safetensors.numpy

assert importlib.util.find_spec("torch") is None
export, images, outputs = sys.argv[1:]
images = numpy.fromfile(images, numpy.uint8, offset=16).reshape(-1, 28, 28)
(log_probabilities,) = onnxruntime.InferenceSession(f"{export}/model.onnx").run(None, {"images": images})
weights = safetensors.numpy.load_file(f"{export}/model.safetensors")
numpy.savez(outputs, log_probabilities=log_probabilities, **weights)
"""
SIZE = "du -sm --apparent-size /opt/export | cut -f1"


@pytest.fixture(scope="module")
def exported(complete, tmp_path_factory):
    """The volume after an export, in little more memory than evaluate asks for. It compares few images, to be soon."""
    folder = tmp_path_factory.mktemp("exported")
    text = (TREE / "model-eval/evaluate.py").read_text()
    assert text.count(ALL) == 1
    (folder / "evaluate.py").write_text(text.replace(ALL, FEW))
    mount = {"volumes": [f"{folder}/evaluate.py:/opt/app/evaluate.py:ro"]}
    volume = shutil.copytree(complete, folder / "volume")
    with Pipeline(volume, environment={"MNIST_MEMORY": "441000000"}, export=mount) as project:
        assert_succeeds(project.run("export"))
    return volume


def test_onnx_runtime_and_numpy_find_the_model_to_the_last_image_where_torch_is_not_installed(exported, data, tmp_path):
    python = make_environment(tmp_path / "venv", TREE / "tests/containers/requirements-onnxruntime.txt")
    words = [python, "-c", USE, exported / "export", data / RAW / "t10k-images-idx3-ubyte", tmp_path / "outputs.npz"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: torch.from_numpy(array) for name, array in np.load(tmp_path / "outputs.npz").items()}
    log_probabilities = found.pop("log_probabilities")
    weights = torch.load(exported / "mnist_cnn.pt", weights_only=True)
    assert found.keys() == weights.keys()
    assert all(found[name].equal(weights[name]) for name in weights)
    images, labels = example.read_test_images(data)
    expected = example.predict(example.load(exported / "mnist_cnn.pt"), images)
    assert (log_probabilities.exp() - expected.exp()).abs().max() <= 1e-5
    accuracy = 100 * (log_probabilities.argmax(1) == labels).sum().item() / len(labels)
    assert accuracy == pytest.approx(read_json(exported / "eval_results.json")["Accuracy"])


def test_what_exporting_needs_takes_40_mb_at_most_and_is_in_the_image_of_export_alone(exported):
    assert 10 <= int(in_image("export", SIZE)) <= 40
    assert {in_image(stage, "ls -d /opt/export; true") for stage in STAGES} == {""}


def test_evaluate_names_the_service_that_exports(first_run):
    project, _ = first_run
    refused = project.run("evaluate", "--export")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.endswith("Run: docker compose run --rm export\n")
