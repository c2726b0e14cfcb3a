"""serve as a process on loopback: API, hostile requests, limits, metrics, reloading the model, stopping."""

import asyncio
import base64
import contextlib
import dataclasses
import errno
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import pytest
import torch
import yaml
from PIL import Image
from starlette.exceptions import HTTPException

import serve
import stages
from pictures import reading
from pictures.prediction import NotFinite, load_predictor
from rendering import encode
from stage import VERSION, dataset, process
from stage.images import read_images
from stage.process import Failure
from web import api, pool, served_model, worker
from web.metrics import Metrics
from web.request_limits import RequestLimits
from web.results import read_results
from web.service import Service as Endpoints
from web.service import watch

WAIT = 30  # seconds at most, for something that takes about one


class Service:
    """A running serve, and a client for it."""

    def __init__(self, process, port):
        self.process, self.port = process, port

    def __call__(self, method, path, body=None, **headers):
        """Send a request, with bytes or an object as JSON; return the response's status, headers and parsed content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
            response = connection.getresponse()
            content = response.read()
        is_json = method != "HEAD" and response.getheader("Content-Type", "").startswith("application/json")
        return response.status, response.headers, json.loads(content) if is_json else content

    def predict(self, content):
        """Request the prediction of a picture, given as the content of its file; return status and content."""
        status, _, response = self("POST", "/predictions", {"input": {"image": data_url(content)}})
        return status, response

    def health(self):
        return self("GET", "/health-check")[2]


def data_url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


@contextlib.contextmanager
def serving(model, data=stages.DATA, program=None, status="READY"):
    """Run the service on a model folder, a data folder and a free port; the block has it once it has the status."""
    port = stages.free_port()
    command = stages.command("serve", "--port", str(port), model=model, data=data)
    command[1] = program or command[1]
    with stages.running(command) as process:
        process.stdout.readline()  # printed once it listens
        service = Service(process, port)
        stages.wait_until(lambda: service.health()["status"] == status, status)
        yield service


@pytest.fixture(scope="module")
def service(trained):
    with serving(trained) as running:
        yield running


@pytest.fixture(scope="module")
def digit(data):
    """A PNG of a 7, dark on white, 280 x 280 pixels."""
    return encode(Image.fromarray(255 - read_images(data, "test")[0][0].numpy()).resize((280, 280)))


# Starting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", ["--data=", "--model=", "--host=", "--allow-host=", "--port 0", "--port 65536", "--port " + 5_000 * "9"]
)
def test_a_wrong_flag_is_refused_in_one_line_and_nothing_is_touched(tmp_path, flags):
    result = stages.call("serve", *flags.split(), model=tmp_path / "volume")
    stages.assert_fails(result, 2, flags.replace("=", " ").split()[0])
    assert "parse_" not in result.stderr  # argparse names the function that raises a ValueError
    assert not (tmp_path / "volume").exists()


def test_the_program_and_the_api_tell_the_version_of_the_pipeline(tmp_path):
    result = stages.call("serve", "--version", model=tmp_path)
    stages.assert_succeeds(result)
    assert result.stdout == f"serve {VERSION}\n"
    assert api.describe()["info"]["version"] == VERSION


def test_its_container_starts_where_it_is_named_comes_back_reads_only_and_is_reached_from_this_machine_alone():
    services = yaml.safe_load((stages.TREE / "docker-compose.yml").read_text())["services"]
    serve = services["serve"]
    assert (serve["profiles"], serve["restart"]) == (["serve"], "unless-stopped")
    assert "start_interval" not in serve["healthcheck"]  # which needs a newer engine than the stages
    assert (serve["build"], serve["image"]) == (services["infer"]["build"], services["infer"]["image"])
    success = {"condition": "service_completed_successfully"}
    assert serve["depends_on"] == {"train": success, "evaluate": success}
    assert serve["ports"] == ["127.0.0.1:${MNIST_PORT:-8000}:${MNIST_PORT:-8000}"]
    assert all(volume.endswith(":ro") for volume in serve["volumes"])
    assert "network_mode" not in serve
    for right in ("read_only", "cap_drop", "cap_add", "security_opt", "init"):
        assert serve[right] == services["evaluate"][right]


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.7"], ids=["the port is in use", "not of this machine"])
def test_an_address_that_it_cannot_listen_on_is_refused_in_one_line_with_the_flags_that_change_it(tmp_path, host):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = stages.run("serve", "--host", host, "--port", port, model=tmp_path)
    stages.assert_fails(result, 1, host, port, "--port", "MNIST_PORT", "--host")


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_the_address_that_it_prints_can_be_opened(capsys, host, url):
    if host == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    port = stages.free_port()
    serve.listen(host, port).close()
    assert f"http://{url}:{port} " in capsys.readouterr().out


# The API --------------------------------------------------------------------------------------------------------------


def test_a_prediction_has_cogs_fields_and_the_probabilities_of_infer_to_the_last_bit(service, digit, predictor):
    status, response = service.predict(digit)
    output = response["output"]
    assert (status, response["status"], output["prediction"]) == (200, "succeeded", 7)
    assert response["metrics"]["predict_time"] > 0
    read, pixels = reading.read(Image.open(io.BytesIO(digit)), predictor)
    returned = Image.open(io.BytesIO(base64.b64decode(output.pop("image").partition(",")[2])))
    assert returned.tobytes() == pixels.numpy().tobytes()
    assert output == json.loads(json.dumps(read))
    assert predictor.predict(pixels).items() <= output.items()


def test_a_client_can_choose_the_id_of_a_prediction(service, digit):
    body = {"input": {"image": data_url(digit)}}
    for name in ("mine-1", "v1.2_" + 75 * "x"):
        assert service("PUT", f"/predictions/{name}", body)[2]["id"] == name
        assert service("POST", "/predictions", body | {"id": name})[2]["id"] == name
        assert service("PUT", f"/predictions/{name}", body | {"id": "other"})[0] == 422
        assert service("POST", f"/predictions/{name}/cancel")[0] == 404  # none is under way
    assert service("POST", "/predictions", body)[2]["id"] != service("POST", "/predictions", body)[2]["id"]


def test_what_else_cogs_clients_send_is_accepted_but_a_webhook_is_not(service, digit):
    body = {"input": {"image": data_url(digit)}, "webhook": None, "created_at": "2026-01-01T00:00:00Z", "context": {}}
    body |= {"output_file_prefix": "x", "webhook_events_filter": ["completed"], "unknown": 1}
    status, _, response = service("POST", "/predictions", body)
    assert (status, response["logs"]) == (200, "")
    assert service("POST", "/predictions", body | {"webhook": "http://127.0.0.1:1/"})[0] == 422


@pytest.mark.parametrize(
    ("header", "quote"),
    [
        ("data:;base64,", lambda text: text),
        ("data:image/png;base64, ", lambda text: text + "\n"),
        ("data:image/png;base64,", lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))),
        ("data:image/png;base64,", lambda text: urllib.parse.quote(text, safe="")),
        ("data:image/png;base64,", lambda text: "".join(f"%{ord(character):02x}" for character in text)),
        ('data:image/png;name="my digit (1).png";base64,', lambda text: text),
        ("data:image/png;name=my%20digit.png;charset=utf-8;base64,", lambda text: text),
        ("DATA:IMAGE/PNG;BASE64,", lambda text: text),
    ],
)
def test_a_data_url_is_read_as_urllib_and_browsers_read_it(service, digit, header, quote):
    image = header + quote(base64.b64encode(digit).decode())
    assert service("POST", "/predictions", {"input": {"image": image}})[2]["output"]["prediction"] == 7


def test_a_data_url_with_very_many_coded_characters_is_refused(service):
    status, _, response = service("POST", "/predictions", {"input": {"image": "data:;base64," + 1_000_001 * "%41"}})
    assert status == 422
    assert "%-coded" in response["detail"]


@pytest.mark.parametrize("path", ["/", "/docs", "/page.js", "/openapi.json", "/health-check", "/results", "/metrics"])
def test_head_has_the_headers_of_get_and_no_content(service, path):
    status, headers, content = service("HEAD", path)
    assert (status, content) == (200, b"")
    assert headers["Content-Type"] == service("GET", path)[1]["Content-Type"]


def test_the_page_loads_nothing_from_other_hosts_and_the_api_is_at_the_same_one(service):
    assert service("GET", "/", Accept="text/html,*/*")[2].startswith(b"<!doctype html>")
    assert service("GET", "/", Accept="application/json")[2]["predictions_url"] == "/predictions"
    for path in ("/docs", "/style.css", "/page.js", "/openapi.json"):
        status, headers, content = service("GET", path)
        assert status == 200
        assert b"http://" not in bytes(str(content), "utf-8").replace(b"http://www.w3.org/2000/svg", b"")
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


def test_results_are_read_from_the_volume(service, trained):
    results = service("GET", "/results")[2]
    assert results["training"]["state"] == "finished"
    assert results["model"]["sha256"] == stages.sha256(trained / "mnist_cnn.pt")
    assert results["evaluation"] is results["predictions"] is None  # only train has run


def test_metrics_count_requests_and_name_the_model(service, digit, trained):
    service.predict(digit)
    text = service("GET", "/metrics")[2].decode()
    for name in ('mnist_requests_total{route="/predictions",status="200"}', "mnist_requests_in_progress 1.0",
                 'mnist_request_duration_seconds_bucket{le="0.005",route="/predictions"}',
                 f'mnist_model_info{{sha256="{stages.sha256(trained / "mnist_cnn.pt")}"}} 1.0'):  # fmt: skip
        assert name in text
    one, all_together = (
        float(re.search(rf"^{name}_bytes (\S+)", text, re.MULTILINE)[1])
        for name in ("process_resident_memory", "mnist_memory")
    )
    assert all_together > one + 50_000_000  # torch is loaded in the workers only


# Hostile requests -----------------------------------------------------------------------------------------------------


def png_claiming(width, height):
    """Return a PNG whose header claims a size, with hardly any pixels."""
    whole = encode(Image.new("L", (32, 32)))  # a header chunk, with a checksum, is from byte 12 to 33
    header = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def hostile_pictures():
    """Yield names and contents of damaged, blank, huge and unusual pictures, and of files that are no pictures.

    What the preparation makes of truncated files, formats, modes and sizes is in test_picture.py.
    """
    plain = Image.linear_gradient("L")
    for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000"):
        whole = encode(plain.convert("RGB"), format)
        yield f"{format} altered", whole[:40] + bytes(byte ^ 0x5A for byte in whole[40:80]) + whole[80:]
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "LA"):
        for color in (0, 1):
            yield f"blank {mode} {color}", encode(Image.new(mode, (50, 50), color), "TIFF")
    for width, height in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (0, 0), (1, 2**31 - 1), (8000, 8000)):
        yield f"claims {width} x {height}", png_claiming(width, height)
    yield "bomb", encode(Image.new("1", (20_000, 20_000)))
    yield "50 megapixels", encode(Image.new("L", (7_000, 7_000), 255))
    yield "NaN", encode(Image.new("F", (50, 50), float("nan")), "TIFF")
    for content in (
        *(b"", bytes(100_000), b"<script>alert(1)</script>", b"%PDF-1.4\n", b"/etc/passwd"),
        *(b"\x7fELF" + bytes(99), b"PK\x03\x04" + bytes(99), b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file\n"),
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    ):
        yield f"{content[:20]}", content


def hostile_bodies():
    """Yield names and contents of bodies that are not a valid request for a prediction."""
    image = '{"input": {"image": %s}}'
    for value in ("null", "1", "NaN", "Infinity", "[]", "{}", "true", '""', '"\\ud800"', '"\\u0000"', '"x"', '"data:,"',
                  '"http://127.0.0.1/x.png"', '"file:///etc/passwd"', '"data:image/png;base64,%%%"', '"/etc/passwd"',
                  '"data:image/png;base64,\u00e9"', '"data:image/png;base64,AAA"'):  # fmt: skip
        yield f"image {value}", (image % value).encode()
    for text in ("", "{", "[]", "null", "NaN", '"x"', "[" * 100_000, '{"input":' * 20_000, "1" * 10_000, "{}" * 9,
                 '{"input": {}}', '{"input": {"image": "data:,"}, "webhook": "http://127.0.0.1/"}',
                 '{"input": {"image": "x", "\\ud800": 1}}', '{"id": "../../x", "input": {"image": "x"}}'):  # fmt: skip
        yield f"body {text[:20]}", text.encode()
    yield "not UTF-8", b'{"input": {"image": "\xff\xfe"}}'
    yield "UTF-16", (image % '"x"').encode("utf-16")


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in hostile_pictures()])
def test_a_hostile_picture_is_predicted_or_refused_in_one_line(service, content):
    status, response = service.predict(content)
    assert status in (200, 422)
    if status == 422:
        assert response["detail"].strip()
        assert len(response["detail"].splitlines()) == 1


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in hostile_bodies()])
def test_a_hostile_body_is_refused_in_one_line(service, body):
    status, _, response = service("POST", "/predictions", body)
    assert status in (400, 422)
    assert len(response["detail"].splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "method", "path", "headers"),
    [
        *((200, "GET", "/", {"Host": host}) for host in ("127.0.0.1", "192.0.2.7:80", "[::7]:80", "LOCALHOST.")),
        *((200, "GET", probe, {"Host": "host.docker.internal:8000"}) for probe in ("/health-check", "/metrics")),
        *((421, "GET", "/", {"Host": host}) for host in ("evil.example", "127.0.0.1.evil.example:80")),
        (421, "POST", "/predictions", {"Host": ""}),
        (415, "POST", "/predictions", {"Content-Type": "text/plain"}),
        (413, "POST", "/predictions", {"Content-Length": "9999999999"}),
        *(
            (404, "GET", f"/results/{name}", {})
            for name in ("../../etc/passwd", "%2e%2e%2fmnist_cnn.pt", "checkpoint.pt")
        ),
        *((404, "GET", path, {}) for path in ("/nothing", "/docs/")),
        (405, "DELETE", "/predictions", {}),
        *((405, "PUT", path, {"Content-Type": "text/plain"}) for path in ("/results", "/docs")),
        (422, "PUT", "/predictions/" + "x" * 81, {}),
        *((422, "PUT", "/predictions/" + name, {}) for name in ("x" * 300, "%E2%82%AC", 2000 * "%FF")),
        (404, "POST", "/predictions/unknown/cancel", {"Content-Type": "text/plain"}),
        (405, "HEAD", "/predictions", {}),
    ],
)
def test_a_request_is_accepted_or_refused_with_its_status(service, status, method, path, headers):
    actual, response_headers, _ = service(method, path, b"{}" if method in ("POST", "PUT") else None, **headers)
    assert actual == status
    assert "Content-Security-Policy" in response_headers


def test_names_are_allowed_as_they_are_in_the_host_header():
    limits = RequestLimits(None, ["Digits.example:8000", "two.example.", "::1"], Metrics())
    for host in ("digits.example", "TWO.example:80"):
        limits.check({"method": "GET", "path": "/", "headers": [(b"host", host.encode())]})
    with pytest.raises(HTTPException, match="--allow-host"):
        limits.check({"method": "GET", "path": "/", "headers": []})


def test_a_response_that_has_begun_when_the_service_stops_is_not_begun_again():
    sent = []

    async def begin(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message["type"])

    async def check():
        scope = {"type": "http", "method": "GET", "path": "/health-check", "headers": []}
        request = asyncio.create_task(RequestLimits(begin, [], Metrics())(scope, None, send))
        await asyncio.sleep(0)  # until it waits
        request.cancel()
        await asyncio.wait([request])

    asyncio.run(check())
    assert sent == ["http.response.start"]


def test_a_request_for_another_protocol_is_answered_without_it_or_refused_for_it(service):
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"}
    assert service("GET", "/health-check", **headers)[0] == 200
    status, answered, response = service("POST", "/predictions", {"input": {"image": "x"}}, **headers)
    assert (status, answered["Connection"]) == (400, "close")
    assert "without Upgrade" in response["detail"]


@pytest.mark.parametrize("values", [(b"Upgrade", b"keep-alive"), (b"keep-alive", b"Upgrade")])
def test_a_request_for_another_protocol_is_noticed_in_any_of_two_headers(values):
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"upgrade", b"h2c")]
    headers += [(b"connection", value) for value in values]
    with pytest.raises(HTTPException, match="without Upgrade"):
        RequestLimits(None, [], Metrics()).check({"method": "POST", "path": "/predictions", "headers": headers})


HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED, CHUNK = b"Transfer-Encoding: chunked\r\n\r\n", b"f4240\r\n" + b" " * 1_000_000 + b"\r\n"


@pytest.mark.parametrize(
    ("path", "more", "part"),
    [
        (b"/predictions", CHUNKED, CHUNK),
        (b"/predictions", b"", b"X: " + b"x" * 100_000 + b"\r\n"),
        (b"/no", CHUNKED, CHUNK),
        (b"/predictions", CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: " + b"x" * 100_000 + b"\r\n"),
        (b"/predictions", CHUNKED + b"2;", b"x" * 100_000),
    ],
    ids=["a body", "headers", "a body that no endpoint reads", "headers after the body", "an extension of a chunk"],
)
def test_a_request_without_end_is_cut_off(service, path, more, part):
    with socket.create_connection(("127.0.0.1", service.port), timeout=WAIT) as connection:
        connection.sendall(HEAD % path + more)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            connection.sendall(100 * part)


def test_a_silent_client_keeps_its_connection_only_between_two_requests(service):
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=WAIT))
        slow.sendall(HEAD % b"/predictions" + b"Content-Length: 100\r\n\r\n{")
        connections = []
        # No endpoint reads the second one's body, so that it is answered before that has come.
        for headers, more in (({}, b""), ({"Content-Length": "1000"}, b"a part"), ({}, b"GET / HTTP/1.1\r\nHost: ")):
            connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT)
            connections.append(stack.enter_context(contextlib.closing(connection)))
            connection.request("GET", "/health-check", headers=headers)
            assert json.load(connection.getresponse())["status"] == "READY"
            connection.sock.sendall(more)
        kept, *closed = connections
        assert [connection.sock.recv(1000) for connection in closed] == [b"", b""]
        assert b" 408 " in slow.recv(1000)
        kept.request("GET", "/health-check")
        assert json.load(kept.getresponse())["status"] == "READY"


@pytest.mark.parametrize("begun", [b"", b"GET /health-check HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_idle_connections_shut_nobody_out(service, digit, begun):
    with contextlib.ExitStack() as stack:
        connect = partial(socket.create_connection, ("127.0.0.1", service.port), timeout=WAIT)
        idle = [stack.enter_context(connect()) for _ in range(450)]
        for connection in idle:
            with contextlib.suppress(OSError):
                connection.sendall(begun)
        assert service.health()["status"] == "READY"
        assert service.predict(digit)[0] == 200


def test_an_overloaded_service_refuses_with_retry_after(service):
    # Large bodies from many clients at once; each picture takes about a second.
    large = {"input": {"image": data_url(encode(Image.effect_noise((4000, 4000), 80), compress_level=1))}}
    body = json.dumps(large).encode()
    with ThreadPoolExecutor(12) as pool:
        responses = [*pool.map(lambda _: service("POST", "/predictions", body), range(12))]
    statuses = {status for status, _, _ in responses}
    assert 503 in statuses <= {200, 422, 503}
    assert all(headers["Retry-After"] for status, headers, _ in responses if status == 503)


def test_responses_match_the_openapi_description(service):
    # A generated `image` is rarely a picture, so requests that match the description may be refused all the same.
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"http://127.0.0.1:{service.port}/openapi.json"]
    command += ["--exclude-checks", "positive_data_acceptance", "--max-examples", "30", "--generation-deterministic"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tempfile.gettempdir())
    assert result.returncode == 0, result.stdout


def test_after_the_hostile_requests_it_still_predicts_and_its_memory_is_bounded(service, digit):
    assert service.predict(digit)[1]["output"]["prediction"] == 7
    for number in (service.process.pid, *workers_of(service)):
        status = Path(f"/proc/{number}/status").read_text()
        # Its peak. One process at a time has a large picture, so that all together take less than 1 GB.
        assert 1024 * int(status.partition("VmHWM:")[2].split()[0]) < 750_000_000


@contextlib.asynccontextmanager
async def loaded(folder):
    """Yield the model in a folder as serve loads it, with workers that have ended after the block."""
    model = served_model.ServedModel(folder, stages.DATA)
    try:
        await model.refresh()
        yield model
    finally:
        model.end()


# Reloading and stopping -----------------------------------------------------------------------------------------------


def publish_model(folder, scale):
    """Replace the model in the folder atomically, as train does, and return its sha256."""
    weights = torch.load(folder / "mnist_cnn.pt", weights_only=True)
    torch.save({key: scale * value for key, value in weights.items()}, folder / "new.pt")
    os.replace(folder / "new.pt", folder / "mnist_cnn.pt")
    return stages.sha256(folder / "mnist_cnn.pt")


AS_FIRST_PROCESS = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: it adopts processes, as the first one of a container does
os.execv(sys.executable, [sys.executable, {!r}, *sys.argv[1:]])
"""


def test_a_new_model_is_loaded_a_damaged_one_is_not_and_no_processes_that_have_ended_are_kept(volume, digit, tmp_path):
    first = stages.sha256(volume / "mnist_cnn.pt")
    (tmp_path / "serve.py").write_text(AS_FIRST_PROCESS.format(stages.command("serve", model=volume)[1]))
    with serving(volume, program=str(tmp_path / "serve.py")) as service:
        (main,) = stages.children(service.process.pid)
        orphans = stages.children(main)
        whole = (volume / "mnist_cnn.pt").read_bytes()
        (volume / "mnist_cnn.pt").write_bytes(whole[:50_000])
        stages.wait_until(lambda: "damaged" in service.health()["setup"]["logs"])
        assert service.health()["model"]["sha256"] == first
        assert service.predict(digit)[0] == 200
        (volume / "mnist_cnn.pt").write_bytes(whole)
        second = publish_model(volume, 1.01)
        stages.wait_until(lambda: service.health()["model"]["sha256"] == second)
        assert f'mnist_model_info{{sha256="{second}"}}' in service("GET", "/metrics")[2].decode()
        stages.wait_until(lambda: not any(Path(f"/proc/{number}").exists() for number in (main, *orphans)))


def test_the_name_of_a_damaged_model_may_be_no_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    (folder / "mnist_cnn.pt").write_bytes(b"damaged")

    async def check():
        async with loaded(folder) as model:
            assert "damaged" in model.problem

    asyncio.run(check())


def test_a_model_whose_output_is_not_finite_is_not_loaded(volume):
    publish_model(volume, 1e30)
    with pytest.raises(Failure, match="not finite"):
        load_predictor(volume, stages.DATA)


@pytest.mark.parametrize(
    "changes",
    [*({"settings": {"epochs": n}} for n in (0, -1, "many", None)), {"batches": 1, "images_per_second": 5e-324}],
)
def test_damaged_results_and_those_that_make_a_number_infinite_are_left_out(volume, changes):
    stages.edit_record(volume, **changes)
    assert read_results(volume, None)["training"] is None


@pytest.mark.parametrize(("seconds", "state"), [(0, "running"), (-3600, "stopped"), (3600, "stopped")])
def test_a_training_runs_while_its_progress_is_dated_about_now_not_long_ago_or_ahead(unfinished, seconds, state):
    os.utime(unfinished / "train_results.json", (time.time() + seconds,) * 2)
    assert read_results(unfinished, None)["training"]["state"] == state


@pytest.mark.parametrize(("seconds", "year"), [(10**12, "9999"), (-(10**12), "0001")])
def test_a_model_may_have_any_date(seconds, year):
    assert served_model.as_iso(seconds)[:4] == year


def test_the_end_of_the_task_that_looks_for_new_models_fails_the_health_check(trained, monkeypatch, capsys):
    async def check():
        async with loaded(trained) as model:
            endpoints = Endpoints(model, Metrics())
            assert b'"status":"READY"' in (await endpoints.health_check(None)).body
            monkeypatch.setattr(served_model, "fingerprint", lambda path: {}[path])
            await watch(model)
            assert b'"status":"SETUP_FAILED"' in (await endpoints.health_check(None)).body

    asyncio.run(check())
    report = capsys.readouterr().err
    assert report.startswith("Traceback")
    assert report.splitlines()[-1].startswith("serve: looking for a new model failed (KeyError(")


def workers_of(service):
    """Return the ids of a service's workers."""
    started = stages.children(service.process.pid)
    return [*started, *(child for number in started for child in stages.children(number))]


def has_ended(number):
    """Return whether a process has ended, whether or not its parent has noted it."""
    try:
        return ") Z" in Path(f"/proc/{number}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_worker_that_is_killed_costs_at_most_its_request_and_is_replaced(trained, digit):
    with serving(trained) as service:
        for which in (0, -1):  # while it is idle
            before = workers_of(service)
            os.kill(before[which], signal.SIGKILL)
            stages.wait_until(lambda number=before[which]: has_ended(number))
            while not all(map(has_ended, before)):  # until all are replaced
                assert service.predict(digit)[0] == 200
        before = workers_of(service)
        os.kill(before[0], signal.SIGSTOP)
        os.kill(before[-1], signal.SIGSTOP)  # so that each has a request in progress
        with ThreadPoolExecutor(2) as pool:
            responses = [pool.submit(service.predict, digit) for _ in range(2)]
            stages.wait_until(lambda: b"mnist_requests_in_progress 3.0" in service("GET", "/metrics")[2])
            os.kill(before[-1], signal.SIGKILL)
            os.kill(before[0], signal.SIGCONT)
            assert sorted(response.result()[0] for response in responses) == [200, 503]
        stages.wait_until(lambda: service.predict(digit)[0] == 200 and not {*before} & {*workers_of(service)})
        assert service.health()["status"] == "READY"


def test_workers_that_end_are_replaced_once_the_model_can_be_loaded_and_until_then_it_says_why_not(volume, digit):
    weights = volume / "mnist_cnn.pt"
    whole = weights.read_bytes()
    with serving(volume) as service:
        for left, status in ((b"damaged", "SETUP_FAILED"), (None, "STARTING")):
            assert b"mnist_model_info{" in service("GET", "/metrics")[2]
            served = workers_of(service)
            weights.unlink()
            if left:
                weights.write_bytes(left)
            stages.wait_until(lambda: weights.name in service.health()["setup"]["logs"])
            for number in served:
                os.kill(number, signal.SIGKILL)
            stages.wait_until(lambda status=status: service.health()["status"] == status, status)
            code, _, response = service("POST", "/predictions", {"input": {"image": data_url(digit)}})
            assert (code, response["detail"]) == (503, service.health()["setup"]["logs"])
            assert process.command("train") in response["detail"]
            assert b"mnist_model_info{" not in service("GET", "/metrics")[2]
            weights.write_bytes(whole)
            stages.wait_until(lambda: service.health()["status"] == "READY")
            assert service.predict(digit)[0] == 200


def test_a_model_whose_file_is_gone_stays_in_use_and_a_damaged_one_is_not_loaded_again_and_again(volume):
    weights = volume / "mnist_cnn.pt"

    async def check():
        async with loaded(volume) as model:
            served = model.served
            weights.unlink()
            await model.refresh()
            assert model.served is served is not None
            assert "stays in use" in model.problem
            assert served_model.NO_MODEL not in model.problem
            weights.write_bytes(b"damaged")
            await model.refresh()
            assert model.served is served
            served.pool.workers[0].end()
            await asyncio.sleep(0)  # until the pool has noticed it
            assert not served.pool.is_whole()
            assert not model.has_changed()

    asyncio.run(check())


def test_a_worker_that_cannot_be_started_is_tried_again_and_reported_once(trained, monkeypatch, capsys):
    def no_pool(model, data):
        raise OSError(errno.EMFILE, "Too many open files")

    async def check():
        async with loaded(trained) as model:
            for one in model.served.pool.workers:
                one.end()
            await asyncio.sleep(0)  # until the pool has noticed it
            with monkeypatch.context() as patch:
                patch.setattr(served_model, "Pool", no_pool)
                await model.refresh()
                await model.refresh()
                assert (model.served, model.failed) == (None, True)
                assert "Too many open files" in model.problem
            await model.refresh()
            assert model.served.pool.is_whole()

    asyncio.run(check())
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_worker_that_ends_while_others_load_is_not_counted_as_loaded(trained, monkeypatch):
    monkeypatch.setattr(pool, "count_cores", lambda: 2)
    receive, held = pool.Worker.data_received, []

    def hold_first(worker, data):
        held.append((worker, data)) if worker is one.workers[0] else receive(worker, data)

    async def check():
        loading = asyncio.create_task(one.load())
        while not held or not one.workers[-1].reply.done():
            await asyncio.sleep(0.01)
        one.workers[-1].end()
        await asyncio.sleep(0)  # until its connection is lost
        receive(*held[0])
        with pytest.raises(EOFError):
            await loading
        one.end()

    one = pool.Pool(trained, stages.DATA)
    monkeypatch.setattr(pool.Worker, "data_received", hold_first)
    asyncio.run(check())


def test_a_picture_that_takes_too_long_ends_its_worker(trained, monkeypatch, caplog):
    monkeypatch.setattr(pool, "PICTURE_SECONDS", 0.2)

    async def check():
        async with loaded(trained) as model:
            for each in model.served.pool.workers:
                os.kill(each.pid, signal.SIGSTOP)
            for _ in range(10):  # there are fewer workers
                with pytest.raises(EOFError):
                    await model.served.pool.predict("", b"{}", False)
            assert not model.served.pool.workers

    asyncio.run(check())
    assert not caplog.records  # asyncio warns of what is written to a closed connection


def test_of_32_clients_each_gets_the_bits_that_a_file_gets(service, predictor, data):
    pictures = [encode(Image.fromarray(255 - image.numpy())) for image in read_images(data, "test")[0][:200]]
    with ThreadPoolExecutor(32) as clients:
        responses = [*clients.map(service.predict, pictures)]
    for picture, (status, response) in zip(pictures, responses, strict=True):
        read, _ = reading.read(Image.open(io.BytesIO(picture)), predictor)
        assert (status, response["output"]["probabilities"]) == (200, read["probabilities"])


def test_without_a_model_it_says_how_to_train_one_and_loads_it_once_it_and_the_training_images_are_there(
    trained, tmp_path, digit
):
    volume, raw = tmp_path / "volume", tmp_path / "data" / stages.RAW
    volume.mkdir()
    raw.mkdir(parents=True)
    with serving(volume, tmp_path / "data", status="STARTING") as service:
        stages.wait_until(lambda: process.command("train") in service.health()["setup"]["logs"])
        assert service.health()["status"] == "STARTING"
        status, headers, response = service("POST", "/predictions", {"input": {"image": data_url(digit)}})
        assert (status, headers["Retry-After"]) == (503, "1")
        assert process.command("train") in response["detail"]
        shutil.copy(trained / "mnist_cnn.pt", volume)
        stages.wait_until(lambda: service.health()["status"] == "SETUP_FAILED")
        for name in stages.RAW_FILES:
            (raw / name).symlink_to(stages.DATA / stages.RAW / name)
        stages.wait_until(lambda: service.health()["status"] == "READY")
        assert {path.name for path in volume.iterdir()} == {"mnist_cnn.pt"}  # it writes nothing


def test_on_sigterm_it_completes_requests_and_exits_within_3_s(trained, digit):
    errors, statuses = [], []

    def send_requests(service):
        while True:
            try:
                statuses.append(service.predict(digit)[0])
            except ConnectionRefusedError:
                return
            except (OSError, http.client.HTTPException) as error:
                errors.append(error)

    with ThreadPoolExecutor(8) as pool, serving(trained) as service:
        clients = [pool.submit(send_requests, service) for _ in range(8)]
        stages.wait_until(lambda: len(statuses) > 50)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(3) == 143
        assert [client.result() for client in clients] == [None] * 8
    assert {*statuses} == {200}
    assert len(errors) <= len(clients)  # connections opened just as it stopped


def test_on_sigterm_a_long_queue_is_refused_with_503_within_3_s(trained):
    # 60 pictures take some ten seconds; one of them takes a fraction of a second.
    slow = encode(Image.linear_gradient("L").resize((5000, 5000)))
    with serving(trained) as service, ThreadPoolExecutor(60) as pool:
        body = json.dumps({"input": {"image": data_url(slow)}}).encode()
        responses = [pool.submit(service, "POST", "/predictions", body) for _ in range(60)]
        many = b"mnist_requests_in_progress 6"
        stages.wait_until(lambda: many in service("GET", "/metrics")[2] or responses[20].done())
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(3) == 143
        responses = [response.result() for response in responses]
    assert {status for status, _, _ in responses} == {200, 503}
    refused = [headers for status, headers, _ in responses if status == 503]
    assert all(headers["Retry-After"] and headers["Content-Security-Policy"] for headers in refused)


# Other data sets ------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def letters(data, tmp_path_factory):
    """The service for 26 classes, with an untrained network, on MNIST's images, which have the first ten labels."""
    changes = f"name='Letters', classes=tuple('{LETTERS}'), preparation='resize'"
    folder = stages.infer_for(tmp_path_factory.mktemp("letters"), changes)
    record = {"settings": {"epochs": 2, "batch_size": 10, "num_processes": 2}, "batches": 5, "images_per_second": 9.0}
    record |= {"finished": True, "seconds": 1.0, "history": [], "training_images": 55_000}
    (folder / "data").mkdir()
    (folder / "data/Letters").symlink_to(data / "MNIST")
    (folder / "volume/train_results.json").write_text(json.dumps(record))
    sample = {"index": 12, "prediction": 25, "truth": 3, "probabilities": [0.0] * 25 + [1.0]}
    (folder / "volume/predictions.json").write_text(json.dumps({"model_sha256": "x", "predictions": [sample]}))
    (folder / "volume/results").mkdir()
    (folder / "volume/results/25_12.png").write_bytes(encode(Image.new("L", (9, 9))))
    with serving(folder / "volume", folder / "data", folder / "tree/model-infer/serve.py") as running:
        yield running


def test_for_26_classes_there_are_26_probabilities_as_the_schema_says(letters, digit):
    output = letters.predict(digit)[1]["output"]
    schema = letters("GET", "/openapi.json")[2]["components"]["schemas"]["Output"]["properties"]
    assert len(output["probabilities"]) == 26
    assert output["confidence"] in schema["confidence"]["enum"] == ["sure", "unsure", "out of distribution"]
    assert {schema["probabilities"][name] for name in ("minItems", "maxItems")} == {26}
    assert schema["prediction"]["anyOf"][0]["maximum"] == 25
    assert ", ".join(LETTERS) in schema["probabilities"]["description"]


def test_nothing_in_the_api_of_another_data_set_is_about_digits(letters):
    assert "igit" not in json.dumps(letters("GET", "/openapi.json")[2])
    assert b"no digit" not in letters("GET", "/metrics")[2]


def test_a_picture_is_only_resized_where_the_data_set_says_so(letters):
    pixels = Image.effect_noise((28, 28), 50)
    output = letters.predict(encode(pixels))[1]["output"]
    seen = Image.open(io.BytesIO(base64.b64decode(output["image"].partition(",")[2])))
    assert seen.tobytes() == pixels.tobytes()
    assert letters.predict(encode(Image.new("L", (50, 50), 255)))[0] == 200  # no ink, but a picture


def test_results_of_classes_over_9_are_shown_and_a_finished_training_is_complete(letters):
    results = letters("GET", "/results")[2]
    assert results["classes"] == [*LETTERS]
    assert (results["training"]["state"], results["training"]["progress"]) == ("finished", 1)
    (sample,) = results["predictions"]["samples"]
    assert letters("GET", f"/{sample['picture']}")[0] == 200


def test_the_page_is_told_of_the_data_set(letters, service):
    tasks = []
    for running in (letters, service):
        (text,) = re.findall(r'<body data-task="([^"]*)">', running("GET", "/", Accept="text/html")[2].decode())
        tasks.append(json.loads(unescape(text)))
    for task in tasks:
        assert task.pop("commands") == {stage: process.command(stage) for stage in stages.STAGES}
    assert tasks[0] == {"name": "Letters", "classes": [*LETTERS], "size": [28, 28], "preparation": "resize"}
    assert tasks[1] == {"name": "MNIST", "classes": [*"0123456789"], "size": [28, 28], "preparation": "digit"}


def test_the_image_in_an_answer_is_coloured_where_the_data_set_is(monkeypatch):
    data_set = dataclasses.replace(dataset.DATA_SET, shape=(3, 32, 48), preparation="resize")
    for module in ("stage.images", "pictures.reading"):
        monkeypatch.setattr(f"{module}.DATA_SET", data_set)
    predictor = SimpleNamespace(predict=lambda pixels: {"prediction": 1, "confidence": "sure"})
    body = {"input": {"image": data_url(encode(Image.new("RGB", (480, 320), (10, 200, 30))))}}
    output = json.loads(worker.answer(predictor, bytearray(json.dumps(body).encode()), "", False).body)["output"]
    seen = Image.open(io.BytesIO(base64.b64decode(output["image"].partition(",")[2])))
    assert (seen.mode, seen.size, seen.getpixel((5, 5))) == ("RGB", (48, 32), (10, 200, 30))


# Faults that are not the client's -------------------------------------------------------------------------------------


@pytest.fixture
def ask(digit, monkeypatch):
    """A function that has a worker answer a request for a prediction that ends in an error."""

    def ask(error):
        monkeypatch.setattr(reading, "read", Mock(side_effect=error))
        return worker.answer(None, bytearray(json.dumps({"input": {"image": data_url(digit)}}).encode()), "", False)

    return ask


def test_a_model_that_cannot_predict_a_picture_is_the_services_fault(ask):
    reply = ask(NotFinite("not finite"))
    model = SimpleNamespace(served=SimpleNamespace(pool=SimpleNamespace(predict=AsyncMock(return_value=reply))))
    request = SimpleNamespace(path_params={}, scope={"body": b""})
    with pytest.raises(HTTPException, match="503: not finite"):
        asyncio.run(Endpoints(model, Metrics()).predict_picture(request))


def test_a_bug_is_not_taken_for_a_body_that_is_not_json(ask):
    with pytest.raises(ValueError, match="a bug"):
        ask(ValueError("a bug"))


def test_a_bug_in_the_service_is_reported(capsys):
    app = AsyncMock(side_effect=ValueError("a bug"))
    scope = {"type": "http", "method": "GET", "path": "/health-check", "headers": []}
    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(RequestLimits(app, [], Metrics())(scope, None, None))
    report = capsys.readouterr().err
    assert report.startswith("Traceback")
    assert report.endswith("ValueError: a bug\n")
