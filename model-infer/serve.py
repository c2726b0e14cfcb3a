"""Serves the trained model over HTTP: a page to draw digits on, the pipeline's results, and an API like Cog's.

Reads   DATA/MNIST/raw: the raw training files; MODEL: the model and the results, again when they change
Writes  nothing

    docker compose up --build serve
    python model-infer/serve.py --data data --model model --port 8001

On SIGTERM it completes the requests in progress and exits within 3 s, with status 143 (130 on SIGINT).
"""

import process

if __name__ == "__main__":
    process.prepare_process("serve", needed_memory=215_000_000)  # before the other imports, as in infer.py

import argparse
import asyncio
import socket
import sys
from functools import partial
from pathlib import Path

import artifacts
import h11
import torch
import uvicorn
from process import exit_on_failure, say
from service import make_app
from uvicorn.protocols.http.h11_impl import H11Protocol

MEMORY = 950_000_000  # bytes for torch, the largest picture, and the bodies it accepts at once; measured: 900 MB
HEADER_SECONDS = 10  # for the headers of a request to arrive
MAX_HEADER_BYTES = 16_384
MAX_CONNECTIONS = 400
STOP_SECONDS = 2  # for the requests in progress on a stop signal
HOSTS = ("localhost", "127.0.0.1", "::1", "serve")  # `serve` is its host name in Compose's network


class Protocol(H11Protocol):
    """Uvicorn's HTTP/1.1; also closes a connection on which headers do not arrive in time, which uvicorn keeps open."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first request's headers."""
        super().connection_made(transport)
        self.timeout = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """Cancel the timeout when headers are complete; start it when those of a further request begin."""
        super().data_received(data)
        # Between two requests the state is also IDLE, but then uvicorn's own timeout runs.
        is_incomplete = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if not is_incomplete:
            self.timeout.cancel()
        elif self.timeout.cancelled():
            self.timeout = self.loop.call_later(HEADER_SECONDS, self.transport.close)


def main() -> int:
    """Run the service until a signal stops it, and return the exit status."""
    args = parse_args()
    with exit_on_failure("serve"):
        process.check_memory(MEMORY, "serve")
        process.check_threads(20)  # one that predicts, asyncio's for reading files, and a margin
        torch.set_num_threads(1)
        config = uvicorn.Config(
            make_app(args.model, args.data, {*HOSTS, *args.allow_host}),
            http=Protocol,
            ws="none",
            loop="asyncio",
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            limit_concurrency=MAX_CONNECTIONS,
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
    parser = argparse.ArgumentParser(
        prog="serve", description="Serves the trained model over HTTP.", allow_abbrev=False
    )
    parser.error = partial(process.refuse_flags, "serve")  # type: ignore[method-assign]
    text = "address to listen on (default: %(default)s, reachable from this machine only)"
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=text)
    parser.add_argument("--port", type=parse_port, default=8000, help="port to listen on (default: %(default)s)")
    text = f"accept this name in the Host header, besides {', '.join(HOSTS)}; may be repeated"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument("--data", type=Path, default=artifacts.DATA, help="folder of the data (default: %(default)s)")
    text = "folder of the volume's files (default: %(default)s)"
    parser.add_argument("--model", type=Path, default=artifacts.MODEL, help=text)
    return parser.parse_args()


def parse_port(text: str) -> int:
    """Return a port number from 1 to 65535."""
    if text.isascii() and text.isdigit() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a port from 1 to 65535")


if __name__ == "__main__":
    sys.exit(main())
