#!/usr/bin/env bash
# uvicorn 0.54.0: limit_concurrency=N refuses the Nth connection although all others are idle, and past all middleware.
#
# It counts open connections, those between two requests and the new one included: a limit of 1 refuses every request,
# and the connections that a browser keeps open use up a limit while none of them waits for anything. The 503 is
# uvicorn's own: it does not pass through the ASGI app, so it lacks the middleware's headers, and has no Retry-After.
#
# Seen (Python 3.11):
#   limit_concurrency=1, no request in progress: 503
#   limit_concurrency=2, no request in progress: 200 503
#   limit_concurrency=3, no request in progress: 200 200 503
#   its 503: connection, content-length, content-type, date, server
#
# Met in serve: its first limit on requests was this option; an ASGI middleware that counts requests replaced it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uvicorn==0.54.0
"$folder/venv/bin/python" - <<'END'
import http.client, socket, threading, uvicorn

async def app(scope, receive, send):
    headers = [(b"content-length", b"2"), (b"x-middleware", b"passed")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})

for limit in (1, 2, 3):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, limit_concurrency=limit, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    connections, responses = [], []
    for _ in range(limit):  # one request after the other, each on a connection of its own, which stays open
        connections.append(http.client.HTTPConnection(*listener.getsockname(), timeout=20))
        connections[-1].request("GET", "/")
        responses.append(connections[-1].getresponse())
        responses[-1].read()
    statuses = [response.status for response in responses]
    print(f"limit_concurrency={limit}, no request in progress:", *statuses)
    for connection in connections:
        connection.close()
    server.should_exit = True
    thread.join()
    assert statuses == [200] * (limit - 1) + [503]

names = sorted(name.lower() for name in responses[-1].headers)
print("its 503:", ", ".join(names))
assert "x-middleware" not in names and "retry-after" not in names
END
