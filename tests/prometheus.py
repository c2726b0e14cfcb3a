"""The metrics of serve in Prometheus. pytest runs it only if it is named: make tools-test FLAGS="-k prometheus".

prometheus and promtool are those of Debian's packages.
"""

import json
import shutil
import subprocess
import urllib.parse
import urllib.request

import pytest

import stages
from test_serve import digit, serving  # noqa: F401 (a fixture)

DEPLOY = stages.TREE / "deploy"
ADDRESS = "127.0.0.1:8000"  # in prometheus.yml


@pytest.fixture
def prometheus(tmp_path):
    """A function that runs Prometheus on a service; the block has a function that asks it a question in PromQL."""
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        pytest.fail("prometheus and promtool are missing: apt-get install prometheus")
    port = stages.free_port()

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
