"""The limits of a container: cores, memory, processes and threads."""

import contextlib
import os
import threading
from pathlib import Path

from stage.process import MORE_MEMORY, NO_THREADS, Failure


def count_cores() -> int:
    """Return the number of cores that this process may use: CPU affinity and cgroup quota, rounded down."""
    cores = len(os.sched_getaffinity(0))
    v2, v1 = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu")
    with contextlib.suppress(OSError, ValueError):
        if v2.exists():
            quota, period = v2.read_text().split()  # "max 100000" where there is no quota: a ValueError
        else:
            quota, period = ((v1 / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def check_memory(needed: int, what: str) -> None:
    """Raise Failure if the container's memory limit is below `needed` bytes."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max" in it
            limit = int(Path(path).read_text())
            if limit < needed:
                raise Failure(  # rounded up and down, or both could be shown as the same
                    f"{what} needs about {-(-needed // 10**6)} MB of memory, but the limit is {limit // 10**6} MB. "
                    f"{MORE_MEMORY}",
                    status=2,
                )


def check_threads(count: int) -> None:
    """Raise Failure if that many threads cannot be started: libraries that cannot start one abort or hang."""
    release = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=release.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        raise Failure(NO_THREADS) from None
    finally:
        release.set()
        for thread in threads:  # forking while they run would not be safe
            thread.join()
