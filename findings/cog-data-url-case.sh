#!/usr/bin/env bash
# cog 0.23.1: a model whose input is a Path gets the picture, its base64 text or a str, by the case of a data URL.
#
# The scheme of a URL has no case (RFC 3986), and the word base64 has none to browsers (the Fetch standard).
# cog.Path.validate() accepts DATA:, but the HTTP server compares letters: it passes such a URL on as it is, as a str,
# which the type of the model's parameter excludes. With ;BASE64 the model's file holds the base64 text instead of the
# bytes. The request is refused in neither case.
#
# Seen (Python 3.11), for 3 bytes in base64:
#   data:image/png;base64,AAAA: succeeded, a file of 3 bytes
#   data:image/png;BASE64,AAAA: succeeded, a file of 4 bytes
#   DATA:image/png;base64,AAAA: succeeded, a str
#   cog.Path.validate("DATA:image/png;base64,AAAA"): a file of 3 bytes
#
# Met when the same requests were sent to Cog and to serve, whose API follows Cog's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cog==0.23.1
cat >"$folder/predict.py" <<'END'
from cog import BasePredictor, Path

class Predictor(BasePredictor):
    def predict(self, image: Path) -> str:
        return "a str" if isinstance(image, str) else f"a file of {image.stat().st_size} bytes"
END
cd "$folder"
TMPDIR="$folder" PATH="$folder/venv/bin:$PATH" python - <<'END'
import contextlib, http.client, json, os, shutil, socket, subprocess, sys, time
import cog

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
environment = {**os.environ, "PORT": str(port), "COG_PREDICT_TYPE_STUB": "predict.py:Predictor"}
command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

def ask(method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
    return json.load(connection.getresponse())

def wait_until_ready():
    for _ in range(600):
        with contextlib.suppress(OSError):
            if ask("GET", "/health-check")["status"] == "READY":
                return
        time.sleep(0.1)

outcomes = []
try:
    for url in ("data:image/png;base64,AAAA", "data:image/png;BASE64,AAAA", "DATA:image/png;base64,AAAA"):
        wait_until_ready()  # it may be busy for a moment after its last answer
        answer = ask("POST", "/predictions", {"input": {"image": url}})
        shutil.rmtree(f"/tmp/coglet/predictions/{answer['id']}")  # which Cog leaves behind, whatever TMPDIR is
        outcomes.append(f"{answer['status']}, {answer.get('output')}")
        print(f"{url}: {outcomes[-1]}")
finally:
    server.terminate()
    server.wait()
outcomes.append(f"a file of {cog.Path.validate(url).convert().stat().st_size} bytes")
print(f'cog.Path.validate("{url}"): {outcomes[-1]}')
assert outcomes == [
    "succeeded, a file of 3 bytes", "succeeded, a file of 4 bytes", "succeeded, a str", "a file of 3 bytes"
]
END
