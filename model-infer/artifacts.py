"""How the stages hand files to each other: data that is verified, files that are published whole, errors in one line.

This file stands in every image, byte for byte the same. The original is model-train/artifacts.py, copied by
`make net`. It imports only the standard library: a stage looks at its files before it spends a second on torch.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

DATA = Path("/opt/mount/data")
MODEL = Path("/opt/mount/model")

# MNIST's raw files, in the folder where torchvision keeps them: size in bytes and sha256.
RAW_FOLDER = "MNIST/raw"
RAW_FILES = {
    "train-images-idx3-ubyte": (47040016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (60008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (7840016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (10008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
DATA_SHA256 = {name: sha256 for name, (_, sha256) in RAW_FILES.items()}
DATA_HINT = "Put the data set there with: make data"

THREADS_HINT = "too few processes and threads can be started. Raise MNIST_PIDS, then run it again."
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

WRITE_HINTS = {
    errno.ENOSPC: "Free some disk space (docker system df shows what Docker holds), then run it again.",
    errno.EDQUOT: "Free some of the disk quota, then run it again.",
    errno.EROFS: "Mount the folder writable, then run it again.",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f), then run it again.",
    errno.EACCES: f"Make the folder writable for uid {os.getuid()}, which runs this stage, then run it again.",
    errno.EPERM: f"Make the folder belong to uid {os.getuid()}, which runs this stage, then run it again.",
}


class Failure(Exception):
    """Work that cannot go on. Its text is one line for a person: what is wrong, where, and the command that fixes it.

    The exit status is 1 for work that failed, 2 for a request that does not fit.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


# The process ----------------------------------------------------------------------------------------------------------


def prepare_process() -> None:
    """Sets up signals and standard streams: the first thing that a program does.

    Before there is work to save, a signal ends the process at once. An exception in its place could be lost, since
    signals come in the middle of imports too.
    """
    handle_stop_signals(lambda number, frame: os._exit(128 + number))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, it would hide that a worker has ended
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the number of the closed stream, which no other file must have
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have characters that the locale has not
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, which does nothing here, would start one for each core
    os.environ["MPLBACKEND"] = "agg"  # figures are written, never shown, whatever the user's environment asks for


def signal_name(number: int) -> str:
    """The name of a signal, such as SIGKILL; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def handle_stop_signals(handler) -> None:
    """Has a handler called for each signal that asks a program to stop, unless it is ignored, as under nohup."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def exit_on_failure(stage: str):
    """Turns what goes wrong in the block into one line on standard error and an exit status."""
    try:
        yield
    except Failure as failure:
        report(f"{stage}: {failure}")
        sys.exit(failure.status)
    except (OSError, RuntimeError) as error:
        # A fork that fails is EAGAIN, a thread that cannot be had a RuntimeError with this text.
        if getattr(error, "errno", None) == errno.EAGAIN or "can't start new thread" in str(error):
            report(f"{stage}: {THREADS_HINT}")
        elif isinstance(error, OSError):
            report(f"{stage}: {error}. Fix that, then run it again.")
        else:
            raise
        sys.exit(1)
    finally:
        flush(sys.stdout)


def say(text: str, end: str = "\n") -> None:
    """Prints to standard output."""
    with contextlib.suppress(OSError):
        print(text, end=end)
    flush(sys.stdout)


def report(text: str) -> None:
    """Prints a failure or a warning to standard error, on one line whatever a path or a flag has in it."""
    with contextlib.suppress(OSError):
        print(text.replace("\n", "\\n"), file=sys.stderr)
    flush(sys.stderr)


def flush(stream) -> None:
    """Flushes a standard stream. What cannot be written is dropped: a reader that has gone must not stop the work."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def refuse_flags(stage: str, message: str) -> NoReturn:
    """Ends a stage whose command line is wrong; a parser's error() is to be this."""
    report(f"{stage}: {message}. See: {stage} --help")
    sys.exit(2)


def check_memory(needed: int, stage: str) -> None:
    """Raises Failure if the container's memory limit is under the bytes that a stage needs."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max" in it
            limit = int(Path(path).read_text())
            if limit < needed:
                raise Failure(
                    f"{stage} needs about {needed // 10**6} MB of memory, and the limit is {limit // 10**6} MB. "
                    f"Raise MNIST_MEMORY, then run it again.",
                    status=2,
                )


def count_cores() -> int:
    """The cores that this process may use: by its affinity, and by its cgroup's CPU quota, rounded down."""
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


def check_threads(count: int) -> None:
    """Raises Failure if so many threads cannot be started. Libraries that lack one end the process, or hang."""
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
        for thread in threads:  # a fork while one runs is not safe
            thread.join()


# Reading --------------------------------------------------------------------------------------------------------------


def read_raw(data: Path, name: str) -> bytearray:
    """The contents of one of RAW_FILES. Raises Failure if it is missing or is not, to the byte, the data set's."""
    path = data / RAW_FOLDER / name
    size, sha256 = RAW_FILES[name]
    content = bytearray(read_limited(path, size, DATA_HINT))
    if len(content) < size:
        raise Failure(f"{path} has {len(content):,} bytes instead of {size:,}. Replace it with: make data")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Failure(f"{path} is altered (its sha256 is wrong). Replace it with: make data")
    return content


def read_limited(path: Path, limit: int, hint: str) -> bytes:
    """The contents of a file. Raises Failure with the hint if it cannot be read or has more bytes than the limit."""
    try:
        if path.is_dir():
            raise Failure(f"{path} is a folder, not a file. {removal_hint(path)}")
        if path.exists() and not path.is_file():
            raise Failure(f"{path} is not a file. {hint}")  # reading a pipe, for one, would never end
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise Failure(f"there is no {path}. {hint}") from None
    except OSError as error:
        raise Failure(f"{path} cannot be read ({error.strerror}). {hint}") from None
    if len(content) > limit:
        raise Failure(f"{path} is larger than the {limit:,} bytes that it may have. {hint}")
    return content


# Writing --------------------------------------------------------------------------------------------------------------


def check_destinations(folder: Path, *names: str) -> None:
    """Raises Failure if a folder stands where a file is to be published; nothing else is in the way of a rename."""
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            raise Failure(f"{path} is a folder, and a file must go there. {removal_hint(path)}")


def removal_hint(path: Path) -> str:
    """How a person removes what is in the way: from the volume, or from a folder of the machine."""
    inside = "docker compose run --rm --no-deps --cap-add DAC_OVERRIDE --entrypoint rm train -r"
    return f"Remove it with: {inside if MODEL in path.parents else 'rm -r'} {path}"


def publish(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: beside its name, flushed to disk, mode 0644, then renamed over it.

    Raises Failure if that cannot be done; what was there is then unchanged.
    """
    # One name for all who write this file: a crash leaves one behind at most, and the next writer takes it over.
    part = path.with_name(f".{path.name}.part")
    try:
        with open_locked(part) as file:
            try:
                file.truncate(0)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
                part.rename(path)
            except OSError:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        hint = WRITE_HINTS.get(error.errno or 0, "Fix that, then run it again.")
        raise Failure(f"cannot write {path} ({error.strerror}); what was there is unchanged. {hint}") from None


@contextlib.contextmanager
def open_locked(part: Path):
    """Opens a file to write to, once nobody else has it open this way: two runs of a stage may publish at once."""
    while True:
        if os.path.lexists(part) and not (part.is_file() and not part.is_symlink() and os.access(part, os.W_OK)):
            remove(part)  # left by another uid, or put there: it would be in the way for ever
        with open(part, "ab", opener=open_nofollow) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # While this one waited, the other may have renamed it: then it is the published file now.
            if part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno())):
                yield file
                return


def open_nofollow(path: str, flags: int) -> int:
    """Opens a file itself, neither what a link points to nor, without end, a pipe that nobody reads."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)


def remove(path: Path) -> None:
    """Removes whatever is there: a folder with all in it, a file, a link (not what it points to), or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_folder(folder: Path, wait: bool):
    """Locks a folder until the block or the process ends; raises BlockingIOError if others have it, or waits."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)
