"""Whatever bytes a file has, its reader accepts it or says in one line what is wrong.

Hypothesis makes the bytes: anything at all, good files with a few bytes changed, cut out or put in, and good JSON and
checkpoints with values replaced. The seed is fixed, so that a test that passes passes always.
"""

import contextlib
import copy
import io
import json
import pickletools
import warnings
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import corpus
import net
from stage import weights
from stage.process import Failure
from training import plan, record, start
from training.settings import Settings

FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=2000,  # milliseconds: the longest that one file may take
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a folder may be used again
)
GONE = object()  # stands for no value at all
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 8), st.binary(max_size=8)), max_size=5)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
tensors = st.lists(st.integers(0, 3), max_size=3).map(torch.zeros)
opcodes = st.lists(st.sampled_from([code.code for code in pickletools.opcodes]), max_size=40)
programs = opcodes.map(lambda codes: b"\x80\x02" + "".join(codes).encode("latin-1") + b".")


def mutate(content, edits):
    """Bytes with some cut out and others put in: at a part of the length, how many, and which."""
    for part, cut, put in edits:
        at = int(part * len(content))
        content = content[:at] + put + content[at + cut :]
    return content


def places(value, path=()):
    """The paths to all parts of a value made of dicts and lists."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, part in parts for place in places(part, (*path, key))]


def replaced(value, place, new):
    """A value with another part at a place, or with none."""
    value = part = copy.deepcopy(value)
    for key in place[:-1]:
        part = part[key]
    if new is GONE:
        del part[place[-1]]
    else:
        part[place[-1]] = new
    return value


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


WANTED = Settings(epochs=2)
IMAGES, LABELS = torch.zeros(640, 28, 28, dtype=torch.uint8), torch.zeros(640, dtype=torch.int64)
RECORD = record.Record.new(WANTED, len(IMAGES), {})
RECORD.batches, RECORD.seconds, RECORD.model_sha256 = 10, 2.0, "0" * 64
RECORD.workers[0] = record.WorkerRecord(0, images=960, steps=10, loss_sum=6000.0)
RECORD.history.append(record.EpochRecord(1, 0.1, 0.1, 98.0, 1.0))
RECORD = json.loads(RECORD.to_json())
MODEL = dict(net.Net().state_dict())
PICKLE = zipfile.ZipFile(io.BytesIO(saved(MODEL))).read("archive/data.pkl")
PARTS = {"model": MODEL, "velocities": torch.zeros(2, 21_840), "sum": torch.zeros(21_841)}
PARTS |= {"results": json.dumps(RECORD)}


@contextlib.contextmanager
def one_line_at_most():
    """A failure in the block must be one line, and no library may warn, which would be more."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        failure = ""
        try:
            yield
        except Failure as caught:
            failure = str(caught)
    assert len(failure.splitlines()) <= 1
    assert warned == []


def read_model(folder, content):
    (folder / "mnist_cnn.pt").write_bytes(content)
    model = net.Net()
    with one_line_at_most():
        weights.load_model(model, folder)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def resume(folder, content):
    (folder / "checkpoint.pt").write_bytes(content)
    (folder / "train_results.json").write_text(json.dumps(RECORD))
    with one_line_at_most():
        todo = plan.Plan("resume", "", WANTED, run=RECORD["run"])
        resumed, shared = start.start_or_resume(todo, {}, IMAGES, LABELS, folder)
        assert shared.parameters.isfinite().all()
        assert all(isinstance(line, record.EpochRecord) for line in resumed.history)


def decide(folder, content):
    (folder / "mnist_cnn.pt").write_bytes(b"a model")
    (folder / "train_results.json").write_bytes(content)
    with one_line_at_most():
        decided = plan.decide({"epochs": 3}, False, folder)
        assert decided.action in ("nothing", "start", "resume")
        assert len(f"{decided.message} {decided.settings.as_flags()}".splitlines()) == 1


CONTENTS = [(read_model, saved(MODEL)), (resume, saved(PARTS)), (decide, json.dumps(RECORD).encode())]


@pytest.mark.parametrize(("reader", "content"), CONTENTS, ids=["model", "checkpoint", "record"])
@FUZZ
@given(anything=st.binary(max_size=300), edits=edits)
def test_any_bytes_and_changed_files_are_accepted_or_refused_in_one_line(reader, tmp_path, content, anything, edits):
    reader(tmp_path, anything)
    reader(tmp_path, mutate(content, edits))


@FUZZ
@given(pickled=edits.map(lambda edits: mutate(PICKLE, edits)) | programs)
def test_a_model_with_any_pickle_in_its_zip_is_accepted_or_refused_in_one_line(tmp_path, pickled):
    path = tmp_path / "mnist_cnn.pt"
    path.write_bytes(saved(MODEL))
    corpus.rezip(path, pickled=pickled)
    read_model(tmp_path, path.read_bytes())


@FUZZ
@given(place=st.sampled_from(places(RECORD)), value=st.just(GONE) | values, finished=st.booleans())
def test_a_record_with_any_value_in_a_place_is_accepted_or_refused_in_one_line(tmp_path, place, value, finished):
    changed = json.dumps(replaced(RECORD | {"finished": finished}, place, value))
    decide(tmp_path, changed.encode())
    resume(tmp_path, saved(PARTS | {"results": changed}))


@pytest.mark.parametrize(("reader", "good"), [(read_model, MODEL), (resume, PARTS)], ids=["model", "checkpoint"])
@FUZZ
@given(data=st.data(), value=st.just(GONE) | tensors | values)
def test_a_torch_file_with_any_value_in_a_place_is_accepted_or_refused_in_one_line(tmp_path, reader, good, data, value):
    place = data.draw(st.sampled_from(places([good])))  # [good] is a place too: the whole of it
    reader(tmp_path, saved(replaced([good, None], place, value)[0]))
