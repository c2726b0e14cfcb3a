"""The results and the metrics in programs from elsewhere: dvc, MLflow, Prometheus. pytest runs it only if it is named.

make tools-test
.venv/bin/python -m pytest tests/other_programs.py -k prometheus

dvc and MLflow are installed into an environment of their own; prometheus and promtool are those of Debian's packages.
"""

import json
import os
import re
import shutil
import subprocess
import urllib.parse
import urllib.request

import pytest

import nodes
import stages
from environments import make_environment
from test_serve import digit, serving  # noqa: F401 (a fixture)

DEPLOY, DOCUMENT = stages.TREE / "deploy", stages.TREE / "docs/export.md"
ADDRESS = "127.0.0.1:8000"  # in deploy/prometheus.yml


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


@pytest.fixture
def prometheus(tmp_path):
    """A function that runs Prometheus on a service; the block has a function that asks it a question in PromQL."""
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        pytest.fail("prometheus and promtool are missing: apt-get install prometheus")
    port = nodes.free_port()

    def ask(question):
        query = urllib.parse.urlencode({"query": question})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}") as answer:
            return json.load(answer)["data"]["result"]

    def start(service):
        text = (DEPLOY / "prometheus.yml").read_text()
        assert ADDRESS in text
        text = text.replace(ADDRESS, f"127.0.0.1:{service.port}").replace("5s", "1s")
        (tmp_path / "prometheus.yml").write_text(text)
        words = ["prometheus", "--config.file", tmp_path / "prometheus.yml", "--storage.tsdb.path", tmp_path / "tsdb"]
        return stages.running([*map(str, words), "--web.listen-address", f"127.0.0.1:{port}"])

    return start, ask


def answers(ask, question):
    """Whether Prometheus has an answer, once it is up."""
    try:
        return ask(question)
    except OSError:
        return []


def test_promtool_accepts_the_configuration_and_the_metrics(finished):
    checked = subprocess.run(
        ["promtool", "check", "config", DEPLOY / "prometheus.yml"], capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    with serving(finished) as service:
        metrics = service("GET", "/metrics")[2]
    checked = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")


def test_prometheus_has_the_accuracy_and_answers_every_question_of_the_dashboard(finished, digit, prometheus):  # noqa: F811
    start, ask = prometheus
    dashboard = stages.read_json(DEPLOY / "grafana.json")
    questions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    with serving(finished) as service, start(service):
        assert service.predict(digit)[0] == 200
        (found,) = stages.wait_until(lambda: answers(ask, "mnist_model_accuracy_ratio"), "a scrape")
        assert 100 * float(found["value"][1]) == pytest.approx(
            stages.read_json(finished / "eval_results.json")["Accuracy"]
        )
        for question in questions:
            stages.wait_until(lambda question=question: answers(ask, question), question)
