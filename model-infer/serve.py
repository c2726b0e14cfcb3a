"""Serves the trained model over HTTP: a page to draw digits on, the pipeline's results, and an API like Cog's.

Reads   DATA/MNIST/raw: the raw training files; MODEL: the model and the results, again when they change
Writes  nothing

    docker compose up --build serve
    python model-infer/serve.py --data data --model model --port 8001

On SIGTERM it completes the requests in progress and exits within 3 s, with status 143 (130 on SIGINT).
"""

from stage import process

if __name__ == "__main__":
    process.prepare_process("serve", needed_memory=215_000_000)  # before the other imports, as in infer.py

import argparse
import asyncio
import math
import socket
import sys

import torch
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from stage import flags
from stage.process import exit_on_failure, say
from web.service import make_app

MEMORY = 950_000_000  # bytes for torch, the largest picture, and the bodies it accepts at once; measured: 900 MB
HEADER_SECONDS = 10  # from the first byte of a request, or from connecting, until its headers are complete
REQUEST_SECONDS = 60  # from there until the client has the response: body, prediction, and a slow client's reading
KEEP_ALIVE_SECONDS = 75  # without a byte between two requests
MAX_HEADER_BYTES = 16_384
MAX_CONNECTIONS = 400
STOP_SECONDS = 2  # for the requests in progress on a stop signal
HOSTS = ("localhost", "serve")  # and every address; `serve` is its host name in Compose's network


class Protocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1, with a limit to each step of a connection, to its headers, and to the number of connections.

    Uvicorn's only timer, between two requests, ends with any byte, and a client that does not read has no limit at all.
    A new connection beyond the limit takes the place of the one that has been idle the longest. There always is one:
    Bounds answers at most MAX_REQUESTS at a time, and refuses more at once.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request; if there are too many connections, close the one that is idle the longest."""
        super().connection_made(transport)
        self.timer: asyncio.TimerHandle | None = None
        self.has_headers, self.header_bytes = False, 0  # of a request; the bytes received of incomplete ones
        self.limit(HEADER_SECONDS)
        if len(self.connections) > MAX_CONNECTIONS:
            oldest = min(self.connections, key=lambda connection: connection.idle_since)  # type: ignore[union-attr]
            self.connections.remove(oldest)  # otherwise only after this round of the event loop, with more connections
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        assert self.timer
        self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Handle data: the first after a response begins a request."""
        if self.timeout_keep_alive_task:
            self.limit(HEADER_SECONDS)
        self.header_bytes += len(data)
        super().data_received(data)
        if self.has_headers:
            self.header_bytes = 0
        elif self.header_bytes > MAX_HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """Begin with the headers of a request."""
        self.has_headers = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Begin with the response to a request, whose body may still be on its way."""
        self.has_headers = True
        super().on_headers_complete()
        self.limit(REQUEST_SECONDS)
        self.idle_since = math.inf

    def on_response_complete(self) -> None:
        """Wait for the next request; a client that has not read the response yet gets no more time for that."""
        self.idle_since = self.loop.time()
        if not self.transport.get_write_buffer_size():
            self.limit(KEEP_ALIVE_SECONDS)
        super().on_response_complete()

    def limit(self, seconds: float) -> None:
        """Close the connection after some seconds, unless this is called again before."""
        if self.timer:
            self.timer.cancel()
        self.timer = self.loop.call_later(seconds, self.transport.abort)
        self.idle_since = self.loop.time()


def main() -> int:
    """Run the service until a signal stops it, and return the exit status."""
    process.imports_done()
    args = parse_args()
    with exit_on_failure("serve"):
        process.check_memory(MEMORY, "serve")
        process.check_threads(20)  # one that predicts, asyncio's for reading files, and a margin
        torch.set_num_threads(1)
        config = uvicorn.Config(
            make_app(args.model, args.data, {*HOSTS, args.host, *args.allow_host}),
            http=Protocol,
            ws="none",
            loop="asyncio",
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        with socket.create_server((args.host, args.port), family=family) as listener:
            # Inherited by the connections. asyncio sets it only on sockets created for TCP by name; without it, the
            # second packet of a response waits 40 ms for the client's delayed acknowledgement of the first.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            host = "127.0.0.1" if args.host == "0.0.0.0" else f"[{args.host}]" if ":" in args.host else args.host
            say(f"serve: open http://{host}:{args.port} in a browser")
            uvicorn.Server(config).run([listener])
    return 0


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = flags.new_parser("serve", "Serves the trained model over HTTP.")
    host = flags.nonempty(str)
    text = "address to listen on (default: %(default)s, reachable from this machine only)"
    parser.add_argument("--host", type=host, default="127.0.0.1", metavar="ADDRESS", help=text)
    text = "port to listen on (default: %(default)s)"
    parser.add_argument("--port", type=flags.integer(1, 65535), default=8000, metavar="N", help=text)
    text = f"accept this name in the Host header, besides {', '.join(HOSTS)} and addresses; may be repeated"
    parser.add_argument("--allow-host", type=host, action="append", default=[], metavar="NAME", help=text)
    flags.add_folder_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
