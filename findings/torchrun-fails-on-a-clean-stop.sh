#!/usr/bin/env bash
# torch 2.13.0: after SIGTERM torchrun exits with 1 and a traceback, although all workers saved and exited with 0.
#
# It passes the signal on and waits for the workers, but not for their exit statuses, and then ends by an exception of
# its own. So whoever started it sees neither success nor a signal's status (143): a scheduler that stops a job takes
# it for one that failed.
#
# Seen (Python 3.11, Linux):
#   the workers' ends: saved, saved
#   torchrun: exit status 1, SignalException: got signal: 15
#
# Met in launch.py, which starts training on several nodes under torchrun and hands over the training's own exit status.
#
# The wheel is that of pip's own index settings; one for the CPU alone will do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cd "$folder"
cat >work.py <<'END'
import os, signal, sys

def save(*_):
    with open(f"saved.{os.environ['RANK']}", "w"):
        sys.exit(0)

signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True:
    signal.pause()
END
TMPDIR="$folder" venv/bin/python - <<'END'
import pathlib, re, subprocess, sys

torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "work.py"]
with subprocess.Popen(torchrun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    ready = process.stdout.readline(), process.stdout.readline()
    process.terminate()
    _, errors = process.communicate(timeout=60)
assert ready == ("ready\n", "ready\n")
saved = [path.name for path in pathlib.Path().glob("saved.*")]
print("the workers' ends:", ", ".join(name.partition(".")[0] for name in saved))
found = re.findall(r"(SignalException): Process \d+ (got signal: \d+)", errors)
print(f"torchrun: exit status {process.returncode},", ": ".join(found[-1]) if found else "no exception")
assert len(saved) == 2 and process.returncode == 1 and found
END
