"""Output: lines for the user. What cannot be written is dropped, for output must not stop the work."""

import contextlib
import os
import select
import sys
from typing import IO


def say(text: str) -> None:
    """Print to standard output."""
    write(sys.stdout, text + "\n")


def print_error(text: str) -> None:
    """Print a failure or a warning to standard error, on one line even if a path or a flag contains a line break."""
    write(sys.stderr, text.replace("\n", "\\n") + "\n")


def write(stream: IO[str], text: str) -> None:
    """Write to a standard stream, or drop the text if it cannot be written."""
    if can_write(stream):
        with contextlib.suppress(OSError):
            stream.write(text)
        flush(stream)


def percent(value: float, digits: int = 2) -> str:
    """Format a percentage. Only 100 itself is shown as 100 %."""
    return f"{value if value == 100 else min(value, 100 - 10**-digits):.{digits}f} %"


def can_write(stream: IO[str], seconds: float = 1) -> bool:
    """Return whether a standard stream accepts text within some seconds; a pipe that nobody reads does not."""
    try:
        return bool(select.select([], [stream.fileno()], [], seconds)[1])
    except ValueError:  # not backed by a file descriptor
        return True


def flush(stream: IO[str]) -> None:
    """Flush a standard stream; if that fails, as when a pipe's reader is gone, drop all further output."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
