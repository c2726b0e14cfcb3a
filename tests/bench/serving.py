"""Measures the service as a process, in turns with what one might write instead. See bench.py.

Without Docker, in 2 to 4 minutes:

    .venv/bin/python tests/bench/serving.py --model model
    .venv/bin/python tests/bench/serving.py --model model --only serve FastAPI --rounds 5

Reads   MODEL/mnist_cnn.pt, a model of train; DATA/MNIST/raw
Writes  serving, an environment beside this one's packages, with those of the others
"""

import argparse
import base64
import contextlib
import hashlib
import http.client
import importlib.util
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import report
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from environments import make_environment
from stages import DATA, RAW, command, free_port, wait_until

WARM_UP_SECONDS, SECONDS = 0.5, 2  # with each number of clients
PICTURES = 50  # different ones, requested in turns
HERE = Path(__file__).parent
REQUIREMENTS, ENVIRONMENT = HERE / "requirements-serving.txt", Path(sys.prefix) / "serving"
# How the others are started, in the folder of their programs.
OTHERS = {
    "FastAPI": "uvicorn fastapi_service:app --port {port} --no-access-log",
    "LitServe": "python litserve_service.py {port}",
    "BentoML": "bentoml serve bentoml_service:Digits --host 127.0.0.1 --port {port}",
    "Cog": "env PORT={port} COG_PREDICT_TYPE_STUB=cog_service.py:Digits python -m cog.server.http --host 127.0.0.1",
}


def main():
    """Measures services that run as processes, round by round, and prints a table."""
    parser = argparse.ArgumentParser(description="Measures serve as a process, and what one might write instead.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=report.SERVICES, default=report.SERVICES, help="default: all")
    args = parser.parse_args()
    runs = []
    for number in range(1, args.rounds + 1):
        runs.append({"kind": "services", "seed": number} | measure_services(args.model, args.data, args.only))
        print(f"serving: {number} of {args.rounds} rounds", file=sys.stderr, flush=True)
    print(report.service_table(runs))


# As processes ---------------------------------------------------------------------------------------------------------


def measure_services(model, data, names=report.SERVICES):
    """The figures of services, by name, each started, measured and ended before the next one is started."""
    bodies, figures = make_bodies(data), {}
    for name in names:
        port = free_port()
        with running(name, port, model, data) as process:
            wait_until(partial(responds, process, port, bodies[0]), name)
            figures[name] = measure_requests(port, bodies, process.pid)
    return figures


@contextlib.contextmanager
def running(name, port, model, data):
    """Starts a service as a process, which is gone with its descendants after the block."""
    if name == "serve":
        words = command("serve", "--port", str(port), model=model.resolve(), data=data.resolve())
        programs = Path(sys.prefix) / "bin"
    else:
        words, programs = OTHERS[name].format(port=port).split(), environment() / "bin"
    variables = {"MODEL": str(model.resolve()), "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    variables |= {"BENTOML_DO_NOT_TRACK": "True"}
    with tempfile.TemporaryFile() as output:
        where = {"cwd": HERE / "services", "env": os.environ | variables}
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, **where)
        try:
            yield process
        except BaseException:
            output.seek(0)
            sys.stderr.write(output.read().decode(errors="replace")[-5000:])
            raise
        finally:
            processes = family(process.pid)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            for number in processes:  # not a process group: BentoML's worker has one of its own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            process.wait()


def family(process_id):
    """The processor time in seconds of a process and its descendants, by process id."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            fields = path.read_text().rpartition(")")[2].split()  # from the third one on, as in proc_pid_stat(5)
            stats[int(path.parent.name)] = (
                int(fields[1]),
                (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
            )
    found = {process_id}
    while more := {number for number, (parent, _) in stats.items() if parent in found} - found:
        found |= more
    return {number: stats[number][1] for number in found & stats.keys()}


def environment():
    """The virtual environment of the others, made if there is none with what is required now."""
    made, digest = ENVIRONMENT / "made", hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if not made.exists() or made.read_text() != digest:
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        make_environment(ENVIRONMENT, REQUIREMENTS)
        (packages,) = ENVIRONMENT.glob("lib/*/site-packages")
        # torch is this environment's. What both have is that of the requirements, which come first.
        torch = importlib.util.find_spec("torch")
        (packages / "torch.pth").write_text(f"{Path(torch.origin).parents[1]}\n")
        made.write_text(digest)
    return ENVIRONMENT


def responds(process, port, body):
    """Whether a service predicts a picture. Ends the benchmark if its process has ended."""
    if process.poll() is not None:
        sys.exit(f"serving: the service ended with status {process.returncode}")
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("POST", "/predictions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        return response.status == 200 and len(json.loads(content)["output"]["probabilities"]) == 10


# Requests -------------------------------------------------------------------------------------------------------------


def measure_requests(port, bodies, process_id=None):
    """Of each number of clients: latency in seconds, predictions/s, and which part of the responses were refusals.

    With the id of the service's process, also the seconds of processor time that a prediction takes.
    """
    figures = {}
    for clients in report.CLIENTS:
        load(port, clients, WARM_UP_SECONDS, bodies)
        before = sum(family(process_id).values())
        result = load(port, clients, SECONDS, bodies)
        percentiles, statuses = statistics.quantiles(result["latencies"], n=100), result["statuses"]
        measured = {"p50": percentiles[49], "p99": percentiles[98]}
        measured["predictions/s"] = statuses["200"] / result["seconds"]
        measured["refused"] = 1 - statuses["200"] / sum(statuses.values())
        if process_id:
            measured["CPU time"] = (sum(family(process_id).values()) - before) / statuses["200"]
        figures |= {f"{name}, {clients} clients": figure for name, figure in measured.items()}
    return figures


def load(port, clients, seconds, bodies):
    """What load.py prints."""
    words = [sys.executable, HERE / "load.py", f"127.0.0.1:{port}", str(clients), str(seconds)]
    done = subprocess.run(words, input=json.dumps(bodies), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("bench: a client failed")
    return json.loads(done.stdout)


def make_bodies(data):
    """The bodies of requests for test images as the page sends a drawing: black on white, 112 x 112 pixels, in PNG."""
    raw = (data / RAW / "t10k-images-idx3-ubyte").read_bytes()
    bodies = []
    for index in range(PICTURES):
        digit = Image.frombytes("L", (28, 28), raw[16 + 784 * index :][:784])
        digit = digit.resize((112, 112), Image.Resampling.BICUBIC)
        picture, file = Image.eval(digit, lambda level: 255 - level).convert("RGBA"), io.BytesIO()
        picture.save(file, "PNG")
        image = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        bodies.append(json.dumps({"input": {"image": image}}))
    return bodies


if __name__ == "__main__":
    main()
