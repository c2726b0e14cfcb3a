"""Measures the service in its container: latency, requests/s, start to ready, memory. See bench.py."""

import base64
import contextlib
import http.client
import io
import json
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial

from PIL import Image

import containers
from nodes import free_port
from pipeline import docker
from stages import DATA, RAW, wait_until

CLIENTS, REQUESTS, WARM_UP_REQUESTS = (1, 32), 1_000, 100
STARTS = 3
PICTURES = 50  # different ones, requested in turns
HEADERS = {"Content-Type": "application/json"}


def measure(project):
    """The figures of the service with the model in a project's volume: seconds, requests/s, bytes."""
    figures, starts, imports = {}, [], []
    for number in range(STARTS):
        imports.append(containers.run(project, "infer", "-c", "import torch")["container_seconds"])
        port = free_port()
        container = project.start("serve", options=(f"--publish=127.0.0.1:{port}:8000",))
        wait_until(partial(is_ready, port), "the service")
        starts.append(time.time() - datetime.fromisoformat(container.state()["StartedAt"]).timestamp())
        if number == STARTS - 1:
            figures = measure_requests(port)
        docker("rm", "--force", container.id)
    predicted = containers.run(project, "infer", "/opt/tests/bench/speeds.py", "predict_one")
    figures |= {"ready_seconds": statistics.median(starts), "import in serve": statistics.median(imports)}
    return figures | json.loads(predicted["output"])


def is_ready(port):
    """Whether the service has loaded the model."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return json.loads(get(port, "/health-check"))["status"] == "READY"


def measure_requests(port):
    """Latency at some numbers of clients, requests/s, and the service's memory."""
    bodies, figures = make_bodies(), {}
    for clients in CLIENTS:
        warm_up, count = WARM_UP_REQUESTS // clients, REQUESTS // clients
        with ThreadPoolExecutor(clients) as pool:
            began = time.monotonic()
            each = [pool.submit(send, port, bodies, warm_up, count) for _ in range(clients)]
            latencies = [seconds for future in each for seconds in future.result()]
            whole = time.monotonic() - began
        percentiles = statistics.quantiles(latencies, n=100)
        figures |= {f"p50, {clients} clients": percentiles[49], f"p99, {clients} clients": percentiles[98]}
        figures[f"requests/s, {clients} clients"] = clients * (warm_up + count) / whole
    metrics = get(port, "/metrics").decode()
    return figures | {"serve_bytes": float(re.search(r"^process_resident_memory_bytes (\S+)", metrics, re.M)[1])}


def make_bodies():
    """The bodies of requests for test images as the page sends a drawing: black on white, 112 x 112 pixels, in PNG."""
    raw = (DATA / RAW / "t10k-images-idx3-ubyte").read_bytes()
    bodies = []
    for index in range(PICTURES):
        digit = Image.frombytes("L", (28, 28), raw[16 + 784 * index :][:784])
        digit = digit.resize((112, 112), Image.Resampling.BICUBIC)
        picture, file = Image.eval(digit, lambda level: 255 - level).convert("RGBA"), io.BytesIO()
        picture.save(file, "PNG")
        image = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        bodies.append(json.dumps({"input": {"image": image}}))
    return bodies


def send(port, bodies, warm_up, count):
    """The seconds that each of some requests took, sent one after another over one connection, after a warm-up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    seconds = []
    for number in range(warm_up + count):
        began = time.perf_counter()
        connection.request("POST", "/predictions", bodies[number % len(bodies)], HEADERS)
        answer = connection.getresponse()
        answer.read()
        seconds.append(time.perf_counter() - began)
        if answer.status != 200:
            sys.exit(f"bench: the service answered with status {answer.status}")
    connection.close()
    return seconds[warm_up:]


def get(port, path):
    """The content at a path of the service."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    return connection.getresponse().read()
