"""The process of a stage: signals, output, limits, and errors in one line.

It imports little: until it is imported, no signal is handled.
"""

import atexit
import contextlib
import errno
import gc
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, NoReturn

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
# With any of these, torch's OpenMP binds the thread that imports it to one core, and so all workers that it forks.
BINDING_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
THREADS_HINT = "cannot start enough processes and threads. Raise MNIST_PIDS, then run it again."


def command(stage: str, *flags: str) -> str:
    """Return the words to type that run a stage: in the image, in a job of Slurm, or else as `make local` does."""
    folder = {"train": "model-train", "evaluate": "model-eval", "infer": "model-infer"}[stage]
    if Path("/opt/entrypoint.sh").exists():
        words = f"docker compose run --rm {stage}"
    elif stage == "train" and "SLURM_JOB_ID" in os.environ:
        words = "sbatch deploy/train.sbatch"
    else:
        words = f".venv/bin/python {folder}/{stage}.py --data data --model model"
    return " ".join((words, *flags))


class Failure(Exception):
    """Ends a stage. The message is one line for the user: what is wrong, where, and the command that fixes it.

    The exit status is 1 for work that failed, 2 for a wrong request.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def prepare_process(stage: str, needed_memory: int = 0) -> None:
    """Set up signals, streams and environment, and check the memory limit. Call this first.

    Until there is work to save, a signal ends the process at once; an exception might be swallowed by an import.
    """
    gc.disable()  # until imports_done(): imports make many objects that stay, and need not be looked at again and again
    handle_stop_signals(lambda number, frame: os._exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the image's entrypoint until they are handled
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, it would hide the death of workers
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the closed stream's number, so that no other file gets it
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have characters that the locale cannot encode
    atexit.register(lambda: flush(sys.stdout))  # Python's own flush at exit fails if the output is closed or full
    sys.excepthook = report_crash
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's BLAS is not used here; by default it starts a thread per core
    os.environ["MPLBACKEND"] = "agg"  # figures are written to files, never shown
    for name in BINDING_VARIABLES:
        os.environ.pop(name, None)
    with exit_on_failure(stage):
        check_memory(needed_memory, stage)


def imports_done() -> None:
    """Have the garbage collector look after new objects, and ignore those that there are. Call it after all imports."""
    gc.freeze()
    gc.enable()


def end_process(status: int) -> NoReturn:
    """End the process, without what the interpreter does at the end: it would clear torch's modules for 0.2 s."""
    atexit._run_exitfuncs()
    os._exit(status)


def handle_stop_signals(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Install a handler for the signals that ask a program to stop, except those that are ignored, as under nohup."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_signals_deferred() -> Iterator[None]:
    """Let the block end before a stop signal is handled. For the main thread only."""
    received: list[int] = []
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = [signal.signal(number, lambda number, frame: received.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        for stop_signal in received:
            signal.raise_signal(stop_signal)


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGKILL; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextlib.contextmanager
def exit_on_failure(stage: str) -> Iterator[None]:
    """Turn a failure in the block into one line on standard error and an exit status."""
    try:
        yield
    except Failure as failure:
        print_error(f"{stage}: {failure}")
        sys.exit(failure.status)
    except (OSError, RuntimeError) as error:
        # A failed fork raises EAGAIN, a thread that cannot be started a RuntimeError with this text.
        if getattr(error, "errno", None) == errno.EAGAIN or "can't start new thread" in str(error):
            print_error(f"{stage}: {THREADS_HINT}")
        elif isinstance(error, OSError):
            print_error(f"{stage}: {error}. Fix the cause, then run it again.")
        else:
            raise
        sys.exit(1)


def refuse_flags(stage: str, message: str) -> NoReturn:
    """End a stage whose command line is wrong: used as ArgumentParser.error."""
    print_error(f"{stage}: {message}. See: {stage} --help")
    sys.exit(2)


def report_crash(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Report an uncaught exception: a lack of memory in one line, anything else, which is a bug, as a traceback."""
    if issubclass(kind, MemoryError) or "failed to map segment" in str(error):
        print_error(f"{Path(sys.argv[0]).stem}: out of memory ({error}). Raise the memory limit, then run it again.")
    elif can_write(sys.stderr):
        sys.__excepthook__(kind, error, traceback)


# Output ---------------------------------------------------------------------------------------------------------------


def say(text: str, end: str = "\n") -> None:
    """Print to standard output."""
    write(sys.stdout, text + end)


def print_error(text: str) -> None:
    """Print a failure or a warning to standard error, on one line even if a path or a flag contains a line break."""
    write(sys.stderr, text.replace("\n", "\\n") + "\n")


def write(stream: IO[str], text: str) -> None:
    """Write to a standard stream, or drop the text if it cannot be written: output must not stop the work."""
    if can_write(stream):
        with contextlib.suppress(OSError):
            stream.write(text)
        flush(stream)


def percent(value: float, digits: int = 2) -> str:
    """Format a percentage. Only 100 itself is shown as 100 %."""
    return f"{value if value == 100 else min(value, 100 - 10**-digits):.{digits}f} %"


def can_write(stream: IO[str]) -> bool:
    """Return whether a standard stream accepts text within a second; a pipe that nobody reads does not."""
    try:
        return bool(select.select([], [stream.fileno()], [], 1)[1])
    except ValueError:  # not backed by a file descriptor
        return True


def flush(stream: IO[str]) -> None:
    """Flush a standard stream; if that fails, as when a pipe's reader is gone, drop all further output."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# Limits ---------------------------------------------------------------------------------------------------------------


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
                    f"Raise MNIST_MEMORY, then run it again.",
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
        raise Failure(THREADS_HINT) from None
    finally:
        release.set()
        for thread in threads:  # forking while they run would not be safe
            thread.join()
