"""Whatever bytes a file has, its reader accepts it or says in one line what is wrong.

Hypothesis makes the bytes: anything at all, good files with a few bytes changed, cut out or put in, and good JSON with
values replaced. The seed is fixed, so that a test that passes passes always.
"""

import io
import json
import pickletools
import warnings
import zipfile

import artifacts
import checkpoint
import net
import plan
import pytest
import record
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from process import Failure
from settings import Settings

FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=2000,  # milliseconds: the longest that one file may take
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a folder may be used again
)
GONE = "GONE"  # stands for no value at all
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 8), st.binary(max_size=8)), max_size=5)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
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
    """A JSON value, or a checkpoint, with another part at a place, or with none."""
    value = part = json.loads(json.dumps(value)) if len(place) > 1 else dict(value)
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = new
    if isinstance(new, str) and new == GONE:
        del part[place[-1]]
    return value


def saved(value):
    """The bytes that torch.save makes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edit_pickle(content, edit):
    """A checkpoint whose pickle is changed by a function, with the tensors that it had."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(old.read(name)) if name.endswith("/data.pkl") else old.read(name))
    return buffer.getvalue()


WANTED = Settings(epochs=2)
IMAGES, LABELS = torch.zeros(640, 28, 28, dtype=torch.uint8), torch.zeros(640, dtype=torch.int64)
RECORD = record.Record.new(WANTED)
RECORD.batches, RECORD.seconds, RECORD.model_sha256 = 10, 2.0, "0" * 64
RECORD.workers[0] = record.WorkerRecord(0, images=960, steps=10, loss_sum=6000.0)
RECORD.history.append(record.EpochRecord(1, 0.1, 0.1, 98.0, 1.0))
RECORD = json.loads(RECORD.to_json())
MODEL = saved(net.Net().state_dict())
PARTS = {"model": net.Net().state_dict(), "velocities": torch.zeros(2, 21_840), "results": json.dumps(RECORD)}


def one_line(read):
    """A reader that asserts that a failure's text is one line, and that no library warns, which would be more."""

    def checked(folder, content):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            failure = None
            try:
                read(folder, content)
            except Failure as caught:
                failure = str(caught)
        assert failure is None or len(failure.splitlines()) == 1
        assert [str(warning.message) for warning in warned] == []

    return checked


@one_line
def read_model(folder, content):
    (folder / "mnist_cnn.pt").write_bytes(content)
    model, _ = net.load_model(folder)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@one_line
def resume(folder, content):
    (folder / "checkpoint.pt").write_bytes(content)
    (folder / "train_results.json").write_text(json.dumps(RECORD))
    resumed, shared = checkpoint.start_or_resume(plan.Plan("resume", "", WANTED), IMAGES, LABELS, folder)
    assert shared.parameters.isfinite().all()
    assert all(isinstance(line, record.EpochRecord) for line in resumed.history)


@one_line
def decide(folder, content):
    (folder / "mnist_cnn.pt").write_bytes(b"a model")
    (folder / "train_results.json").write_bytes(content)
    decided = plan.decide({"epochs": 3}, False, folder)
    assert decided.action in ("nothing", "start", "resume")
    assert len(f"{decided.message} {decided.settings.as_flags()}".splitlines()) == 1


@one_line
def read_labels(folder, content):
    name = "t10k-labels-idx1-ubyte"
    (folder / artifacts.DATA_SET.folder).mkdir(parents=True, exist_ok=True)
    (folder / artifacts.DATA_SET.folder / name).write_bytes(content)
    artifacts.read_raw(folder, name)
    raise AssertionError("what is not the data set's own was accepted")


READERS = {
    "model": (read_model, MODEL),
    "checkpoint": (resume, saved(PARTS)),
    "record": (decide, json.dumps(RECORD).encode()),
    "data": (read_labels, bytes(10_008)),
}


@pytest.mark.parametrize("reader", [reader for reader, _ in READERS.values()], ids=READERS.keys())
@FUZZ
@given(content=st.binary(max_size=300))
def test_any_bytes_are_accepted_or_refused_in_one_line(reader, tmp_path, content):
    reader(tmp_path, content)


@pytest.mark.parametrize(("reader", "content"), READERS.values(), ids=READERS.keys())
@FUZZ
@given(edits=edits)
def test_a_file_with_bytes_changed_is_accepted_or_refused_in_one_line(reader, tmp_path, content, edits):
    reader(tmp_path, mutate(content, edits))


@FUZZ
@given(edits=edits)
def test_a_model_with_a_changed_pickle_in_its_zip_is_accepted_or_refused_in_one_line(tmp_path, edits):
    read_model(tmp_path, edit_pickle(MODEL, lambda pickled: mutate(pickled, edits)))


@FUZZ
@given(codes=st.lists(st.sampled_from([code.code for code in pickletools.opcodes]), max_size=40))
def test_any_program_for_the_unpickler_is_refused_in_one_line(tmp_path, codes):
    read_model(tmp_path, edit_pickle(MODEL, lambda _: b"\x80\x02" + "".join(codes).encode("latin-1") + b"."))


@pytest.mark.parametrize("reader", [read_model, resume])
@FUZZ
@given(value=tensors | values)
def test_a_torch_file_of_any_value_is_refused_in_one_line(reader, tmp_path, value):
    reader(tmp_path, saved(value))


@FUZZ
@given(key=st.sampled_from(sorted(net.Net().state_dict())), value=values)
def test_a_model_with_any_value_for_a_tensor_is_refused(tmp_path, key, value):
    (tmp_path / "mnist_cnn.pt").write_bytes(saved(net.Net().state_dict() | {key: value}))
    with pytest.raises(Failure):
        net.load_model(tmp_path)


@FUZZ
@given(place=st.sampled_from(places(RECORD)), value=st.just(GONE) | values, finished=st.booleans())
def test_a_record_with_any_value_in_a_place_is_accepted_or_refused_in_one_line(tmp_path, place, value, finished):
    changed = json.dumps(replaced(RECORD | {"finished": finished}, place, value))
    decide(tmp_path, changed.encode())
    resume(tmp_path, saved(PARTS | {"results": changed}))


@FUZZ
@given(key=st.sampled_from(sorted(PARTS)), value=st.just(GONE) | tensors | values)
def test_a_checkpoint_with_any_value_for_a_part_is_accepted_or_refused_in_one_line(tmp_path, key, value):
    resume(tmp_path, saved(replaced(PARTS, (key,), value)))
