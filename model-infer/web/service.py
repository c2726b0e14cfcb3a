"""Defines the service's endpoints: predictions as in Cog's API, the page, health, results, metrics."""

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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote_to_bytes

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from pictures import reading
from pictures.picture import open_picture
from pictures.prediction import UNLIKE, Predictor
from stage.dataset import DATA_SET
from stage.process import Failure
from web import results
from web.bounds import RETRY_SECONDS, Bounds
from web.metrics import CONTENT_TYPE, Metrics
from web.reload import ServedModel

MAX_WAITING = 64  # pictures in the queue of the thread that predicts
WAIT_SECONDS = 20  # for a prediction, with its time in the queue
POLL_SECONDS = 1  # between two checks for a new model
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"index.html": "text/html", "style.css": "text/css", "page.js": "text/javascript"}
NAMES = ", ".join(DATA_SET.classes)
SIZE = f"{DATA_SET.shape[2]} x {DATA_SET.shape[1]}"  # width and height
# What the page needs to know, put into its <body>.
TASK = {
    "name": DATA_SET.name,
    "classes": DATA_SET.classes,
    "size": DATA_SET.shape[:0:-1],
    "preparation": DATA_SET.preparation,
}
DATA_URL = "^[Dd][Aa][Tt][Aa]:[^,]{0,200};[Bb][Aa][Ss][Ee]64,"  # what is before the content, as in RFC 2397
MAX_CODED = 1_000_000  # %-coded characters in a data URL: each takes 100 bytes of memory while they are decoded
ID = "^[A-Za-z0-9._-]{1,80}$"
INDEX = {
    "docs_url": "/docs",
    "openapi_url": "/openapi.json",
    "healthcheck_url": "/health-check",
    "predictions_url": "/predictions",
    "predictions_idempotent_url": "/predictions/{prediction_id}",
    "results_url": "/results",
    "metrics_url": "/metrics",
}


# Requests and responses -----------------------------------------------------------------------------------------------


class Input(BaseModel):
    """The input of a prediction."""

    model_config = ConfigDict(extra="forbid")
    image: str = Field(
        description="A picture, in any format that Pillow opens, as a base64 data URL. Other URLs are refused.",
        json_schema_extra={
            "pattern": DATA_URL,
            "example": "data:image/png;base64,iVBORw0KG...",
        },
    )


PredictionId = Annotated[str, Field(pattern=ID, description="An ID chosen by the client.")]


class PredictionRequest(BaseModel):
    """A request for a prediction. Other keys, such as Cog's created_at, are ignored."""

    input: Input
    id: PredictionId | None = None
    webhook: None = Field(None, description="The service calls no other one.")


# What the output of several digits differs in.
OF_SEVERAL = (
    (", or if there are several digits", "; as the confidence, of the least sure of several digits", ", side by side")
    if DATA_SET.preparation == "digit"
    else ("", "", "")
)


class Digit(BaseModel):
    """A digit on a picture, or something else that was written."""

    prediction: int | None = Field(ge=0, le=9, description=f"The digit; null if the confidence is `{UNLIKE}`.")
    probabilities: list[float] = Field(min_length=10, max_length=10, description="Of the digits 0 to 9.")
    confidence: str = Field(json_schema_extra={"enum": ["sure", "unsure", UNLIKE]})
    box: list[int] = Field(
        min_length=4,
        max_length=4,
        description="Top, left, bottom and right in pixels of the picture, upright; the last two are excluded.",
    )


class Output(BaseModel):
    """The prediction of a picture."""

    prediction: int | None = Field(
        ge=0,
        le=len(DATA_SET.classes) - 1,
        description=f"The class, counted from 0; null if the confidence is `{UNLIKE}`{OF_SEVERAL[0]}.",
    )
    probabilities: list[float] = Field(
        min_length=len(DATA_SET.classes),
        max_length=len(DATA_SET.classes),
        description=f"Of the classes, in order: {NAMES}{OF_SEVERAL[1]}.",
    )
    confidence: str = Field(json_schema_extra={"enum": ["sure", "unsure", UNLIKE]})
    image: str = Field(description=f"The {SIZE} pixels that the network saw{OF_SEVERAL[2]}, as a data URL of a PNG.")
    if DATA_SET.preparation == "digit":
        digits: list[Digit] = Field(min_length=1, max_length=reading.MAX_DIGITS, description="From left to right.")


class PredictionMetrics(BaseModel):
    """The metrics of a prediction."""

    predict_time: float = Field(description="Seconds to decode, prepare and predict the picture, without queueing.")


class PredictionResponse(BaseModel):
    """The response to a request for a prediction."""

    id: str
    status: Literal["succeeded"]
    output: Output
    logs: str = Field(description="Always empty.")
    metrics: PredictionMetrics


class Setup(BaseModel):
    """The state of loading the model."""

    started_at: str
    completed_at: str | None
    status: Literal["starting", "succeeded", "failed"]
    logs: str = Field(description="Why the model in the volume is not served; empty if it is.")


class ModelInfo(BaseModel):
    """The served model."""

    sha256: str
    date: str = Field(description="When it was published, in ISO 8601.")
    accuracy: float | None = Field(description="On the test images, in percent; null if it has not been evaluated.")


class Health(BaseModel):
    """The state of the service."""

    status: Literal["STARTING", "READY", "BUSY", "SETUP_FAILED"]
    setup: Setup
    model: ModelInfo | None


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


Responses = dict[int | str, dict[str, Any]]
REFUSALS: Responses = {
    status: {"model": Problem, "description": description}
    for status, description in {
        400: "The body cannot be parsed.",
        408: "The body arrived too slowly.",
        413: "The body is too large.",
        415: "The Content-Type is not application/json.",
        421: "The host name is not allowed.",
        422: "The request is invalid, or the picture is blank or cannot be read.",
        503: "The service is busy or has no model yet. Try again after the seconds in Retry-After.",
    }.items()
}
REFUSED_HOST: Responses = {421: REFUSALS[421]}


def content_of(media_type: str) -> Responses:
    """Return the OpenAPI responses of an endpoint whose content is not JSON."""
    return {200: {"content": {media_type: {}}}} | REFUSED_HOST


# Predicting -----------------------------------------------------------------------------------------------------------


@dataclass
class Service:
    """What the endpoints share. A single thread predicts, so only one decoded picture is in memory at a time."""

    model: ServedModel
    metrics: Metrics

    def __post_init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.waiting = 0
        self.started = now()

    async def predict(self, request: PredictionRequest, prediction_id: str | None) -> Response:
        """Respond to a request for a prediction. Raise HTTPException if the service is busy or refuses the picture."""
        served = self.model.served  # this request keeps it, even if a new model is loaded meanwhile
        if served is None:
            raise busy(self.model.problem)
        if self.waiting >= MAX_WAITING:
            raise busy("too many pictures are waiting. Try again.")
        self.waiting += 1
        try:
            job = asyncio.get_running_loop().run_in_executor(
                self.thread, predict, served.predictor, request.input.image
            )
            response = await asyncio.wait_for(job, WAIT_SECONDS)
        except TimeoutError:
            raise busy(f"the prediction took more than {WAIT_SECONDS} s. Try again.") from None
        except Failure as failure:
            self.metrics.predictions.labels("refused").inc()
            raise HTTPException(422, str(failure)) from None
        finally:
            self.waiting -= 1
        self.metrics.predictions.labels(response["output"]["confidence"]).inc()
        return as_json({"id": prediction_id or uuid.uuid4().hex} | response)

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


def predict(predictor: Predictor, image: str) -> dict[str, Any]:
    """Predict a picture, a data URL, and return the response. Raise Failure if it cannot be read or is blank."""
    started = time.perf_counter()
    output, pixels = reading.read(open_picture(decode(image)), predictor)
    return {
        "status": "succeeded",
        "output": {**output, "image": as_data_url(pixels)},
        "logs": "",
        "metrics": {"predict_time": round(time.perf_counter() - started, 6)},
    }


def decode(data_url: str) -> bytes:
    """Return the content of a base64 data URL. Raise Failure for anything else, such as an http URL."""
    header = re.match(DATA_URL, data_url)
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
    assert isinstance(error, StarletteHTTPException)
    return as_json({"detail": str(error.detail)}, error.status_code, dict(error.headers or {}))


async def refuse_invalid(request: Request, error: Exception) -> Response:
    """Respond to an invalid request with its first error. FastAPI's own response would repeat the client's input."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    # The place has keys that the client sent: they are cut, and line breaks in them escaped.
    return as_json({"detail": ascii(f"{place}: {first['msg']}"[:200])[1:-1]}, 422)


# Endpoints ------------------------------------------------------------------------------------------------------------


def make_app(model: Path, data: Path, hosts: Iterable[str]) -> FastAPI:
    """Return the service for the folders of the model and the data; only requests to these hosts are accepted."""
    metrics = Metrics()
    service = Service(ServedModel(model, data, metrics), metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(watch(service.model))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    app = FastAPI(
        title=f"{DATA_SET.name} predictions",
        description=f"Predicts which of these a picture shows: {NAMES}. The API follows Cog's (https://cog.run/http).",
        version="1.0",
        docs_url=None,  # FastAPI's own pages load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers={StarletteHTTPException: refuse, RequestValidationError: refuse_invalid},
    )
    app.add_middleware(Bounds, hosts=hosts, metrics=metrics)
    add_page(app)
    add_predictions(app, service)
    add_state(app, service)
    return app


async def watch(model: ServedModel) -> None:
    """Check for a new model in the volume as long as the service runs. If a bug ends that, the health check fails."""
    try:
        while True:
            await asyncio.to_thread(model.refresh)
            await asyncio.sleep(POLL_SECONDS)
    except Exception as error:
        model.watched = False
        model.report(f"looking for a new model failed ({error!r}). Restart the service.", failed=True)


def add_page(app: FastAPI) -> None:
    """Add the endpoints of the page. / and /docs return the same page; its script shows the requested view."""
    files = {name: (PAGE / name).read_bytes() for name in PAGE_FILES}
    body = f'<body data-task="{html.escape(json.dumps(TASK))}">'
    files["index.html"] = files["index.html"].replace(b"<body>", body.encode())

    def page_file(name: str) -> Response:
        headers = {"Cache-Control": "no-cache", "Vary": "Accept"}
        return Response(files[name], headers=headers, media_type=f"{PAGE_FILES[name]}; charset=utf-8")

    @app.get("/", responses=content_of("text/html"))
    async def index(request: Request) -> dict[str, str]:
        """Return the page to a browser, and the paths of the endpoints to other clients."""
        if "text/html" in request.headers.get("accept", ""):
            return page_file("index.html")  # type: ignore[return-value]
        return as_json(INDEX, headers={"Vary": "Accept"})  # type: ignore[return-value]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page_file("index.html")

    @app.get("/style.css", include_in_schema=False)
    async def style() -> Response:
        return page_file("style.css")

    @app.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return page_file("page.js")


def add_predictions(app: FastAPI, service: Service) -> None:
    """Add the endpoints that predict."""

    @app.post("/predictions", response_model=PredictionResponse, responses=REFUSALS)
    async def predict_picture(request: PredictionRequest) -> Response:
        """Predict the class of a picture."""
        return await service.predict(request, request.id)

    @app.put("/predictions/{prediction_id}", response_model=PredictionResponse, responses=REFUSALS)
    async def predict_picture_by_id(
        prediction_id: Annotated[str, InPath(pattern=ID)], request: PredictionRequest
    ) -> Response:
        """Predict the class of a picture, with an ID chosen by the client."""
        if request.id not in (None, prediction_id):
            raise HTTPException(422, "the id in the body differs from the one in the path. Leave it out of the body.")
        return await service.predict(request, prediction_id)


def add_state(app: FastAPI, service: Service) -> None:
    """Add the endpoints for the state of the service and the results of the pipeline."""
    model = service.model

    @app.get("/health-check", response_model=Health)
    async def health_check() -> Response:
        """Return the state of the service in `status`; the HTTP status is always 200."""
        return as_json(service.health())

    @app.get("/results", responses=REFUSED_HOST)
    async def read_results() -> dict[str, Any]:
        """Return the pipeline's results, as they are in the volume now."""
        sha256 = model.served.predictor.sha256 if model.served else None
        content = await asyncio.to_thread(results.read_results, model.folder, sha256)
        return as_json(content | {"model": service.health()["model"]})  # type: ignore[return-value]

    @app.get(
        "/results/{name}",
        response_class=Response,
        responses=content_of("image/png") | {404: {"model": Problem}, 422: {"model": Problem}},
    )
    async def read_result_picture(name: Annotated[str, InPath(max_length=50)]) -> Response:
        """Return a picture of the pipeline's results, such as mistakes.png or 3_12.png."""
        content = await asyncio.to_thread(results.read_picture, model.folder, name)
        if content is None:
            raise HTTPException(404, "there is no such picture. GET /results lists them.")
        return Response(content, headers={"Cache-Control": "no-cache"}, media_type="image/png")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """Return the service's metrics in Prometheus' text format."""
        return Response(service.metrics.as_text(), media_type=CONTENT_TYPE)
