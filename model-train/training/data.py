"""Reads the training images, verified. Raw files that are missing or damaged are looked for, or downloaded, first."""

from pathlib import Path

from stage.dataset import DATA_SET
from stage.images import Split, read_all
from stage.process import Failure
from training.details.download import download, invalid_names


def read_data(data: Path) -> Split:
    """Return the training images, with the sha256 of all files. Raise Failure if they cannot be read or downloaded."""
    if not DATA_SET.sha256:
        return read_all(data)  # pictures cannot be downloaded
    try:
        return read_all(data, "Try other sources with: make data")
    except Failure as problem:
        if invalid_names(data):  # else they do not fit DATA_SET, or another download has just ended
            download(data, problem)
    return read_all(data)
