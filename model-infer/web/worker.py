"""Predicts pictures for the service, in workers: a process for each core, each with one picture at a time.

    python -m web.worker MODEL DATA SOCKET...

pool.py starts it, with a connected socket for each worker, given by its descriptor. It loads the model, or says why
not, forks the other workers, and is one itself. A worker answers the requests on its socket until that is closed.
"""

import signal

from stage import process

if __name__ == "__main__":
    process.prepare_process()  # before other imports, as in infer.py
    for number in process.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to all processes; serve ends this one

import binascii
import ctypes
import io
import os
import re
import socket
import string
import struct
import sys
import time
import uuid
import zlib
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote_to_bytes

import msgspec
import torch

from pictures import reading
from pictures.opening import MEMORY, TooLarge, open_picture
from pictures.prediction import NotFinite, Predictor, load_predictor
from stage.process import Failure
from web import api
from web.pool import FAILED, LARGE, REPLY, REQUEST, Loaded, Reply

SMALL = 80_000_000  # bytes that a picture may take in each worker at once: a photo of 12 megapixels; others wait
TRIMMED_BODY = 1_000_000  # bytes of a request's body: after larger ones, free memory is returned to the kernel
MAX_CODED = 1_000_000  # %-coded characters in a data URL: each takes 100 bytes of memory while they are decoded


def main() -> None:
    """Load the model, and answer requests in as many workers as there are sockets."""
    model, data, *descriptors = sys.argv[1:]
    connections = [socket.socket(fileno=int(descriptor)) for descriptor in descriptors]
    try:
        predictor = load_predictor(Path(model), Path(data))
    except Failure as failure:
        send(connections[0], failed(failure))
        return
    process.imports_done()
    mine = connections.pop()
    for connection in connections:
        if os.fork() == 0:
            mine.close()
            mine = connection
            break
    for connection in connections:
        if connection is not mine:
            connection.close()  # or serve would not notice that a worker has ended
    work(mine, predictor)
    process.end_process(0)


def work(connection: socket.socket, predictor: Predictor) -> None:
    """Answer requests until the connection is closed."""
    loaded = Loaded(os.getpid(), predictor.sha256, predictor.accuracy)
    send(connection, Reply(200, "", msgspec.json.encode(loaded)))
    requests = connection.makefile("rb")
    while header := receive(requests, REQUEST.size):
        may_be_large, id_size, size = REQUEST.unpack(header)
        prediction_id = receive(requests, id_size).decode()
        send(connection, answer(predictor, receive(requests, size), prediction_id, may_be_large))
        if may_be_large or size > TRIMMED_BODY:
            # The image's settings of malloc, made for training, keep freed memory; here each worker would keep it.
            ctypes.CDLL(None).malloc_trim(0)


def receive(requests: io.BufferedReader, size: int) -> bytearray:
    """Return the next bytes; none if the connection has been closed."""
    content = bytearray(size)  # which answer() can empty
    return content if requests.readinto(content) == size else bytearray()


def send(connection: socket.socket, reply: Reply) -> None:
    """Send a reply."""
    connection.sendall(REPLY.pack(reply.status, reply.outcome.encode(), len(reply.body)) + reply.body)


def failed(failure: Failure) -> Reply:
    """Return the reply that says why the model cannot be loaded, or cannot predict; its path may be no UTF-8."""
    return Reply(FAILED, "", str(failure).encode(errors="backslashreplace"))


def answer(predictor: Predictor, body: bytearray, prediction_id: str, may_be_large: bool) -> Reply:
    """Return the reply to a request for a prediction; the ID is that in its path, or empty. This empties the body."""
    outcome = ""
    try:
        request = msgspec.json.decode(body, type=api.PredictionRequest)
        body.clear()  # the picture is to be the only copy in memory while it is decoded
        chosen = choose_id(prediction_id, request.id)
        outcome = "refused"
        started = time.perf_counter()
        picture = decode(request.input.image)
        del request
        image = open_picture(picture, MEMORY if may_be_large else SMALL)
        del picture
        read, pixels = reading.read(image, predictor)
        content = {
            "id": chosen,
            "status": "succeeded",
            "logs": "",
            "output": {**read, "image": as_data_url(pixels)},
            "metrics": {"predict_time": round(time.perf_counter() - started, 6)},
        }
        return Reply(200, read["confidence"], msgspec.json.encode(content))
    except NotFinite as failure:
        return failed(failure)
    except TooLarge as failure:
        status, problem = 422 if may_be_large else LARGE, str(failure)
    except Failure as failure:
        status, problem = 422, str(failure)
    except msgspec.ValidationError as error:
        # It may have a key that the client sent: it is cut, and line breaks in it escaped.
        status, problem = 422, ascii(str(error)[:200])[1:-1]
    except (msgspec.DecodeError, RecursionError):  # which nothing else raises
        status, problem = 400, "the body is not valid JSON."
    return Reply(status, outcome, msgspec.json.encode({"detail": problem}))


def choose_id(in_path: str, in_body: str | None) -> str:
    """Return the ID of a prediction: the client's, or a new one. Raise Failure if it is invalid, or there are two."""
    if in_path and in_body not in (None, in_path):
        raise Failure("the id in the body differs from the one in the path. Leave it out of the body.")
    chosen = in_path or in_body
    if chosen is None:
        return uuid.uuid4().hex
    if not re.fullmatch(api.ID, chosen):
        raise Failure("id: 1 to 80 letters, digits, points, hyphens and underscores are allowed.")
    return chosen


def decode(data_url: str) -> bytes:
    """Return the content of a base64 data URL. Raise Failure for anything else, such as an http URL."""
    header = re.match(api.DATA_URL, data_url)
    if not header:
        raise Failure("image: not a base64 data URL. Send one such as data:image/png;base64,...")
    content = data_url[header.end() :]
    with suppress(ValueError):  # other characters than base64's, which may stand in a URL
        return binascii.a2b_base64(content, strict_mode=True)
    if content.count("%") > MAX_CODED:
        raise Failure(f"image: more than {MAX_CODED:,} %-coded characters. Send plain base64.")
    try:
        plain = unquote_to_bytes(content).translate(None, string.whitespace.encode())
        return binascii.a2b_base64(plain, strict_mode=True)
    except ValueError:  # from binascii, or because the text has a lone surrogate
        raise Failure("image: its base64 is not valid. Encode the picture's file again.") from None


def as_data_url(pixels: torch.Tensor) -> str:
    """Return an image, uint8 [H, W] or [H, W, 3], as the data URL of a PNG. Pillow takes twice as long."""
    height, width, *colors = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if colors else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.numpy())  # 0: not filtered
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return "data:image/png;base64," + binascii.b2a_base64(png, newline=False).decode()


if __name__ == "__main__":
    with process.exit_on_failure("serve"), suppress(ConnectionError):  # serve has ended
        main()
