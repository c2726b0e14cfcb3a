"""The results in programs from elsewhere: dvc and MLflow. pytest runs it only if it is named: make tools-test.

Both are installed into an environment of their own.
"""

import json
import os
import re
import shutil
import subprocess

import pytest

import stages
from environments import make_environment

DOCUMENT = stages.TREE / "docs/export.md"


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """The folder with the programs of dvc and MLflow."""
    return make_environment(tmp_path_factory.mktemp("tools"), stages.TREE / "tests/requirements-tools.txt").parent


@pytest.fixture
def out(finished, tmp_path, monkeypatch):
    """A current folder that has a copy of the volume in `out`, and is a repository of dvc."""
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "out"


def documented(start):
    """The one command in the document that begins so."""
    (found,) = re.findall(rf"^    ({re.escape(start)}.*)$", DOCUMENT.read_text(), re.MULTILINE)
    return found


def run(command, tools, **env):
    """Runs a shell command with the programs of a folder, and returns what it prints."""
    variables = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"} | env
    done = subprocess.run(["sh", "-c", command], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dvc_shows_the_accuracy_and_the_loss_as_metrics(tools, out):
    run("dvc init --no-scm", tools)
    results = stages.read_json(out / "eval_results.json")
    shown = json.loads(run(f"{documented('dvc metrics show')} --json --precision 9", tools))
    (metrics,) = shown[""]["data"].values()
    assert metrics["data"] == {name: results[name] for name in ("Accuracy", "Test loss", "model_sha256")}


def test_dvc_plots_the_figures_of_the_classes(tools, out):
    run("dvc init --no-scm", tools)
    plot = json.loads(run(f"{documented('dvc plots show')} --show-vega", tools))
    values = plot["data"]["values"]
    results = stages.read_json(out / "eval_results.json")["classes"]
    assert [(value["class"], value["f1"]) for value in values] == [(row["class"], row["f1"]) for row in results]


def test_mlflow_logs_the_results(tools, out, tmp_path):
    variables = {"MLFLOW_TRACKING_URI": f"file:{tmp_path}/runs", "MLFLOW_ALLOW_FILE_STORE": "true"}
    run(documented("python -c 'import json, mlflow"), tools, **variables)
    look = (
        "import json, mlflow; (run,) = mlflow.search_runs(output_format='list'); print(json.dumps(run.data.metrics)); "
    )
    look += "print(mlflow.artifacts.load_text(f'{run.info.artifact_uri}/eval_results.json'))"
    metrics, _, logged = run(f'python -c "{look}"', tools, **variables).partition("\n")
    results = stages.read_json(out / "eval_results.json")
    assert json.loads(metrics) == {name: results[name] for name in ("Accuracy", "Test loss")}
    assert json.loads(logged) == results
