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
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from stage.process import Failure, count_cores

SECONDS = 20  # for a picture; then the process that predicts it is killed
MAX_PROCESSES = 3  # each takes 60 MB, and up to 80 MB more for a picture
REQUEST = struct.Struct("!?BI")  # whether the picture may be large; the sizes of ID and body
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


class Process:
    """A process that predicts one picture at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.pid = reader, writer, 0  # 0: not loaded yet

    async def ask(self, prediction_id: str, body: bytes, may_be_large: bool) -> Reply:
        """Return the reply to a request. Raise OSError or EOFError if the process has ended."""
        name = prediction_id.encode()
        self.writer.writelines([REQUEST.pack(may_be_large, len(name), len(body)) + name, body])
        await self.writer.drain()
        return await self.read()

    async def read(self) -> Reply:
        """Return the next reply."""
        status, outcome, size = REPLY.unpack(await self.reader.readexactly(REPLY.size))
        return Reply(status, outcome.decode(), await self.reader.readexactly(size))

    def end(self) -> None:
        """End the process, whatever it does."""
        self.writer.close()
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.pid = 0


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
            self.processes.append(Process(*await asyncio.open_unix_connection(sock=connection)))
        for each in self.processes:
            reply = await each.read()
            if reply.status == FAILED:
                raise Failure(reply.body.decode())
            loaded = msgspec.json.decode(reply.body, type=Loaded)
            each.pid = loaded.pid
            self.idle.put_nowait(each)
        self.loaded = loaded

    async def predict(self, prediction_id: str, body: bytes, may_be_large: bool) -> Reply:
        """Have a request answered by the next process that is idle. Raise EOFError if the process ends instead."""
        self.requests += 1
        try:
            each = await self.idle.get()
            # If the request is given up, the process still sends its reply, which must be read.
            task = asyncio.ensure_future(self.ask(each, prediction_id, body, may_be_large))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # or asyncio would report it
            return await asyncio.shield(task)
        finally:
            self.requests -= 1
            self.end_if_unused()

    async def ask(self, each: Process, prediction_id: str, body: bytes, may_be_large: bool) -> Reply:
        """Have a process answer a request, and note that it is idle then, or has ended."""
        try:
            async with asyncio.timeout(SECONDS):
                reply = await each.ask(prediction_id, body, may_be_large)
            self.idle.put_nowait(each)
            return reply
        except (OSError, EOFError) as error:  # a TimeoutError is an OSError
            each.end()
            if each in self.processes:
                self.processes.remove(each)
            if not self.processes:
                self.idle.put_nowait(each)  # so that whoever waits learns it too
            raise EOFError from error

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
        for each in self.processes:
            each.end()
        self.processes.clear()
        self.process.kill()
        self.process.wait()
