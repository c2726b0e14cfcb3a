"""Defines the service's endpoints: predictions, the page, health, results, metrics. api.py describes them."""

import asyncio
import html
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stage.dataset import DATA_SET
from stage.process import command
from web import api, results
from web.metrics import Metrics, memory_of
from web.pool import FAILED, LARGE, Pool, Reply
from web.request_limits import RequestLimits
from web.responses import NO_STORE, as_json, busy, refusal
from web.served_model import ServedModel, as_iso

MAX_WAITING = 64  # pictures that are predicted, or wait for that
WAIT_SECONDS = 20  # for a prediction, with its time in the queue
POLL_SECONDS = 1  # between two checks for a new model
PAGE = Path(__file__).parent / "page"
# What the page needs to know, put into its <body>.
TASK = {
    "name": DATA_SET.name,
    "classes": DATA_SET.classes,
    "size": DATA_SET.shape[:0:-1],  # width and height
    "preparation": DATA_SET.preparation,
    "commands": {stage: command(stage) for stage in ("train", "evaluate", "infer")},
}


class Service:
    """The endpoints that need the model."""

    def __init__(self, model: ServedModel, metrics: Metrics) -> None:
        self.model, self.metrics = model, metrics
        self.waiting = 0
        self.started = as_iso(time.time())

    async def predict_picture(self, request: Request) -> Response:
        """POST /predictions, PUT /predictions/{prediction_id}: respond with the prediction of a picture."""
        if self.waiting >= MAX_WAITING:
            raise busy("too many pictures are waiting. Try again.")
        self.waiting += 1
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                prediction_id = request.path_params.get("prediction_id", "")
                reply = await self.predict(prediction_id, request.scope["body"])
        except TimeoutError:
            raise busy(f"the prediction took more than {WAIT_SECONDS} s. Try again.") from None
        except EOFError:
            raise busy("the worker has ended; another one is started. Try again.") from None
        finally:
            self.waiting -= 1
        if reply.status == FAILED:
            raise busy(reply.body.decode())
        if reply.outcome:
            self.metrics.predictions.labels(reply.outcome).inc()
        return Response(reply.body, reply.status, NO_STORE, "application/json")

    async def predict(self, prediction_id: str, body: bytearray) -> Reply:
        """Have a picture predicted; large pictures one at a time. Raise EOFError if its worker ends."""
        reply = await self.pool().predict(prediction_id, body, may_be_large=False)
        if reply.status != LARGE:
            return reply
        async with self.model.memory_lock:
            return await self.pool().predict(prediction_id, body, may_be_large=True)

    def pool(self) -> Pool:
        """Return the workers. Raise HTTPException if there is no model."""
        if self.model.served is None:
            raise busy(self.model.problem)
        return self.model.served.pool

    async def health_check(self, request: Request) -> Response:
        """GET /health-check: respond with the state of the service, as Health describes it."""
        served = self.model.served
        if not self.model.watched or (served is None and self.model.failed):
            status, of_setup = "SETUP_FAILED", "failed"
        elif served is None:
            status, of_setup = "STARTING", "starting"
        else:
            status, of_setup = "BUSY" if self.waiting >= MAX_WAITING else "READY", "succeeded"
        times = {"started_at": self.started, "completed_at": served and served.loaded}
        setup = times | {"status": of_setup, "logs": self.model.problem}
        return as_json({"status": status, "setup": setup, "model": self.model_info()})

    def model_info(self) -> dict[str, Any] | None:
        """Return what is told of the served model, as ModelInfo describes it; None if there is none."""
        served = self.model.served
        return served and {"sha256": served.sha256, "date": served.published, "accuracy": served.accuracy}

    async def read_results(self, request: Request) -> Response:
        """GET /results: respond with the pipeline's results, as they are in the volume now."""
        sha256 = self.model.served.sha256 if self.model.served else None
        content = await asyncio.to_thread(results.read_results, self.model.folder, sha256)
        return as_json(content | {"model": self.model_info()})

    async def read_result_picture(self, request: Request) -> Response:
        """GET /results/{name}: respond with a picture of the pipeline's results."""
        content = await asyncio.to_thread(results.read_picture, self.model.folder, request.path_params["name"])
        if content is None:
            raise HTTPException(404, "there is no such picture. GET /results lists them.")
        return Response(content, headers={"Cache-Control": "no-cache"}, media_type="image/png")

    async def read_metrics(self, request: Request) -> Response:
        """GET /metrics: respond with the service's metrics in Prometheus' text format."""
        served = self.model.served
        self.metrics.set_model(served and served.sha256, served and served.accuracy)
        processes = {os.getpid(), *(number for pool in self.model.pools() for number in pool.ids())}
        self.metrics.memory.set(sum(map(memory_of, processes)))
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def make_app(model: ServedModel, hosts: Iterable[str]) -> Starlette:
    """Return the service with a model; only requests to these hosts are accepted."""
    metrics = Metrics()
    service = Service(model, metrics)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(watch(model))
        yield
        task.cancel()
        model.end()

    routes = [  # which are searched in this order
        Route("/predictions", service.predict_picture, methods=["POST"]),
        Route("/predictions/{prediction_id}", service.predict_picture, methods=["PUT"]),
        Route("/health-check", service.health_check),
        Route("/results", service.read_results),
        Route("/results/{name}", service.read_result_picture),
        Route("/metrics", service.read_metrics),
        *page_routes(),
    ]
    limits = Middleware(RequestLimits, hosts=hosts, metrics=metrics)
    handlers = {HTTPException: refuse}
    app = Starlette(routes=routes, middleware=[limits], exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False  # to a URL of this host, without the prefix that a proxy may have
    return app


async def refuse(request: Request, error: Exception) -> Response:
    """Respond to a refused request, including unknown paths and methods, with the reason in one line."""
    assert isinstance(error, HTTPException)
    return refusal(error)


async def watch(model: ServedModel) -> None:
    """Check for a new model in the volume as long as the service runs. If a bug ends that, the health check fails."""
    try:
        while True:
            await model.refresh()
            await asyncio.sleep(POLL_SECONDS)
    except Exception as error:
        sys.excepthook(*sys.exc_info())
        model.watched = False
        model.report(f"looking for a new model failed ({error!r}). Restart the service.", failed=True)


def page_routes() -> list[Route]:
    """Return the endpoints of the page. / and /docs return the same page; its script shows the requested view."""
    body = f'<body data-task="{html.escape(json.dumps(TASK))}">'.encode()

    def page(name: str, kind: str) -> Response:
        content = (PAGE / name).read_bytes().replace(b"<body>", body)
        return Response(content, headers={"Cache-Control": "no-cache", "Vary": "Accept"}, media_type=kind)

    whole = page("index.html", "text/html")

    async def index(request: Request) -> Response:
        is_browser = "text/html" in request.headers.get("accept", "")
        return whole if is_browser else as_json(api.INDEX, headers={"Vary": "Accept"})

    responses = {  # each the same for every request
        "/docs": whole,
        "/style.css": page("style.css", "text/css"),
        "/page.js": page("page.js", "text/javascript"),
        "/openapi.json": as_json(api.describe()),
    }
    return [Route("/", index), *(Route(path, response, methods=["GET"]) for path, response in responses.items())]
