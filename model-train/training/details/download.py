"""Fetches raw files that are missing or damaged: from files put into the data folder by hand, or by a download."""

import contextlib
import gzip
import hashlib
import http.client
import io
import socket
import zlib
from pathlib import Path
from typing import IO

from stage.dataset import DATA_SET
from stage.files import DOWNLOAD_LOCK, publish, remove
from stage.images import MAX_FILE_BYTES, problem_of, read_raw, size_by_header
from stage.locks import file_lock
from stage.output import say
from stage.process import Failure

DOWNLOAD_TIMEOUT = 60  # seconds without an answer from a mirror


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
            say(f"train: downloading {DATA_SET.name} into {raw}")
            try:
                download_with_torchvision(part)
                for name in invalid:
                    publish(raw / name, read_raw(part, name))
            finally:
                remove(part)
    except (OSError, RuntimeError, http.client.HTTPException, Failure) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":.")
        raise Failure(f"downloading {DATA_SET.name} failed ({reason}), and {problem}") from None


def use_what_is_there(data: Path) -> list[str]:
    """Publish raw files that are in the data folder under another name; return the names of those still missing."""
    missing = invalid_names(data)
    for name in list(missing):
        if content := find(data, name):
            path = data / DATA_SET.folder / name
            if path.is_dir():  # Kaggle's archive has each file in a folder of its name
                path.rename(path.with_name(f"{name}.folder"))
            publish(path, content)
            missing.remove(name)
    return missing


def find(data: Path, name: str) -> bytes | None:
    """Return the content of a raw file from anywhere in the data folder, if it is there and valid.

    The name may end in .gz, as on the mirrors, and have a dot for a hyphen, as 7-Zip and Kaggle's archive do. Without a
    sha256 to tell it by, it is looked for in the data set's own folder only: others have files of the same names.
    """
    folder = data if DATA_SET.sha256[name] else data / DATA_SET.name
    for path in sorted(folder.rglob(name.replace("-idx", "?idx") + "*")):
        with contextlib.suppress(OSError, EOFError, zlib.error):
            if path.is_file():  # reading a pipe would never end
                with open(path, "rb") as file:
                    is_packed = file.peek(2)[:2] == b"\x1f\x8b"
                    content = unpack(file, name) if is_packed else read_by_header(file, name)
                if not problem_of(name, content):
                    return content
    return None


def unpack(file: IO[bytes], name: str) -> bytes:
    """Return what a .gz file of a raw file contains. Raise OSError, EOFError or zlib.error if it is damaged."""
    if name in DATA_SET.gz_md5:
        packed = file.read(MAX_FILE_BYTES)
        if hashlib.md5(packed).hexdigest() != DATA_SET.gz_md5[name]:
            raise OSError("it has the wrong md5")
        file = io.BytesIO(packed)
    with gzip.GzipFile(fileobj=file) as unpacked:
        return read_by_header(unpacked, name)


def read_by_header(file: IO[bytes] | gzip.GzipFile, name: str) -> bytes:
    """Return the content of a raw file, but no more than a byte over what its header says."""
    header = file.read(16)
    return header + file.read(max(0, min(size_by_header(name, header), MAX_FILE_BYTES) + 1 - len(header)))


def invalid_names(data: Path) -> list[str]:
    """Return the names of the raw files that are missing or invalid."""
    names = []
    for name in DATA_SET.sha256:
        try:
            read_raw(data, name)
        except Failure:
            names.append(name)
    return names


def download_with_torchvision(folder: Path) -> None:
    """Download the data set into a folder from torchvision's mirrors. Raise RuntimeError if it does not know it."""
    from torchvision import datasets  # imported here: it takes a second, and nothing else needs it
    from tqdm import tqdm

    if not hasattr(datasets, DATA_SET.name):
        raise RuntimeError("torchvision has no data set of this name")
    tqdm.monitor_interval = 0  # torchvision's bar would start a thread, which stays while the workers are forked
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            getattr(datasets, DATA_SET.name)(folder, download=True, **DATA_SET.torchvision)
    finally:
        socket.setdefaulttimeout(before)
