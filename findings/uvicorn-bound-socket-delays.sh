#!/usr/bin/env bash
# uvicorn 0.54.0: with a socket that is bound beforehand, as with --workers and --reload, connections lack TCP_NODELAY.
#
# asyncio sets TCP_NODELAY only where the socket names TCP as its protocol, and Config.bind_socket() makes one with
# protocol 0. So the second packet of a response waits until the client has acknowledged the first, which Linux may put
# off by 40 ms. A server on one process, which asyncio binds, has no such delay. The fix: set the option on the
# listening socket, from which connections inherit it.
#
# Seen (Python 3.11, Linux):
#   bound by asyncio, as with one process: TCP_NODELAY on, median response 0 ms
#   bound by Config.bind_socket(), as with --workers: TCP_NODELAY off, median response 44 ms
#
# Met in serve, which hands uvicorn a listening socket of its own: responses in two packets took 40 ms.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uvicorn==0.54.0
"$folder/venv/bin/python" - <<'END'
import http.client, socket, statistics, threading, time, uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

class Protocol(H11Protocol):
    def connection_made(self, transport):
        super().connection_made(transport)
        option = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        options.append("on" if option else "off")

options = []
for bound_before, name in ((False, "asyncio, as with one process"), (True, "Config.bind_socket(), as with --workers")):
    config = uvicorn.Config(app, port=0, http=Protocol, loop="asyncio", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()] if bound_before else None
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    connection = http.client.HTTPConnection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1], timeout=20)
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"ok"
        seconds.append(time.perf_counter() - start)
    print(f"bound by {name}: TCP_NODELAY {options[-1]}, median response {statistics.median(seconds) * 1000:.0f} ms")
    connection.close()
    server.should_exit = True
    thread.join()
assert options == ["on", "off"]
END
