"""The export in its container, and its files where torch is not installed."""

import json
import shutil
import subprocess

import pytest

from environments import make_environment
from pipeline import Pipeline, in_image
from stages import DATA, RAW, STAGES, TREE, assert_succeeds, read_json

SIZE = "du -sm --apparent-size /opt/export | cut -f1"


@pytest.fixture(scope="module")
def exported(complete, tmp_path_factory):
    """The volume after an export, in little more memory than evaluate asks for."""
    volume = shutil.copytree(complete, tmp_path_factory.mktemp("exported") / "volume")
    with Pipeline(volume, environment={"MNIST_MEMORY": "441000000"}) as project:
        assert_succeeds(project.run("export"))
    return volume


def test_onnx_runtime_and_numpy_alone_reach_the_accuracy_to_the_last_image(exported, tmp_path):
    python = make_environment(tmp_path / "venv", TREE / "tests/containers/requirements-onnxruntime.txt")
    words = [python, TREE / "tests/exported.py", exported / "export", DATA / RAW]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, accuracy = json.loads(done.stdout), read_json(exported / "eval_results.json")["Accuracy"]
    assert found["model.onnx"] == found["model.safetensors"] == pytest.approx(accuracy)
    assert found["difference"] <= 1e-5


def test_what_exporting_needs_takes_40_mb_at_most_and_is_in_the_image_of_export_alone(exported):
    assert 10 <= int(in_image("export", SIZE)) <= 40
    assert {in_image(stage, "ls -d /opt/export; true") for stage in STAGES} == {""}


def test_evaluate_names_the_service_that_exports(first_run):
    project, _ = first_run
    refused = project.run("evaluate", "--export")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.endswith("Run: docker compose run --rm export\n")
