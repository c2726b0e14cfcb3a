"""Reads the data set. What is missing or damaged is taken from files put there by hand, or downloaded, first."""

import contextlib
import gzip
import io
import socket
import zlib
from pathlib import Path
from typing import IO

from stage.dataset import DATA_SET, has_right_sha256, read_raw
from stage.files import DOWNLOAD_LOCK, file_lock, publish, remove
from stage.process import Failure, say

DOWNLOAD_TIMEOUT = 60  # seconds without an answer from a mirror


def read_data(data: Path) -> dict[str, bytearray]:
    """Return the contents of the raw files by name, verified. Raise Failure if they cannot be read or downloaded."""
    try:
        return {name: read_raw(data, name, "Try other sources with: make data") for name in DATA_SET.sha256}
    except Failure as problem:
        download(data, problem)
    return {name: read_raw(data, name) for name in DATA_SET.sha256}


def download(data: Path, problem: Failure) -> None:
    """Publish the raw files that are missing or damaged: what was put there by hand, or is downloaded with torchvision.

    Raise Failure, with the problem that made the download necessary, if it fails.
    """
    part = data / ".download"
    try:
        raw = data / DATA_SET.folder
        raw.mkdir(parents=True, exist_ok=True)
        with file_lock(data / DOWNLOAD_LOCK):
            remove(part)  # left by a killed download
            invalid = use_what_is_there(data)
            if not invalid:
                return
            say(f"train: downloading {DATA_SET.name} into {raw} (12 MB)")
            try:
                download_with_torchvision(part)
                for name in invalid:
                    publish(raw / name, read_raw(part, name))
            finally:
                remove(part)
    except (OSError, RuntimeError, Failure) as error:
        reason = str(error).splitlines()[0].rstrip(":.")
        raise Failure(f"downloading {DATA_SET.name} failed ({reason}), and {problem}") from None


def use_what_is_there(data: Path) -> list[str]:
    """Publish raw files that are in the data folder under another name; return the names of those still missing."""
    missing = [name for name in DATA_SET.sha256 if not is_valid(data, name)]
    for name in list(missing):
        if content := find(data, name):
            publish(data / DATA_SET.folder / name, content)
            missing.remove(name)
    return missing


def find(data: Path, name: str) -> bytes | None:
    """Return the content of a raw file from anywhere in the data folder, if it is there with the right sha256.

    The name may end in .gz, as on the mirrors, and have a dot for a hyphen, as 7-Zip and Kaggle's archive do.
    """
    for path in sorted(data.rglob(name.replace("-idx", "?idx") + "*")):
        with contextlib.suppress(OSError, EOFError, zlib.error):
            if path.is_file():  # reading a pipe would never end
                with open(path, "rb") as file:
                    is_packed = file.peek(2)[:2] == b"\x1f\x8b"
                    content = unpack(file, name) if is_packed else file.read(DATA_SET.size(name) + 1)
                if has_right_sha256(name, content):
                    return content
    return None


def unpack(file: IO[bytes], name: str) -> bytes:
    """Return what a .gz file of a raw file contains, but no more than a byte over what it should be.

    Raise OSError, EOFError or zlib.error if it is damaged.
    """
    with gzip.GzipFile(fileobj=file) as packed:
        return packed.read(DATA_SET.size(name) + 1)


def is_valid(data: Path, name: str) -> bool:
    """Return whether a raw file exists and has the right contents."""
    try:
        return bool(read_raw(data, name))
    except Failure:
        return False


def download_with_torchvision(folder: Path) -> None:
    """Download the data set into a folder from torchvision's mirrors."""
    from torchvision import datasets  # imported here: it takes a second, and nothing else needs it

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            getattr(datasets, DATA_SET.name)(folder, download=True)
    finally:
        socket.setdefaulttimeout(before)
