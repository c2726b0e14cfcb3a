#!/usr/bin/env bash
# torch 2.13.0: with OMP_PLACES=threads in the environment, `import torch` takes all CPUs but one from the process.
#
# The wheel's OpenMP binds the thread that loads it to the first place, although OMP_PROC_BIND is not set and nothing
# runs in parallel yet. What this thread starts inherits that: the processes that it forks share one CPU, and a count
# of CPUs by os.sched_getaffinity() after the import gives 1. OMP_PLACES=cores does the same with a whole core.
#
# Seen (Python 3.11, Linux, 2 CPUs):
#   without OMP_PLACES: 2 CPUs before the import, 2 after it, 2 in a process forked then
#   OMP_PLACES=threads: 2 CPUs before the import, 1 after it, 1 in a process forked then
#
# Met in train, whose forked workers shared a core; all stages now remove such variables before they import torch.
#
# It needs two CPUs. The wheel is that of pip's own index settings; one for the CPU alone will do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat >"$folder/count.py" <<'END'
import os, warnings
warnings.simplefilter("ignore")  # torch looks for numpy, which is not needed here
before = len(os.sched_getaffinity(0))
import torch
after = len(os.sched_getaffinity(0))
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, str(len(os.sched_getaffinity(0))).encode())
    os._exit(0)
os.wait()
print(f"{before} CPUs before the import, {after} after it, {os.read(reader, 9).decode()} in a process forked then")
END
unset OMP_PLACES OMP_PROC_BIND GOMP_CPU_AFFINITY KMP_AFFINITY
cpus=$("$folder/venv/bin/python" -c "import os; print(len(os.sched_getaffinity(0)))")
if [ "$cpus" -lt 2 ]; then
    echo "this process may use one CPU only: there is nothing to see"
    exit 0
fi
plain=$("$folder/venv/bin/python" "$folder/count.py")
bound=$(OMP_PLACES=threads "$folder/venv/bin/python" "$folder/count.py")
echo "without OMP_PLACES: $plain"
echo "OMP_PLACES=threads: $bound"
[ "$plain" = "$cpus CPUs before the import, $cpus after it, $cpus in a process forked then" ]
[ "$bound" = "$cpus CPUs before the import, 1 after it, 1 in a process forked then" ]
