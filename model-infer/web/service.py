"""Defines the service's endpoints: predictions, the page, health, results, metrics. api.py describes them."""

import asyncio
import binascii
import html
import io
import json
import re
import string
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pictures import reading
from pictures.picture import open_picture
from pictures.prediction import Predictor
from stage.dataset import DATA_SET
from stage.process import Failure
from web import api, results
from web.bounds import RETRY_SECONDS, Bounds
from web.metrics import CONTENT_TYPE, Metrics
from web.reload import ServedModel

MAX_WAITING = 64  # pictures in the queue of the thread that predicts
WAIT_SECONDS = 20  # for a prediction, with its time in the queue
POLL_SECONDS = 1  # between two checks for a new model
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"index.html": "text/html", "style.css": "text/css", "page.js": "text/javascript"}
# What the page needs to know, put into its <body>.
TASK = {
    "name": DATA_SET.name,
    "classes": DATA_SET.classes,
    "size": DATA_SET.shape[:0:-1],
    "preparation": DATA_SET.preparation,
}
MAX_CODED = 1_000_000  # %-coded characters in a data URL: each takes 100 bytes of memory while they are decoded


class Service:
    """The endpoints that need the model. A single thread predicts, so one decoded picture is in memory at a time."""

    def __init__(self, model: ServedModel, metrics: Metrics) -> None:
        self.model, self.metrics = model, metrics
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.waiting = 0
        self.started = now()

    async def predict_picture(self, request: Request) -> Response:
        """POST /predictions, PUT /predictions/{prediction_id}: respond with the prediction of a picture.

        Raise HTTPException if the request is invalid, the service is busy, or the picture is refused.
        """
        body = parse(await request.body())
        prediction_id = request.path_params.get("prediction_id", body.id)
        if body.id not in (None, prediction_id):
            raise HTTPException(422, "the id in the body differs from the one in the path. Leave it out of the body.")
        if prediction_id is not None and not re.fullmatch(api.ID, prediction_id):
            raise HTTPException(422, "id: 1 to 80 letters, digits, points, hyphens and underscores are allowed.")
        output = await self.predict(body.input.image)
        self.metrics.predictions.labels(output["output"]["confidence"]).inc()
        return as_json({"id": prediction_id or uuid.uuid4().hex, "status": "succeeded", "logs": ""} | output)

    async def predict(self, image: str) -> dict[str, Any]:
        """Predict a picture, a data URL, in the thread. Raise HTTPException if the service is busy or refuses it."""
        served = self.model.served  # this request keeps it, even if a new model is loaded meanwhile
        if served is None:
            raise busy(self.model.problem)
        if self.waiting >= MAX_WAITING:
            raise busy("too many pictures are waiting. Try again.")
        self.waiting += 1
        try:
            job = asyncio.get_running_loop().run_in_executor(self.thread, predict, served.predictor, image)
            return await asyncio.wait_for(job, WAIT_SECONDS)
        except TimeoutError:
            raise busy(f"the prediction took more than {WAIT_SECONDS} s. Try again.") from None
        except Failure as failure:
            self.metrics.predictions.labels("refused").inc()
            raise HTTPException(422, str(failure)) from None
        finally:
            self.waiting -= 1

    async def health_check(self, request: Request) -> Response:
        """GET /health-check: respond with the state of the service."""
        return as_json(self.health())

    def health(self) -> dict[str, Any]:
        """Return the state of the service, as Health describes it."""
        served, problem = self.model.served, self.model.problem
        setup: dict[str, Any] = {"started_at": self.started, "completed_at": served and served.loaded, "logs": problem}
        if not self.model.watched or (served is None and self.model.failed):
            status, setup["status"] = "SETUP_FAILED", "failed"
        elif served is None:
            status, setup["status"] = "STARTING", "starting"
        else:
            status, setup["status"] = "BUSY" if self.waiting >= MAX_WAITING else "READY", "succeeded"
        model = served and {
            "sha256": served.predictor.sha256,
            "date": served.published,
            "accuracy": served.predictor.accuracy,
        }
        return {"status": status, "setup": setup, "model": model}

    async def read_results(self, request: Request) -> Response:
        """GET /results: respond with the pipeline's results, as they are in the volume now."""
        sha256 = self.model.served.predictor.sha256 if self.model.served else None
        content = await asyncio.to_thread(results.read_results, self.model.folder, sha256)
        return as_json(content | {"model": self.health()["model"]})

    async def read_result_picture(self, request: Request) -> Response:
        """GET /results/{name}: respond with a picture of the pipeline's results."""
        content = await asyncio.to_thread(results.read_picture, self.model.folder, request.path_params["name"])
        if content is None:
            raise HTTPException(404, "there is no such picture. GET /results lists them.")
        return Response(content, headers={"Cache-Control": "no-cache"}, media_type="image/png")

    async def read_metrics(self, request: Request) -> Response:
        """GET /metrics: respond with the service's metrics in Prometheus' text format."""
        return Response(self.metrics.as_text(), media_type=CONTENT_TYPE)


# Predicting -----------------------------------------------------------------------------------------------------------


def parse(body: bytes) -> api.PredictionRequest:
    """Return the request in a body. Raise HTTPException if it is invalid."""
    try:
        return msgspec.json.decode(body, type=api.PredictionRequest)
    except msgspec.ValidationError as error:
        # It may have a key that the client sent: it is cut, and line breaks in it escaped.
        raise HTTPException(422, ascii(str(error)[:200])[1:-1]) from None
    except (msgspec.DecodeError, RecursionError, ValueError):
        raise HTTPException(400, "the body is not valid JSON.") from None


def predict(predictor: Predictor, image: str) -> dict[str, Any]:
    """Predict a picture, a data URL; return output and metrics. Raise Failure if it cannot be read or is blank."""
    started = time.perf_counter()
    output, pixels = reading.read(open_picture(decode(image)), predictor)
    return {
        "output": {**output, "image": as_data_url(pixels)},
        "metrics": {"predict_time": round(time.perf_counter() - started, 6)},
    }


def decode(data_url: str) -> bytes:
    """Return the content of a base64 data URL. Raise Failure for anything else, such as an http URL."""
    header = re.match(api.DATA_URL, data_url)
    if not header:
        raise Failure("image: not a base64 data URL. Send one such as data:image/png;base64,...")
    if data_url.count("%") > MAX_CODED:
        raise Failure(f"image: more than {MAX_CODED:,} %-coded characters. Send plain base64.")
    try:
        content = unquote_to_bytes(data_url[header.end() :]).translate(None, string.whitespace.encode())
        return binascii.a2b_base64(content, strict_mode=True)
    except ValueError:  # from binascii, or because the text has a lone surrogate
        raise Failure("image: its base64 is not valid. Encode the picture's file again.") from None


def as_data_url(pixels: torch.Tensor) -> str:
    """Return an image, uint8 [H, W] or [H, W, 3], as the data URL of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", compress_level=1)  # the default takes longer
    return "data:image/png;base64," + binascii.b2a_base64(buffer.getvalue(), newline=False).decode()


# Responses ------------------------------------------------------------------------------------------------------------


def now() -> str:
    """Return the current time in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response that must not be cached."""
    text = json.dumps(content, separators=(",", ":"))  # in ASCII: UTF-8 cannot encode a lone surrogate
    return Response(text, status, {"Cache-Control": "no-store"} | (headers or {}), "application/json")


def busy(reason: str) -> HTTPException:
    """Return the error for a request that the client should send again."""
    return HTTPException(503, reason, {"Retry-After": str(RETRY_SECONDS)})


async def refuse(request: Request, error: Exception) -> Response:
    """Respond to a refused request, including unknown paths and methods, with the reason in one line."""
    assert isinstance(error, HTTPException)
    return as_json({"detail": str(error.detail)}, error.status_code, dict(error.headers or {}))


# Endpoints ------------------------------------------------------------------------------------------------------------


def make_app(model: Path, data: Path, hosts: Iterable[str]) -> Starlette:
    """Return the service for the folders of the model and the data; only requests to these hosts are accepted."""
    metrics = Metrics()
    service = Service(ServedModel(model, data, metrics), metrics)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(watch(service.model))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    routes = [
        *page_routes(),
        Route("/predictions", service.predict_picture, methods=["POST"]),
        Route("/predictions/{prediction_id}", service.predict_picture, methods=["PUT"]),
        Route("/health-check", service.health_check),
        Route("/results", service.read_results),
        Route("/results/{name}", service.read_result_picture),
        Route("/metrics", service.read_metrics),
    ]
    bounds = Middleware(Bounds, hosts=hosts, metrics=metrics)
    return Starlette(routes=routes, middleware=[bounds], exception_handlers={HTTPException: refuse}, lifespan=lifespan)


async def watch(model: ServedModel) -> None:
    """Check for a new model in the volume as long as the service runs. If a bug ends that, the health check fails."""
    try:
        while True:
            await asyncio.to_thread(model.refresh)
            await asyncio.sleep(POLL_SECONDS)
    except Exception as error:
        model.watched = False
        model.report(f"looking for a new model failed ({error!r}). Restart the service.", failed=True)


def page_routes() -> list[Route]:
    """Return the endpoints of the page. / and /docs return the same page; its script shows the requested view."""
    files = {name: (PAGE / name).read_bytes() for name in PAGE_FILES}
    body = f'<body data-task="{html.escape(json.dumps(TASK))}">'
    files["index.html"] = files["index.html"].replace(b"<body>", body.encode())
    description = api.describe()

    def page_file(name: str) -> Response:
        headers = {"Cache-Control": "no-cache", "Vary": "Accept"}
        return Response(files[name], headers=headers, media_type=f"{PAGE_FILES[name]}; charset=utf-8")

    async def index(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return page_file("index.html")
        return as_json(api.INDEX, headers={"Vary": "Accept"})

    async def docs(request: Request) -> Response:
        return page_file("index.html")

    async def page_part(request: Request) -> Response:
        return page_file(request.url.path.rpartition("/")[2])

    async def openapi(request: Request) -> Response:
        return as_json(description)

    return [
        Route("/", index),
        Route("/docs", docs),
        Route("/style.css", page_part),
        Route("/page.js", page_part),
        Route("/openapi.json", openapi),
    ]
