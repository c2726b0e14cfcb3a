"""Defines the service's endpoints: predictions, the page, health, results, metrics. api.py describes them."""

import asyncio
import html
import json
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stage.dataset import DATA_SET
from web import api, results
from web.metrics import CONTENT_TYPE, Metrics
from web.pool import LARGE, Pool, Reply
from web.request_limits import RETRY_SECONDS, RequestLimits
from web.served_model import ServedModel

MAX_WAITING = 64  # pictures that are predicted, or wait for that
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
NO_STORE = {"Cache-Control": "no-store"}


class Service:
    """The endpoints that need the model."""

    def __init__(self, model: ServedModel, metrics: Metrics) -> None:
        self.model, self.metrics = model, metrics
        self.waiting = 0
        self.started = now()

    async def predict_picture(self, request: Request) -> Response:
        """POST /predictions, PUT /predictions/{prediction_id}: respond with the prediction of a picture.

        Raise HTTPException if the service is busy.
        """
        if self.waiting >= MAX_WAITING:
            raise busy("too many pictures are waiting. Try again.")
        self.waiting += 1
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                prediction_id = request.path_params.get("prediction_id", "")
                reply = await self.predict(prediction_id, await request.body())
        except TimeoutError:
            raise busy(f"the prediction took more than {WAIT_SECONDS} s. Try again.") from None
        except EOFError:
            raise busy("the worker has ended; another one is started. Try again.") from None
        finally:
            self.waiting -= 1
        if reply.outcome:
            self.metrics.predictions.labels(reply.outcome).inc()
        return Response(reply.body, reply.status, NO_STORE, "application/json")

    async def predict(self, prediction_id: str, body: bytes) -> Reply:
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
        model = served and {"sha256": served.sha256, "date": served.published, "accuracy": served.accuracy}
        return {"status": status, "setup": setup, "model": model}

    async def read_results(self, request: Request) -> Response:
        """GET /results: respond with the pipeline's results, as they are in the volume now."""
        sha256 = self.model.served.sha256 if self.model.served else None
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
        if served := self.model.served:
            self.metrics.set_model(served.sha256, served.accuracy)
        self.metrics.set_memory({os.getpid(), *(number for pool in self.model.pools() for number in pool.ids())})
        return Response(self.metrics.as_text(), media_type=CONTENT_TYPE)


# Responses ------------------------------------------------------------------------------------------------------------


def now() -> str:
    """Return the current time in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response that must not be cached."""
    text = json.dumps(content, separators=(",", ":"))  # in ASCII: UTF-8 cannot encode a lone surrogate
    return Response(text, status, NO_STORE | (headers or {}), "application/json")


def busy(reason: str) -> HTTPException:
    """Return the error for a request that the client should send again."""
    return HTTPException(503, reason, {"Retry-After": str(RETRY_SECONDS)})


async def refuse(request: Request, error: Exception) -> Response:
    """Respond to a refused request, including unknown paths and methods, with the reason in one line."""
    assert isinstance(error, HTTPException)
    return as_json({"detail": str(error.detail)}, error.status_code, dict(error.headers or {}))


# Endpoints ------------------------------------------------------------------------------------------------------------


def make_app(model: ServedModel, hosts: Iterable[str]) -> Starlette:
    """Return the service with a model; only requests to these hosts are accepted."""
    metrics = Metrics()
    service = Service(model, metrics)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(watch(model))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
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
    return Starlette(routes=routes, middleware=[limits], exception_handlers={HTTPException: refuse}, lifespan=lifespan)


async def watch(model: ServedModel) -> None:
    """Check for a new model in the volume as long as the service runs. If a bug ends that, the health check fails."""
    try:
        while True:
            await model.refresh()
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
