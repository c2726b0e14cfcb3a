#!/usr/bin/env bash
# uvicorn 0.54.0 with httptools 0.9.0: of a POST that offers to upgrade the protocol, the app gets an empty body.
#
# A server may ignore the header Upgrade and answer in HTTP/1.1 (RFC 9110, 7.8). uvicorn does so, with a line in its
# log, but httptools takes what follows the headers for the new protocol: the app gets the headers, with their
# Content-Length, and no body. curl --http2 sends such a header to every address of http://. With h11 0.16.0 the body
# comes.
#
# Seen (Python 3.11):
#   httptools, a POST of 5 bytes: 5 bytes
#   httptools, the same with Upgrade: h2c: 0 bytes
#   h11, a POST of 5 bytes: 5 bytes
#   h11, the same with Upgrade: h2c: 5 bytes
#
# Met in serve: a client was told that its body is not valid JSON.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uvicorn==0.54.0 httptools==0.9.0 h11==0.16.0
"$folder/venv/bin/python" - <<'END'
import http.client, socket, threading, uvicorn

async def app(scope, receive, send):
    message = await receive()
    text = f"{len(message.get('body', b''))} bytes".encode()
    headers = [(b"content-length", str(len(text)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})

UPGRADE = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": ""}
for parser, expected in (("httptools", "0 bytes"), ("h11", "5 bytes")):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=parser, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    cases = ("a POST of 5 bytes", {}, "5 bytes"), ("the same with Upgrade: h2c", UPGRADE, expected)
    for name, headers, right in cases:
        connection = http.client.HTTPConnection(*listener.getsockname(), timeout=20)
        connection.request("POST", "/", b"12345", headers)
        seen = connection.getresponse().read().decode()
        connection.close()
        print(f"{parser}, {name}: {seen}")
        assert seen == right
    server.should_exit = True
    thread.join()
END
