"""Makes the service's responses in JSON."""

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

NO_STORE = {"Cache-Control": "no-store"}


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response that must not be cached."""
    text = json.dumps(content, separators=(",", ":"))  # in ASCII: UTF-8 cannot encode a lone surrogate
    return Response(text, status, NO_STORE | (headers or {}), "application/json")


def refusal(error: HTTPException) -> Response:
    """Return the response to a refused request: the reason in one line."""
    return as_json({"detail": error.detail}, error.status_code, dict(error.headers or {}))


def busy(reason: str) -> HTTPException:
    """Return the error for a request that the client should send again."""
    return HTTPException(503, reason, {"Retry-After": "1"})  # second
