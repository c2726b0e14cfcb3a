#!/usr/bin/env bash
# tqdm 4.67.1: the first bar starts a thread that lives until the program's exit, although the bar has been closed.
#
# The thread is a monitor that refreshes bars that have not moved for 10 s. So a program that has shown one bar, or has
# called something that did, such as torchvision's downloads, has two threads from then on: a later fork is one of a
# process with several threads, of which Python 3.12 warns, since what another thread has locked stays so in the child.
# tqdm.monitor_interval = 0 before the first bar prevents it.
#
# Seen (Python 3.11):
#   before the first bar: MainThread
#   after it was closed: MainThread, TMonitor
#   with monitor_interval = 0: MainThread
#
# Met in train: the bar of the first download, and that of the progress, came before the workers were forked.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tqdm==4.67.1
cat >"$folder/bar.py" <<'END'
import io, sys, threading
from tqdm import tqdm

def names():
    return ", ".join(type(one).__name__.strip("_") for one in threading.enumerate())

if sys.argv[1:] == ["without"]:
    tqdm.monitor_interval = 0
before = names()
with tqdm(total=2, file=io.StringIO()) as bar:
    bar.update(2)
del bar
print(before, names(), sep="|")
END
IFS='|' read -r before after < <("$folder/venv/bin/python" "$folder/bar.py")
IFS='|' read -r _ without < <("$folder/venv/bin/python" "$folder/bar.py" without)
echo "before the first bar: $before"
echo "after it was closed: $after"
echo "with monitor_interval = 0: $without"
[ "$before" = MainThread ] && [ "$after" = "MainThread, TMonitor" ] && [ "$without" = MainThread ]
