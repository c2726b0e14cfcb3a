"""Serves the trained model over HTTP: a page to draw digits on, the pipeline's results, and an API like Cog's.

Reads   DATA: the training images; MODEL: the model and the results, again when they change
Writes  nothing

    docker compose up --build serve
    python model-infer/serve.py --data data --model model --port 8001

On SIGTERM it completes the requests in progress and exits within 3 s, with status 143 (130 on SIGINT).
"""

from stage import process

if __name__ == "__main__":
    process.prepare_process()  # before other imports, as in infer.py

import argparse
import signal
import socket
import sys

from stage import flags, limits
from stage.output import say
from stage.process import Failure, exit_on_failure
from web.served_model import ServedModel

MEMORY = 950_000_000  # bytes for all processes, the largest picture, and the bodies at once; measured: 877 MB
STOP_SECONDS = 2  # for the requests in progress on a stop signal
HOSTS = ("localhost", "serve")  # and every address; `serve` is its host name in Compose's network


def main() -> int:
    """Run the service until a signal stops it, and return the exit status."""
    args = parse_args()
    # As the first process of a container, it becomes the parent of processes whose own has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # or they would stay, and count, until serve ends
    with exit_on_failure("serve"):
        limits.check_memory(MEMORY, "serve")
        limits.check_threads(20)  # as many as workers and threads, with a margin
        with listen(args.host, args.port) as listener:
            model = ServedModel(args.model, args.data)
            model.start_loading()
            run(model, {*HOSTS, args.host, *args.allow_host}, listener)
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address, and say so. Raise Failure if that is not possible."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # Python adds the address
        fix = "Choose another port (--port, in Compose MNIST_PORT) or address (--host)."
        raise Failure(f"cannot listen on {host}, port {port}: {reason}. {fix}") from None
    # Inherited by the connections. asyncio sets it only on sockets created for TCP by name; without it, the second
    # packet of a response waits 40 ms for the client's delayed acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    say(f"serve: open http://{name}:{port} in a browser")
    return listener


def run(model: ServedModel, hosts: set[str], listener: socket.socket) -> None:
    """Respond to requests until a signal stops the service."""
    # Imported here, while the workers import torch.
    import uvicorn

    from web.connections import KEEP_ALIVE_SECONDS, Protocol
    from web.service import make_app

    process.imports_done()
    config = uvicorn.Config(
        make_app(model, hosts),
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
    # At its end it raises the stop signal again: the handler of prepare_process() exits with 128 + the signal's number.
    uvicorn.Server(config).run([listener])


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
