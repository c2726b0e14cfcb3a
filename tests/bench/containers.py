"""Runs programs in the stages' containers for the benchmark, and measures what they take. See bench.py."""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline import image, image_size, output_of
from stages import STAGES, TREE

# Runs a command; prints to standard error what is in /dev/shm (now and then: blocks, free ones, bytes of a block) and,
# at the end, the container's peak memory and its processor time in micro- or nanoseconds, from cgroup v2 or v1.
WATCH = """while sleep 0.3; do stat -f -c 'shm %b %f %S' /dev/shm >&2; done &
"$@"; status=$?
cd /sys/fs/cgroup
cat memory.peak memory/memory.max_usage_in_bytes 2>/dev/null | sed 's/^/peak /' >&2
{ grep usage_usec cpu.stat || sed 's/^/usage_nsec /' cpuacct/cpuacct.usage; } >&2 2>/dev/null
exit $status"""


def run(project, stage, *arguments, environment=(), watched=False):
    """Runs Python with the arguments in a new container of a stage, as its own program runs there, to its end.

    Returns the seconds from the container's start to its exit as the engine noted them; its standard output; and if
    watched, the processor time in seconds, and the peaks of its memory and of /dev/shm in bytes.
    """
    command = ["/opt/entrypoint.sh", *arguments]
    if watched:
        command = ["/bin/sh", "-c", WATCH, "watch", *command]
    variables = [f"--env={pair}" for pair in environment]
    options = [f"--volume={TREE / 'tests'}:/opt/tests:ro", *variables, f"--entrypoint={command[0]}"]
    ended = project.run(stage, *command[1:], options=options, seconds=3600)
    if ended.returncode:
        sys.exit(f"{ended.stdout}{ended.stderr}bench: status {ended.returncode} of {stage} {' '.join(arguments)}")
    figures = parse_figures(ended.stderr) if watched else {}
    return {"container_seconds": ended.seconds, "output": ended.stdout} | figures


def parse_figures(text):
    """What WATCH printed; None for what the machine does not report."""
    shm = re.findall(r"^shm (\d+) (\d+) (\d+)$", text, re.M)
    peak = re.search(r"^peak (\d+)$", text, re.M)
    cpu = re.search(r"^usage_([un])sec (\d+)$", text, re.M)
    return {
        "peak_bytes": int(peak[1]) if peak else None,
        "shm_bytes": max(((int(blocks) - int(free)) * int(size) for blocks, free, size in shm), default=None),
        "cpu_seconds": int(cpu[2]) / {"u": 1e6, "n": 1e9}[cpu[1]] if cpu else None,
    }


def image_sizes():
    """The bytes of each image, and of all three together: a layer that they share counts once."""
    layers = [layers_of(image(stage)) for stage in STAGES]
    together = sum((layers[0] | layers[1] | layers[2]).values()) - sum(layers[0].values()) + image_size("train")
    return {f"image of {stage}": image_size(stage) for stage in STAGES} | {"the three images together": together}


def layers_of(name):
    """The bytes of each layer of an image, by place, time and command: the same only if it is shared."""
    text = output_of("history", "--no-trunc", "--human=false", "--format", "{{json .}}", name)
    lines = [json.loads(line) for line in reversed(text.splitlines())]
    return {(place, line["CreatedAt"], line["CreatedBy"]): int(line["Size"]) for place, line in enumerate(lines)}
