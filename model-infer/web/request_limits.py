"""Limits requests: allowed hosts, size and time of a body, requests at once. Adds the security headers and metrics.

Where possible, a request is refused before its body is read.
"""

import asyncio
import ipaddress
import sys
import time
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.metrics import Metrics
from web.responses import busy, refusal

MAX_BODY = 28_000_000  # bytes: a picture of 20 MB in base64, which adds a third, and the JSON around it
MAX_BODIES = 64_000_000  # bytes of all bodies in memory at once
MAX_REQUESTS = 100  # in progress at once
BODY_SECONDS = 10  # for a body to arrive
PROBED = ("/health-check", "/metrics")  # allowed under any host name: they change nothing and reveal no secret
CLIENT_LEFT = 499  # nginx's status for a client that disconnects before the response

# The page loads its own files only. Its icon, and the image that the network saw, are data: URLs.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RequestLimits:
    """ASGI middleware that refuses requests beyond the limits, and adds the security headers to every response."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.hosts = {host_name(host) for host in hosts} - {""}  # from ::1, an address, which is allowed anyway
        self.requests = 0  # in progress
        self.bytes = 0  # of their bodies
        metrics.in_progress.set_function(lambda: self.requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request, and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), CLIENT_LEFT

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # uvicorn reads a body to its end even after the response, unless the connection is to be closed.
                unread = status == 408 or may_be_endless(scope) or asks_for_upgrade(scope)
                close = {"Connection": "close"} if unread else {}
                message["headers"] = [*message["headers"], *Headers(SECURITY_HEADERS | close).raw]
            await send(message)

        self.requests += 1
        try:
            await self.answer(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # uvicorn waits for responses only so long after a stop signal
            if status != CLIENT_LEFT:  # a response has begun
                raise
            await refusal(busy("the service is stopping. Try again."))(scope, receive, send_with_headers)
        except Exception:  # a bug: Starlette responds with status 500
            status = 500
            sys.excepthook(*sys.exc_info())  # uvicorn would log it, but its log is off
            raise
        finally:
            self.requests -= 1
            route = getattr(scope.get("route"), "path", "other")  # unknown paths would be endless labels
            self.metrics.count(route, status, time.perf_counter() - started)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, read its body into scope["body"] and pass it on to the app, or refuse it."""
        body = scope["body"] = bytearray()
        try:
            self.check(scope)
            if has_body(scope):
                await self.read_body(receive, body)
            await self.app(scope, receive, send)
        except HTTPException as error:
            await refusal(error)(scope, receive, send)
        finally:
            del scope["body"]  # uvicorn keeps the scope until the next request
            self.bytes -= len(body)

    def check(self, scope: Scope) -> None:
        """Raise HTTPException if the headers of a request are reason enough."""
        headers = dict(scope["headers"])
        host = host_name(headers.get(b"host", b"").decode("latin-1"))
        if host not in self.hosts and not is_address(host) and scope["path"] not in PROBED:
            # Protects from DNS rebinding: a foreign page whose host name was made to point here. An address cannot be.
            raise HTTPException(421, "unknown host name. Start the service with the flag --allow-host NAME.")
        if self.requests > MAX_REQUESTS and scope["path"] != "/health-check":
            raise busy("too many requests at once. Try again.")
        if has_body(scope):
            # A foreign page may send this type only after a CORS preflight, which is never granted.
            if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
                raise HTTPException(415, "the Content-Type is not JSON. Send application/json.")
            if asks_for_upgrade(scope):  # uvicorn drops the body then
                raise HTTPException(400, "no other protocol than HTTP/1.1 is spoken. Send the request without Upgrade.")
            self.check_size(content_length(scope), content_length(scope))

    def check_size(self, size: int, more: int) -> None:
        """Raise HTTPException if the size of a body exceeds its limit, or if `more` bytes exceed that of all bodies."""
        if size > MAX_BODY:
            raise HTTPException(413, f"the body is too large. Send at most {MAX_BODY:,} bytes.")
        if self.bytes + more > MAX_BODIES:
            raise busy("too many large requests at once. Try again.")

    async def read_body(self, receive: Receive, body: bytearray) -> None:
        """Append the parts of a body as they arrive. Raise HTTPException if it is too large or too slow."""
        more = True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HTTPException(CLIENT_LEFT, "the client disconnected")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    self.check_size(len(body) + len(chunk), len(chunk))
                    body += chunk
                    self.bytes += len(chunk)
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS} s. Send it faster.") from None


def has_body(scope: Scope) -> bool:
    """Return whether the endpoint of a request reads a body; the others ignore theirs."""
    method, path = scope["method"], str(scope["path"])
    return (method, path) == ("POST", "/predictions") or (method == "PUT" and path.startswith("/predictions/"))


def may_be_endless(scope: Scope) -> bool:
    """Return whether the body of a request may exceed its limit: it is in chunks, or its announced size exceeds it."""
    return b"transfer-encoding" in dict(scope["headers"]) or content_length(scope) > MAX_BODY


def asks_for_upgrade(scope: Scope) -> bool:
    """Return whether a client would rather go on with another protocol, such as h2c, HTTP/2 without TLS."""
    headers = Headers(scope=scope)
    return "upgrade" in headers and any("upgrade" in value.lower() for value in headers.getlist("connection"))


def content_length(scope: Scope) -> int:
    """Return the announced size of a request's body; 0 if there is none, or it is not a number."""
    value = dict(scope["headers"]).get(b"content-length", b"")
    return int(value[:20]) if value.isdigit() else 0


def host_name(host: str) -> str:
    """Return the name in a Host header without the port: localhost for `localhost:8000`, ::1 for `[::1]:8000`."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def is_address(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False
