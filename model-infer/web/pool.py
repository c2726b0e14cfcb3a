"""Starts the workers (worker.py), which predict, and passes requests on to them.

The messages over a worker's socket are REQUEST, the ID in the path and the body; and REPLY and the body.
"""

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from stage.limits import count_cores
from stage.process import Failure

PICTURE_SECONDS = 20  # for a picture; then its worker is killed
MAX_WORKERS = 3  # each takes 60 MB, and up to 80 MB more for a picture
REQUEST = struct.Struct("!?II")  # whether the picture may be large; the sizes of ID and body
REPLY = struct.Struct("!H24pI")  # HTTP status, or one of the following; outcome; the body's size
FAILED = 0  # the model cannot be loaded, or cannot predict; the body says why
LARGE = 1  # the picture is large; not predicted


class Reply(NamedTuple):
    """What a worker answers to a request."""

    status: int  # of HTTP, FAILED or LARGE
    outcome: str  # the confidence of the prediction, "refused" if the picture was, or ""
    body: bytes  # JSON


class Loaded(msgspec.Struct):
    """What a worker says when it has loaded the model."""

    pid: int
    sha256: str  # of the model's file
    accuracy: float | None  # on the test images, in percent; None if it has not been evaluated


class Worker(asyncio.Protocol):
    """A process that predicts one picture at a time, at the other end of a connection."""

    def __init__(self) -> None:
        self.pid = 0  # not loaded yet
        self.received = bytearray()  # of the reply
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()  # the first one comes by itself
        self.timer: asyncio.TimerHandle | None = None  # of the request in progress
        self.when_done: Callable[[Worker], None] = lambda worker: None  # called after each reply, and at the end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, prediction_id: str, body: bytearray, may_be_large: bool) -> asyncio.Future[Reply]:
        """Send a request, and return the future of the reply, which is an EOFError if the worker ends."""
        loop, name = asyncio.get_running_loop(), prediction_id.encode()
        self.reply, self.timer = loop.create_future(), loop.call_later(PICTURE_SECONDS, self.end)
        self.transport.write(REQUEST.pack(may_be_large, len(name), len(body)) + name)
        self.transport.write(body)
        return self.reply

    def data_received(self, data: bytes) -> None:
        """Collect the parts of a reply."""
        self.received += data
        if len(self.received) >= REPLY.size:
            status, outcome, size = REPLY.unpack_from(self.received)
            if len(self.received) == REPLY.size + size:
                body = bytes(self.received[REPLY.size :])
                self.received.clear()
                self.finish()
                if not self.reply.done():  # the request may have been given up
                    self.reply.set_result(Reply(status, outcome.decode(), body))

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the worker has ended."""
        self.end()
        self.finish()
        if not self.reply.done():
            self.reply.set_exception(EOFError("the worker has ended"))
            self.reply.exception()  # asyncio would report it if the request had been given up

    def finish(self) -> None:
        """Have the pool note that this worker is idle, or has ended."""
        if self.timer:
            self.timer.cancel()
        self.when_done(self)

    def end(self) -> None:
        """End the worker, whatever it does."""
        self.transport.close()
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.pid = 0  # soon, it may be that of another process


class Pool:
    """The workers that predict with a model. They start at once; `loaded` is None until load() has returned."""

    def __init__(self, model: Path, data: Path) -> None:
        pairs = [socket.socketpair() for _ in range(min(count_cores(), MAX_WORKERS))]
        self.sockets = [ours for ours, _ in pairs]
        descriptors = [theirs.fileno() for _, theirs in pairs]
        words = [str(model.absolute()), str(data.absolute()), *map(str, descriptors)]
        command = [sys.executable, "-m", "web.worker", *words]
        # The worker that loads the model and forks the others.
        self.parent = subprocess.Popen(command, cwd=Path(__file__).parents[1], pass_fds=descriptors)
        for _, theirs in pairs:
            theirs.close()
        self.loaded: Loaded | None = None
        self.workers: list[Worker] = []
        self.idle: asyncio.LifoQueue[Worker] = asyncio.LifoQueue()
        self.requests = 0  # waiting or in progress
        self.is_replaced = False  # by another pool: then it ends after its last request

    async def load(self) -> None:
        """Wait until the workers have loaded the model. Raise Failure if they cannot, EOFError if they end."""
        for connection in self.sockets:
            _, worker = await asyncio.get_running_loop().create_unix_connection(Worker, sock=connection)
            self.workers.append(worker)
        for worker in self.workers:
            reply = await worker.reply
            if reply.status == FAILED:
                raise Failure(reply.body.decode())
            loaded = msgspec.json.decode(reply.body, type=Loaded)
            worker.pid, worker.when_done = loaded.pid, self.worker_done
            if worker.transport.is_closing():  # it ended, unnoticed by the pool, while others were waited for
                raise EOFError("the worker has ended")
            self.idle.put_nowait(worker)
        self.loaded = loaded

    async def predict(self, prediction_id: str, body: bytearray, may_be_large: bool) -> Reply:
        """Have a request answered by the next worker that is idle. Raise EOFError if it ends instead."""
        self.requests += 1
        try:
            worker = await self.idle.get()
            while worker.transport.is_closing():  # it has ended
                if not self.workers:
                    self.idle.put_nowait(worker)  # so that the next request that waits fails at once, too
                    raise EOFError("all workers have ended")
                worker = await self.idle.get()
            return await worker.ask(prediction_id, body, may_be_large)
        finally:
            self.requests -= 1
            self.end_if_unused()

    def worker_done(self, worker: Worker) -> None:
        """Note that a worker is idle, or has ended: then a request that waits for it is to look for another."""
        if worker.transport.is_closing():
            self.workers = [one for one in self.workers if one is not worker]
        self.idle.put_nowait(worker)

    def ids(self) -> list[int]:
        """Return the ids of the workers' processes, as far as they are known."""
        return [self.parent.pid, *(worker.pid for worker in self.workers if worker.pid)]

    def is_whole(self) -> bool:
        """Return whether no worker has ended."""
        return len(self.workers) == len(self.sockets)

    def replace(self) -> None:
        """Note that there is another pool for new requests."""
        self.is_replaced = True
        self.end_if_unused()

    def end_if_unused(self) -> None:
        """End the workers of a pool that has been replaced, after its last request."""
        if self.is_replaced and not self.requests:
            self.end()

    def end(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.end()
        self.parent.kill()
        self.parent.wait()
