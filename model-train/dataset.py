"""Reads the data set, and downloads what is missing or damaged first."""

import contextlib
import io
import socket
from pathlib import Path

from artifacts import DATA_HINT, DATA_SET, file_lock, publish, read_raw, remove
from process import Failure, say

DOWNLOAD_TIMEOUT = 60  # seconds without an answer from a mirror


def read_data(data: Path) -> dict[str, bytearray]:
    """Return the contents of the raw files by name, verified. Raise Failure if they cannot be read or downloaded."""
    try:
        return {name: read_raw(data, name) for name in DATA_SET.sha256}
    except Failure as problem:
        download(data, problem)
    return {name: read_raw(data, name) for name in DATA_SET.sha256}


def download(data: Path, problem: Failure) -> None:
    """Download the data set with torchvision, and publish the files that are missing or damaged.

    Raise Failure, starting with the problem that made the download necessary, if it fails.
    """
    part = data / ".download"
    try:
        raw = data / DATA_SET.folder
        raw.mkdir(parents=True, exist_ok=True)
        with file_lock(data / ".download.lock"):  # two containers may share the folder
            invalid = [name for name in DATA_SET.sha256 if not is_valid(data, name)]
            if not invalid:
                return
            say(f"train: downloading {DATA_SET.name} into {raw} (12 MB)")
            remove(part)  # left by a killed download
            try:
                download_with_torchvision(part)
                for name in invalid:
                    publish_raw(raw / name, read_raw(part, name))
            finally:
                remove(part)
    except (OSError, RuntimeError, Failure) as error:
        reason = str(error).splitlines()[0].rstrip(":.")
        what, _, hint = str(problem).rpartition(". ")
        hint = hint.replace(DATA_HINT, "Try other sources with: make data")
        raise Failure(f"{what}, and downloading {DATA_SET.name} failed ({reason}). {hint}") from None


def is_valid(data: Path, name: str) -> bool:
    """Return whether a raw file exists and has the right contents."""
    try:
        return bool(read_raw(data, name))
    except Failure:
        return False


def download_with_torchvision(folder: Path) -> None:
    """Download the data set into a folder from torchvision's mirrors."""
    from torchvision import datasets  # imported here: it takes a second, and nothing else needs it

    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        getattr(datasets, DATA_SET.name)(folder, download=True)


def publish_raw(path: Path, content: bytes | bytearray) -> None:
    """Publish a raw file. An old one of the same size may be the user's own data: it is kept as NAME.replaced."""
    if path.is_file() and path.stat().st_size == len(content):
        path.rename(path.with_name(f"{path.name}.replaced"))
    publish(path, bytes(content))
