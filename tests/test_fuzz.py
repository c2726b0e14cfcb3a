"""Whatever bytes a file of the data set or of the volume has, its reader takes it or says in one line what is wrong.

Hypothesis makes the bytes: anything at all, good files with a few bytes changed, cut out or put in, and good JSON with
values replaced. The seed is fixed, so that a test that passes passes always.
"""

import contextlib
import io
import json
import pickletools
import warnings
import zipfile
from types import SimpleNamespace

import artifacts
import net
import plan
import pytest
import torch
import training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECONDS = 2  # the longest that one file may take
FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=1000 * SECONDS,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a folder may be used again
)

edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 8), st.binary(max_size=8)), max_size=5)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
GONE = "GONE"  # stands for no value at all
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))

tensors = st.lists(st.integers(0, 3), max_size=3).map(torch.zeros)


def mutate(content, edits):
    """Bytes with some cut out and others put in: at a part of the length, how many, and which."""
    for part, cut, put in edits:
        at = int(part * len(content))
        content = content[:at] + put + content[at + cut :]
    return content


def places(value, path=()):
    """The paths to all parts of a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, part in parts for place in places(part, (*path, key))]


def replaced(value, place, new):
    """A JSON value with another part at a place, or none."""
    value = json.loads(json.dumps(value))
    part = value
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = new
    if new == GONE:
        del part[place[-1]]
    return value


def saved(value):
    """The bytes that torch.save makes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_pickle(content, pickled):
    """A checkpoint with another pickle, and the tensors that it had."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
    return buffer.getvalue()


def pickle_of(content):
    """The pickle in a checkpoint."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))


SETTINGS = {name: default for name, (_, default, _, _) in plan.SETTINGS.items()} | {"epochs": 2}
IMAGES, LABELS = torch.zeros(training.HELD_OUT + 640, 28, 28, dtype=torch.uint8), torch.zeros(5640, dtype=torch.int64)
RESULTS = training.new_results(SETTINGS) | {"batches": 10, "model_sha256": "0" * 64}
RESULTS["history"] = [
    {"epoch": 1, "train_loss": 0.1, "held_out_loss": 0.1, "held_out_accuracy": 98.0, "seconds": 1.0},
]
MODEL = saved(net.Net().state_dict())
VELOCITIES = torch.zeros(2, 21_840)
CHECKPOINT = saved({"model": net.Net().state_dict(), "velocities": VELOCITIES, "results": json.dumps(RESULTS)})
LABELS_FILE = "t10k-labels-idx1-ubyte"


def fails_in_one_line(error):
    """Asserts that an exception's text is a line for a person."""
    assert str(error)
    assert len(str(error).splitlines()) == 1


@contextlib.contextmanager
def says_no_more():
    """Asserts that no library warns, which would be lines beside the one; and that a failure's text is one line."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            yield
        except artifacts.Failure as failure:
            fails_in_one_line(failure)
    assert [str(warning.message) for warning in warned] == []


def read_model(folder, content):
    (folder / "mnist_cnn.pt").write_bytes(content)
    with says_no_more():
        model, _ = net.load_model(folder / "mnist_cnn.pt")
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def resume(folder, content, results=RESULTS):
    """Prepares a training to go on from a checkpoint with these bytes."""
    (folder / "checkpoint.pt").write_bytes(content)
    (folder / "train_results.json").write_text(json.dumps(results))
    with says_no_more():
        run = training.begin(SimpleNamespace(action="resume", settings=SETTINGS), IMAGES, LABELS, folder)
        run.queue.resume(run.results["batches"], run.results["workers"])
        assert run.task.parameters.isfinite().all()
        assert isinstance(run.results["history"], list)


def decide(folder, content):
    (folder / "mnist_cnn.pt").write_bytes(b"a model")
    (folder / "train_results.json").write_bytes(content)
    with says_no_more():
        decided = plan.decide({"epochs": 3}, False, folder)
        assert decided.action in ("nothing", "start", "resume")
        assert len(decided.line.splitlines()) == 1
        assert len(plan.as_flags(decided.settings).splitlines()) == 1


@pytest.mark.parametrize("reader", [read_model, resume, decide])
@FUZZ
@given(content=st.binary(max_size=300))
def test_any_bytes_are_taken_or_refused_in_one_line(reader, tmp_path, content):
    reader(tmp_path, content)


@FUZZ
@given(edits=edits)
def test_a_model_with_bytes_changed_is_taken_or_refused_in_one_line(tmp_path, edits):
    read_model(tmp_path, mutate(MODEL, edits))


@FUZZ
@given(edits=edits)
def test_a_model_with_another_pickle_in_its_zip_is_taken_or_refused_in_one_line(tmp_path, edits):
    read_model(tmp_path, with_pickle(MODEL, mutate(pickle_of(MODEL), edits)))


@pytest.mark.parametrize("reader", [read_model, resume])
@FUZZ
@given(value=tensors | values)
def test_a_torch_file_of_any_value_is_refused_in_one_line(reader, tmp_path, value):
    reader(tmp_path, saved(value))


@FUZZ
@given(key=st.sampled_from(sorted(net.Net().state_dict())), value=values)
def test_a_model_with_any_value_for_a_tensor_is_refused_in_one_line(tmp_path, key, value):
    with pytest.raises(artifacts.Failure) as refused:
        net.load_model(write(tmp_path / "mnist_cnn.pt", saved(net.Net().state_dict() | {key: value})))
    fails_in_one_line(refused.value)


@FUZZ
@given(codes=st.lists(st.sampled_from([code.code for code in pickletools.opcodes]), max_size=40))
def test_any_program_for_the_unpickler_is_refused_in_one_line(tmp_path, codes):
    read_model(tmp_path, with_pickle(MODEL, b"\x80\x02" + "".join(codes).encode("latin-1") + b"."))


@FUZZ
@given(edits=edits)
def test_a_checkpoint_with_bytes_changed_is_taken_or_refused_in_one_line(tmp_path, edits):
    resume(tmp_path, mutate(CHECKPOINT, edits))


@FUZZ
@given(place=st.sampled_from(places(RESULTS)), value=st.just(GONE) | values)
def test_a_checkpoint_with_any_value_in_its_results_is_taken_or_refused_in_one_line(tmp_path, place, value):
    results = json.dumps(replaced(RESULTS, place, value))
    parts = {"model": net.Net().state_dict(), "velocities": VELOCITIES, "results": results}
    resume(tmp_path, saved(parts))


@FUZZ
@given(key=st.sampled_from(["model", "velocities", "results"]), value=st.just(GONE) | tensors | values)
def test_a_checkpoint_with_any_value_for_a_part_is_taken_or_refused_in_one_line(tmp_path, key, value):
    parts = {"model": net.Net().state_dict(), "velocities": VELOCITIES, "results": json.dumps(RESULTS)}
    parts[key] = value
    if value is GONE:
        del parts[key]
    resume(tmp_path, saved(parts))


@FUZZ
@given(edits=edits)
def test_results_with_bytes_changed_are_taken_or_refused_in_one_line(tmp_path, edits):
    decide(tmp_path, mutate(json.dumps(RESULTS).encode(), edits))


@FUZZ
@given(place=st.sampled_from(places(RESULTS)), value=st.just(GONE) | values, finished=st.booleans())
def test_results_with_any_value_in_a_place_are_taken_or_refused_in_one_line(tmp_path, place, value, finished):
    decide(tmp_path, json.dumps(replaced(RESULTS | {"finished": finished}, place, value)).encode())


@FUZZ
@given(edits=edits)
def test_a_file_of_the_data_set_with_bytes_changed_is_refused_in_one_line(tmp_path, data, edits):
    good = (data / artifacts.RAW_FOLDER / LABELS_FILE).read_bytes()
    changed = mutate(good, edits)
    (tmp_path / artifacts.RAW_FOLDER).mkdir(parents=True, exist_ok=True)
    write(tmp_path / artifacts.RAW_FOLDER / LABELS_FILE, changed)
    try:
        assert artifacts.read_raw(tmp_path, LABELS_FILE) == good
    except artifacts.Failure as failure:
        assert changed != good
        fails_in_one_line(failure)


def write(path, content):
    """Writes a file, and returns its path."""
    path.write_bytes(content)
    return path
