"""Limits connections: the time of each step of a request, the size of its headers, their number."""

import asyncio
import math

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10  # from the first byte of a request, or from connecting, until its headers are complete
REQUEST_SECONDS = 60  # from there until the client has the response: body, prediction, and a slow client's reading
KEEP_ALIVE_SECONDS = 75  # without a byte between two requests
MAX_HEADER_BYTES = 16_384
MAX_CONNECTIONS = 400


class Protocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1, with a limit to each step of a connection, to its headers, and to the number of connections.

    Uvicorn's only timer, between two requests, ends with any byte, and a client that does not read has no limit at all.
    A new connection beyond the limit takes the place of the one that has been idle the longest. There always is one:
    RequestLimits answers at most MAX_REQUESTS at a time, and refuses more at once.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request; if there are too many connections, close the one that is idle the longest."""
        super().connection_made(transport)
        self.timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        self.header_bytes = 0  # received since the last complete headers, or part of a body
        self.idle_since = self.loop.time()  # infinite while a request is responded to
        if len(self.connections) > MAX_CONNECTIONS:
            oldest = min(self.connections, key=lambda connection: connection.idle_since)  # type: ignore[union-attr]
            self.connections.remove(oldest)  # otherwise only after this round of the event loop, with more connections
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Handle data: the first after a response begins a request."""
        if self.timeout_keep_alive_task:
            self.idle_since = self.loop.time()
            self.close_after(HEADER_SECONDS)
        self.header_bytes += len(data)
        super().data_received(data)
        if self.header_bytes > MAX_HEADER_BYTES:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body. What comes between two, and headers after the last, have the limit of headers."""
        self.header_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """Begin with the response to a request, whose body may still be on its way."""
        self.header_bytes = 0
        super().on_headers_complete()
        self.close_after(REQUEST_SECONDS)
        self.idle_since = math.inf

    def on_response_complete(self) -> None:
        """Wait for the next request; a client that has not read the response yet gets no more time for that."""
        self.idle_since = self.loop.time()
        if not self.transport.get_write_buffer_size():
            self.close_after(KEEP_ALIVE_SECONDS)
        super().on_response_complete()

    def close_after(self, seconds: float) -> None:
        """Close the connection after some seconds, unless this is called again before."""
        self.timer.cancel()
        self.timer = self.loop.call_later(seconds, self.transport.abort)
