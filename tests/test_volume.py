"""What else may be in the volume under the names of the stages' files: links, folders, pipes, files of a killed run."""

import itertools
import os

import pytest
import stages
from PIL import Image

QUICK = {"train": ("--epochs", "1", "--log-interval", "1"), "evaluate": (), "infer": ()}


@pytest.fixture
def start(trained, tmp_path):
    """A function that makes the volume that a stage starts with: empty for train, else with a model."""

    def make(stage):
        folder = tmp_path / "volume"
        folder.mkdir()
        if stage != "train":
            (folder / "mnist_cnn.pt").write_bytes((trained / "mnist_cnn.pt").read_bytes())
        return folder

    return make


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with a file, for links to point to."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("not the pipeline's")
    return tmp_path / "elsewhere"


# What a name may stand for: functions of a path and of the folder elsewhere.
KINDS = {
    "a link to a folder": lambda path, elsewhere: path.symlink_to(elsewhere),
    "a link to a file": lambda path, elsewhere: path.symlink_to(elsewhere / "file"),
    "a link to nowhere": lambda path, elsewhere: path.symlink_to(elsewhere / "nowhere"),
    "a file": lambda path, elsewhere: path.write_text("a file"),
    "a pipe": lambda path, elsewhere: os.mkfifo(path),
    "a folder": lambda path, elsewhere: (path / "inner").mkdir(parents=True),
}


def assert_has_five_pictures(folder):
    """There is a folder with five pictures, and nothing half done beside it."""
    assert not (folder / "results").is_symlink()
    assert len(stages.pictures(folder)) == 5
    for name in stages.pictures(folder):
        Image.open(folder / "results" / name).verify()
    assert {*os.listdir(folder)} == {"mnist_cnn.pt", "results"} | stages.MADE_BY["infer"]


# The folder of results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a link to a folder", "a link to nowhere", "a file", "a pipe"])
def test_results_that_is_no_folder_is_replaced_or_refused_before_anything_is_published(start, elsewhere, kind):
    folder = start("infer")
    KINDS[kind](folder / "results", elsewhere)
    result = stages.run("infer", model=folder)
    assert {*os.listdir(elsewhere)} == {"file"}
    if result.returncode:
        stages.assert_fails(result, 1, str(folder / "results"))
        assert {*os.listdir(folder)} == {"mnist_cnn.pt", "results"}
    else:
        assert_has_five_pictures(folder)


@pytest.mark.parametrize(
    ("new", "old"),
    [("a link to a folder", "a pipe"), ("a file", "a link to nowhere"), ("a link to a file", "a folder")],
)
def test_leftovers_under_the_hidden_names_of_the_results_are_removed(start, elsewhere, new, old):
    folder = start("infer")
    (folder / "results").mkdir()
    KINDS[new](folder / ".results.new", elsewhere)
    KINDS[old](folder / ".results.old", elsewhere)
    result = stages.run("infer", model=folder)
    assert result.returncode == 0, result.stderr
    assert_has_five_pictures(folder)
    assert {*os.listdir(elsewhere)} == {"file"}


# Folders in place of files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "name", "flags"),
    [(stage, name, ()) for stage in stages.STAGES for name in sorted(stages.MADE_BY[stage])]
    + [("train", name, ("--fresh",)) for name in sorted(stages.MADE_BY["train"])],
)
def test_a_folder_in_place_of_a_file_is_refused_before_the_work_begins(start, stage, name, flags):
    folder = start(stage)
    (folder / name / "inner").mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    result = stages.run(stage, *flags, *QUICK[stage], model=folder)
    stages.assert_fails(result, 1, str(folder / name), "rm -r")
    assert "images/s" not in result.stdout
    assert "accuracy" not in result.stdout
    assert sorted(folder.rglob("*")) == before


# Files that a killed run left half written ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", stages.STAGES)
def test_leftovers_that_cannot_be_written_to_are_removed(start, elsewhere, stage):
    folder = start(stage)
    kinds = itertools.cycle(["a folder", "a link to a file", "a pipe", "a link to nowhere"])
    for name, kind in zip(sorted(stages.MADE_BY[stage]), kinds, strict=False):
        KINDS[kind](folder / f".{name}.part", elsewhere)
    result = stages.run(stage, *QUICK[stage], model=folder)
    assert result.returncode == 0, result.stderr
    assert {*os.listdir(folder)} - {"mnist_cnn.pt", "results"} == stages.MADE_BY[stage] - {"mnist_cnn.pt"}
    assert (elsewhere / "file").read_text() == "not the pipeline's"
    assert {*os.listdir(elsewhere)} == {"file"}
