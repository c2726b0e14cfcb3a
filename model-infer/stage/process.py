"""The process of a stage: its start, its signals, and its end, which may be a failure, said in one line.

It imports little: until it is imported, no signal is handled.
"""

import atexit
import contextlib
import errno
import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from stage.output import can_write, flush, print_error

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
# With any of these, torch's OpenMP binds the thread that imports it to one core, and so all workers that it forks.
BINDING_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
NO_THREADS = "cannot start enough processes and threads. Raise MNIST_PIDS (without Docker: ulimit -u), then try again."
MORE_MEMORY = "Raise MNIST_MEMORY (without Docker: the memory limit), then run it again."


def command(stage: str, *flags: str) -> str:
    """Return the command that runs a stage: in the image, in a job of Slurm, or else as `make local` does."""
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


def prepare_process() -> None:
    """Set up signals, streams and environment. Call this first.

    Until there is work to save, a signal ends the process at once; an exception might be swallowed by an import.
    """
    gc.disable()  # until imports_done(): imports make many objects that stay, and need not be looked at again and again
    handle_stop_signals(lambda number, frame: os._exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the image's entrypoint until they are handled
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, it would hide that workers have ended
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


def imports_done() -> None:
    """Have the garbage collector look after new objects, and ignore existing ones. Call it after all imports."""
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
            print_error(f"{stage}: {NO_THREADS}")
        elif isinstance(error, OSError):
            print_error(f"{stage}: {error}. Fix the cause, then run it again.")
        else:
            raise
        sys.exit(1)


def report_crash(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Report an uncaught exception: a lack of memory in one line, anything else, which is a bug, as a traceback."""
    if issubclass(kind, MemoryError) or "failed to map segment" in str(error):
        print_error(f"{Path(sys.argv[0]).stem}: out of memory ({error}). {MORE_MEMORY}")
    elif can_write(sys.stderr):
        sys.__excepthook__(kind, error, traceback)
