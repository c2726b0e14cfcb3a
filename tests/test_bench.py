"""The benchmark of the service: the clients, and the table."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import stages

BENCH = stages.TREE / "tests/bench"
sys.path.append(str(BENCH))

import report

BODIES = ['{"input": 1}', '{"input": 2}']


@pytest.fixture
def service():
    """A service that refuses every second request and fails at those that it is told to; its address and requests."""
    requests = []

    class Service(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            requests.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(500 if requests[-1] == "fail" else 200 if len(requests) % 2 == 0 else 409)
            self.send_header("Content-Length", "100000")  # more than one packet
            self.end_headers()
            self.wfile.write(b" " * 100_000)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_port}", requests
        server.shutdown()


def load(address, clients, bodies):
    words = [sys.executable, BENCH / "load.py", address, str(clients), "0.5"]
    return subprocess.run(words, input=json.dumps(bodies), capture_output=True, text=True, timeout=60, check=False)


def test_a_client_sends_a_refused_request_again_and_then_the_next_one(service):
    address, requests = service
    result = json.loads(load(address, 1, BODIES).stdout)
    assert requests[:5] == [BODIES[0], BODIES[0], BODIES[1], BODIES[1], BODIES[0]]
    assert result["statuses"]["409"] + result["statuses"]["200"] == len(requests)
    assert len(result["latencies"]) == result["statuses"]["200"]
    assert min(result["latencies"]) >= 0.01  # the pause after a refusal
    assert result["seconds"] >= 0.5


def test_all_clients_get_responses_and_an_error_of_the_service_is_not_counted_as_a_refusal(service):
    address, _ = service
    assert load(address, 8, BODIES).returncode == 0
    failed = load(address, 8, ["fail"])
    assert failed.returncode != 0
    assert "status 500" in failed.stderr


def test_the_table_says_how_many_times_as_fast_serve_is():
    ours = {f"{name}, {clients} clients": 2 for name in (*report.FIGURES, "refused") for clients in report.CLIENTS}
    other = ours | {"p50, 32 clients": 3, "predictions/s, 32 clients": 1, "refused, 32 clients": 0.5}
    table = report.service_table([{"kind": "services", "serve": ours, "Cog": other}, {"kind": "default"}])
    row = next(line for line in table.splitlines() if line.startswith("| Cog | 32 |"))
    assert row == "| Cog | 32 | 3,000.00 ms | 2,000.00 ms | 1 | 2,000.00 ms | 50.0 % | 1.50 | 1.00 | 2.00 | 1.00 |"
    assert "FastAPI" not in table
