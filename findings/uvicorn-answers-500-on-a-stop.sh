#!/usr/bin/env bash
# uvicorn 0.54.0: on a planned stop, a request that outlives timeout_graceful_shutdown is answered 500, as for a bug.
#
# uvicorn cancels the request's task and takes the CancelledError for an error of the app. It is no Exception, so
# middleware for errors does not see it, and clients and monitoring count a failure of the service at such a restart.
# An app that catches CancelledError can still respond, for example with 503.
#
# Seen (Python 3.11):
#   in progress at the stop, app catches Exception: 500 Internal Server Error
#   in progress at the stop, app catches CancelledError: 503 Service Unavailable
#
# Met in serve, which now responds with 503 to the requests that still wait when it is stopped.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uvicorn==0.54.0
"$folder/venv/bin/python" - <<'END'
import asyncio, http.client, socket, threading, uvicorn

in_progress = threading.Event()

async def respond(send, status):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})

def status_on_stop(caught):
    """Return the status of a request in progress at a stop, in an app that responds with 503 to the error."""

    async def app(scope, receive, send):
        in_progress.set()
        try:
            await asyncio.sleep(30)
            await respond(send, 200)
        except caught:
            await respond(send, 503)

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    connection = http.client.HTTPConnection(*listener.getsockname(), timeout=20)
    connection.request("GET", "/")
    assert in_progress.wait(20)
    server.should_exit = True
    response = connection.getresponse()
    thread.join()
    in_progress.clear()
    return response.status

statuses = []
for error in (Exception, asyncio.CancelledError):
    statuses.append(status_on_stop(error))
    print(f"in progress at the stop, app catches {error.__name__}:", statuses[-1], http.client.responses[statuses[-1]])
assert statuses == [500, 503]
END
