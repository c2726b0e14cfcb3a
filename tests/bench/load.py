"""Sends requests to an HTTP service from some clients at once, and prints latencies and statuses. See serving.py.

Each client has a connection of its own, and sends its next request as soon as it has the response to the last one. A
request that is refused since the service is busy is sent again until it is not, and all of that is its latency. This is
one process without threads that does little else than send and receive, since it takes time of the service's cores.

    python tests/bench/load.py 127.0.0.1:8000 CLIENTS SECONDS <bodies.json

Reads   standard input: a list of JSON bodies, which are sent in turns to /predictions
Prints  a line of JSON: the latencies in seconds; how many responses had which status; the seconds of the whole
"""

import asyncio
import itertools
import json
import re
import sys
from collections import Counter

REFUSALS, REFUSAL_SECONDS = (409, 429, 503), 0.01  # statuses that say so, and how long a client waits after them


class Client(asyncio.Protocol):
    """A connection on which a request follows the other until an end, a time of the event loop."""

    def __init__(self, requests, end, latencies, statuses):
        self.requests, self.end, self.latencies, self.statuses = requests, end, latencies, statuses
        self.loop = asyncio.get_running_loop()
        self.ended = self.loop.create_future()

    def connection_made(self, transport):
        self.transport = transport
        self.begin()

    def begin(self):
        """Takes the next request, if it is not too late, and sends it."""
        if self.loop.time() >= self.end:
            self.ended.set_result(None)
            return
        self.request, self.began = next(self.requests), self.loop.time()
        self.send()

    def send(self):
        self.received = b""
        self.transport.write(self.request)

    def data_received(self, data):
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        if not end or len(body) < int(re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)[1]):
            return
        status = int(head.split(maxsplit=2)[1])
        self.statuses[status] += 1
        if status == 200:
            self.latencies.append(self.loop.time() - self.began)
            self.begin()
        elif status in REFUSALS:
            self.loop.call_later(REFUSAL_SECONDS, self.send)
        else:
            self.ended.set_exception(ConnectionError(f"the service responded with status {status}"))

    def connection_lost(self, error):
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(f"the service closed a connection: {error}"))


async def send_all(address, clients, seconds, bodies):
    """What the module prints."""
    host, port = address.split(":")
    head = f"POST /predictions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: "
    requests = itertools.cycle([f"{head}{len(body)}\r\n\r\n{body}".encode() for body in bodies])
    latencies, statuses, loop = [], Counter(), asyncio.get_running_loop()
    began = loop.time()
    made = [
        await loop.create_connection(lambda: Client(requests, began + seconds, latencies, statuses), host, int(port))
        for _ in range(clients)
    ]
    await asyncio.gather(*(client.ended for _, client in made))
    return {"latencies": latencies, "statuses": statuses, "seconds": loop.time() - began}


if __name__ == "__main__":
    try:
        result = asyncio.run(send_all(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), json.load(sys.stdin)))
    except ConnectionError as error:
        sys.exit(f"load: {error}")
    print(json.dumps(result))
