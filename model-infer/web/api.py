"""The API, as in Cog's: what its requests and responses contain, and its OpenAPI description."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from pictures.outcome import CONFIDENCES, MAX_DIGITS, UNLIKE
from stage import VERSION
from stage.dataset import DATA_SET

NAMES, CLASSES = ", ".join(DATA_SET.classes), len(DATA_SET.classes)
SIZE = f"{DATA_SET.shape[2]} x {DATA_SET.shape[1]}"  # width and height
DATA_URL = "^[Dd][Aa][Tt][Aa]:[^,]{0,200};[Bb][Aa][Ss][Ee]64,"  # what is before the content, as in RFC 2397
IMAGE = "A picture as a base64 data URL: JPEG, HEIC, PNG, GIF, TIFF, WebP, AVIF and others. Other URLs are refused."
EXAMPLE = "data:image/png;base64,iVBORw0KG..."
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


class Input(Struct, forbid_unknown_fields=True):
    """The input of a prediction."""

    image: Annotated[str, Meta(description=IMAGE, extra_json_schema={"pattern": DATA_URL, "example": EXAMPLE})]


class PredictionRequest(Struct):
    """A request for a prediction. Other keys, such as Cog's created_at, are ignored."""

    input: Input
    # A pattern in Meta would be searched for: `$` also matches before a line break at the end.
    id: Annotated[str, Meta(description="An ID chosen by the client.", extra_json_schema={"pattern": ID})] | None = None
    webhook: Annotated[None, Meta(description="The service calls no other one.")] = None


# What the output of several digits differs in.
OR_SEVERAL, LEAST_SURE, SIDE_BY_SIDE = (
    (", or if there are several digits", "; as the confidence, of the least sure of several digits", ", side by side")
    if DATA_SET.preparation == "digit"
    else ("", "", "")
)


Class = Annotated[int, Meta(ge=0, le=CLASSES - 1)] | None
Probabilities = Annotated[list[float], Meta(min_length=CLASSES, max_length=CLASSES)]
Confidence = Annotated[str, Meta(extra_json_schema={"enum": CONFIDENCES[::-1]})]
BOX = "Top, left, bottom and right in pixels of the picture, upright; the last two are excluded."
PREDICTION = f"The class, counted from 0; null if the confidence is `{UNLIKE}`{OR_SEVERAL}."
SEEN = f"The {SIZE} pixels that the network saw{SIDE_BY_SIDE}, as a data URL of a PNG."


class Digit(Struct):
    """A digit on a picture, or something else that was written."""

    prediction: Annotated[Class, Meta(description=f"The digit; null if the confidence is `{UNLIKE}`.")]
    probabilities: Annotated[Probabilities, Meta(description=f"Of {NAMES}.")]
    confidence: Confidence
    box: Annotated[list[int], Meta(min_length=4, max_length=4, description=BOX)]


class Output(Struct):
    """The prediction of a picture."""

    prediction: Annotated[Class, Meta(description=PREDICTION)]
    probabilities: Annotated[Probabilities, Meta(description=f"Of the classes, in order: {NAMES}{LEAST_SURE}.")]
    confidence: Confidence
    image: Annotated[str, Meta(description=SEEN)]
    if DATA_SET.preparation == "digit":
        digits: Annotated[list[Digit], Meta(min_length=1, max_length=MAX_DIGITS, description="From left to right.")]


class PredictionMetrics(Struct):
    """The metrics of a prediction."""

    predict_time: Annotated[
        float, Meta(description="Seconds to decode, prepare and predict the picture, without queueing.")
    ]


class PredictionResponse(Struct):
    """The response to a request for a prediction."""

    id: str
    status: Literal["succeeded"]
    output: Output
    logs: Annotated[str, Meta(description="Always empty.")]
    metrics: PredictionMetrics


class Setup(Struct):
    """The state of loading the model."""

    started_at: str
    completed_at: str | None
    status: Literal["starting", "succeeded", "failed"]
    logs: Annotated[str, Meta(description="Why the model in the volume is not served; empty if it is.")]


class ModelInfo(Struct):
    """The served model."""

    sha256: str
    date: Annotated[str, Meta(description="When it was published, in ISO 8601.")]
    accuracy: Annotated[
        float | None, Meta(description="On the test images, in percent; null if it has not been evaluated.")
    ]


class Health(Struct):
    """The state of the service."""

    status: Literal["STARTING", "READY", "BUSY", "SETUP_FAILED"]
    setup: Setup
    model: ModelInfo | None


class Problem(Struct):
    """Why a request was refused."""

    detail: str


REFUSALS = {
    400: "The body is not JSON.",
    404: "There is no such picture.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    415: "The Content-Type is not application/json.",
    421: "The host name is not allowed.",
    422: "The request is invalid, or the picture is blank or cannot be read.",
    503: "The service is busy or has no model yet. Try again after the seconds in Retry-After.",
}
OF_PREDICTIONS = (400, 408, 413, 415, 421, 422, 503)


def describe() -> dict[str, Any]:
    """Return the API's description, as OpenAPI 3.1."""
    types = (PredictionRequest, PredictionResponse, Health, Problem)
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    json, request = "application/json", {"requestBody": {"required": True, "content": schema_of(PredictionRequest)}}
    predict = operation("Predict the class of a picture.", schema_of(PredictionResponse), OF_PREDICTIONS) | request
    by_id = {"description": "Predict the class of a picture, with an ID chosen by the client."}
    index = "Return the page to a browser, and the paths of the endpoints to other clients."
    health = "Return the state of the service in `status`; the HTTP status is always 200."
    results = "Return the pipeline's results, as they are in the volume now."
    picture = "Return a picture of the pipeline's results, such as mistakes.png or 3_12.png."
    metrics = "Return the service's metrics in Prometheus' text format."
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{DATA_SET.name} predictions",
            "description": f"Predicts which of these a picture shows: {NAMES}. "
            "The API follows Cog's (https://cog.run/http).",
            "version": VERSION,
        },
        "paths": {
            "/": {"get": operation(index, {json: {}, "text/html": {}}, (421,))},
            "/predictions": {"post": predict},
            "/predictions/{prediction_id}": {"put": predict | by_id | path_parameter("prediction_id", {"pattern": ID})},
            "/health-check": {"get": operation(health, schema_of(Health), ())},
            "/results": {"get": operation(results, {json: {}}, (421,))},
            "/results/{name}": {"get": operation(picture, {"image/png": {}}, (404, 421)) | path_parameter("name", {})},
            "/metrics": {"get": operation(metrics, {"text/plain": {}}, ())},
        },
        "components": {"schemas": schemas},
    }


def operation(description: str, content: dict[str, Any], refusals: tuple[int, ...]) -> dict[str, Any]:
    """Return the OpenAPI description of an operation: what it returns, and with which statuses it is refused."""
    refused = {str(status): {"description": REFUSALS[status], "content": schema_of(Problem)} for status in refusals}
    return {"description": description, "responses": {"200": {"description": "OK", "content": content}} | refused}


def schema_of(kind: type[Struct]) -> dict[str, Any]:
    """Return the OpenAPI description of JSON content of a type."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


def path_parameter(name: str, schema: dict[str, str]) -> dict[str, Any]:
    """Return the OpenAPI description of a parameter in an operation's path, a text."""
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"} | schema}]}
