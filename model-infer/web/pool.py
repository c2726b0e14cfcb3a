"""Starts the processes that predict (predict.py), and passes requests on to them.

The messages over a process's socket are REQUEST, the ID in the path and the body; and REPLY and the body.
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

SECONDS = 20  # for a picture; then the process that predicts it is killed
MAX_PROCESSES = 3  # each takes 60 MB, and up to 80 MB more for a picture
REQUEST = struct.Struct("!?II")  # whether the picture may be large; the sizes of ID and body
REPLY = struct.Struct("!H24pI")  # HTTP status, or one of the following; outcome; the body's size
FAILED = 0  # the model could not be loaded; the body says why
LARGE = 1  # the picture is large; not predicted


class Reply(NamedTuple):
    """What a process answers to a request."""

    status: int  # of HTTP, FAILED or LARGE
    outcome: str  # the confidence of the prediction, "refused" if the picture was, or ""
    body: bytes  # JSON


class Loaded(msgspec.Struct):
    """What a process says when it has loaded the model."""

    pid: int
    sha256: str  # of the model's file
    accuracy: float | None  # on the test images, in percent; None if it has not been evaluated


class Process(asyncio.Protocol):
    """A process that predicts one picture at a time, at the other end of a connection."""

    def __init__(self) -> None:
        self.pid = 0  # not loaded yet
        self.received = bytearray()  # of the reply
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()  # the first one comes by itself
        self.timer: asyncio.TimerHandle | None = None  # of the request in progress
        self.when_done: Callable[[Process], None] = lambda process: None  # called after each reply, and at the end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, prediction_id: str, body: bytes, may_be_large: bool) -> asyncio.Future[Reply]:
        """Send a request, and return the future of the reply, which is an EOFError if the process ends."""
        loop, name = asyncio.get_running_loop(), prediction_id.encode()
        self.reply, self.timer = loop.create_future(), loop.call_later(SECONDS, self.end)
        if self.transport.is_closing():
            self.connection_lost(None)
        else:
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
        """Note that the process has ended."""
        self.end()
        self.finish()
        if not self.reply.done():
            self.reply.set_exception(EOFError("the process has ended"))
            self.reply.exception()  # asyncio would report it if the request had been given up

    def finish(self) -> None:
        """Have the pool note that this process is idle, or has ended."""
        if self.timer:
            self.timer.cancel()
        self.when_done(self)

    def end(self) -> None:
        """End the process, whatever it does."""
        self.transport.close()
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.pid = 0  # soon, it may be that of another process


class Pool:
    """The processes that predict with a model. They start at once; `loaded` is None until load() has returned."""

    def __init__(self, model: Path, data: Path) -> None:
        pairs = [socket.socketpair() for _ in range(min(count_cores(), MAX_PROCESSES))]
        self.sockets = [ours for ours, _ in pairs]
        descriptors = [theirs.fileno() for _, theirs in pairs]
        command = [sys.executable, "-m", "web.predict", str(model.absolute()), str(data.absolute())]
        self.process = subprocess.Popen(
            [*command, *map(str, descriptors)], cwd=Path(__file__).parents[1], pass_fds=descriptors
        )
        for _, theirs in pairs:
            theirs.close()
        self.loaded: Loaded | None = None
        self.processes: list[Process] = []
        self.idle: asyncio.LifoQueue[Process] = asyncio.LifoQueue()
        self.requests = 0  # waiting or in progress
        self.is_replaced = False  # by another pool: then it ends after its last request

    async def load(self) -> None:
        """Wait until the processes have loaded the model. Raise Failure if they cannot, EOFError if they end."""
        for connection in self.sockets:
            _, process = await asyncio.get_running_loop().create_unix_connection(Process, sock=connection)
            self.processes.append(process)
        for process in self.processes:
            reply = await process.reply
            if reply.status == FAILED:
                raise Failure(reply.body.decode())
            loaded = msgspec.json.decode(reply.body, type=Loaded)
            process.pid, process.when_done = loaded.pid, self.process_done
            if process.transport.is_closing():
                raise EOFError("the process has ended")
            self.idle.put_nowait(process)
        self.loaded = loaded

    async def predict(self, prediction_id: str, body: bytes, may_be_large: bool) -> Reply:
        """Have a request answered by the next process that is idle. Raise EOFError if the process ends instead."""
        self.requests += 1
        try:
            process = await self.idle.get()
            while process.transport.is_closing() and self.processes:  # it ended while it was idle
                process = await self.idle.get()
            return await process.ask(prediction_id, body, may_be_large)
        finally:
            self.requests -= 1
            self.end_if_unused()

    def process_done(self, process: Process) -> None:
        """Note that a process is idle, or has ended."""
        if process.transport.is_closing():
            self.processes = [one for one in self.processes if one is not process]
        if not process.transport.is_closing() or not self.processes:  # so that a request that waits fails at once
            self.idle.put_nowait(process)

    def ids(self) -> list[int]:
        """Return the ids of the processes, as far as they are known."""
        return [self.process.pid, *(process.pid for process in self.processes if process.pid)]

    def is_whole(self) -> bool:
        """Return whether no process has ended."""
        return len(self.processes) == len(self.sockets)

    def replace(self) -> None:
        """Note that there is another pool for new requests."""
        self.is_replaced = True
        self.end_if_unused()

    def end_if_unused(self) -> None:
        """End the processes of a pool that has been replaced, after its last request."""
        if self.is_replaced and not self.requests:
            self.end()

    def end(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.end()
        self.process.kill()
        self.process.wait()
