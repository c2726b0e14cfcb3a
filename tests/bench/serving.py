"""Measures the service in its container: latency, requests/s, start to ready, memory. See bench.py."""

import base64
import contextlib
import http.client
import io
import json
import re
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from PIL import Image

import containers
from pipeline import docker
from stages import DATA, RAW

CLIENTS, REQUESTS, WARM_UP_REQUESTS = (1, 32), 1_000, 100
STARTS = 3
PICTURES = 50  # different ones, requested in turns
READY_SECONDS = 60
HEADERS = {"Content-Type": "application/json"}

# Runs in the image: the median seconds in which the network predicts one prepared image.
PREDICT_ONE = """
import pathlib, statistics, time, net, torch
from pictures import prediction
from stage import files
from stage.images import read_images
torch.set_num_threads(1)
predictor = prediction.load_predictor(files.MODEL)
images, _ = read_images(files.DATA, "test")
seconds = []
for image in images[:1000]:
    began = time.perf_counter()
    predictor.predict(image)
    seconds.append(time.perf_counter() - began)
print(statistics.median(seconds))
"""


def measure(project):
    """The figures of the service with the model in a project's volume: seconds, requests/s, bytes."""
    figures, starts, imports = {}, [], []
    for _ in range(STARTS):
        imports.append(containers.run(project, "infer", "-c", "import torch")["container_seconds"])
        with serving(project) as (port, seconds):
            starts.append(seconds)
            if len(starts) == STARTS:
                figures = measure_requests(port)
    predicted = containers.run(project, "infer", "-c", f"import sys; sys.path.insert(0, '/opt/app'){PREDICT_ONE}")
    figures |= {"ready_seconds": statistics.median(starts), "import in serve": statistics.median(imports)}
    return figures | {"network_seconds": float(predicted["output"])}


@contextlib.contextmanager
def serving(project):
    """Starts the service's container: its port, and the seconds from its start until it was ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    container = project.start("serve", options=(f"--publish=127.0.0.1:{port}:8000",))
    try:
        wait_until_ready(port)
        ready = time.time()
        started = datetime.fromisoformat(container.state()["StartedAt"]).timestamp()
        yield port, ready - started
    finally:
        docker("rm", "--force", container.id)


def wait_until_ready(port):
    """Waits until the service has loaded the model; ends the benchmark if that takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health-check")
            if json.load(connection.getresponse())["status"] == "READY":
                return
        time.sleep(0.02)
    sys.exit("bench: the service is not ready")


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
        digit = Image.frombytes("L", (28, 28), raw[16 + 784 * index :][:784]).resize(
            (112, 112), Image.Resampling.BICUBIC
        )
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
