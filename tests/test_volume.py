"""What else may be in the volume under the names of the stages' files: links, folders, pipes, files of a killed run."""

import itertools
import os

import pytest

import stages


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with a file, for links to point to; it is the same afterwards."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "file").write_text("not the pipeline's")
    with stages.unchanged(folder):
        yield folder


# What a name may stand for: functions of a path and of the folder elsewhere.
KINDS = {
    "a link to a folder": lambda path, elsewhere: path.symlink_to(elsewhere),
    "a link to a file": lambda path, elsewhere: path.symlink_to(elsewhere / "file"),
    "a link to nowhere": lambda path, elsewhere: path.symlink_to(elsewhere / "nowhere"),
    "a file": lambda path, elsewhere: path.write_text("a file"),
    "a pipe": lambda path, elsewhere: os.mkfifo(path),
    "a folder": lambda path, elsewhere: (path / "inner").mkdir(parents=True),
}


@pytest.mark.parametrize("kind", ["a link to a folder", "a link to nowhere", "a file", "a pipe"])
def test_results_that_is_no_folder_is_refused_before_anything_is_published(start, elsewhere, kind):
    folder = start("infer")
    KINDS[kind](folder / "results", elsewhere)
    stages.assert_fails(stages.call("infer", model=folder), 1, folder / "results")
    assert {*os.listdir(folder)} == {"mnist_cnn.pt", "results"}


@pytest.mark.parametrize(("new", "old"), [*zip(KINDS, [*KINDS][::-1], strict=True)])
def test_leftovers_under_the_hidden_names_of_the_results_are_removed(start, elsewhere, new, old):
    folder = start("infer")
    (folder / "results").mkdir()
    KINDS[new](folder / ".results.new", elsewhere)
    KINDS[old](folder / ".results.old", elsewhere)
    stages.assert_succeeds(stages.call("infer", model=folder))
    assert len([*(folder / "results").iterdir()]) == 5
    assert {*os.listdir(folder)} - stages.LOCKS == {"mnist_cnn.pt", "results"} | stages.MADE_BY["infer"]
    stages.assert_whole(folder)


@pytest.mark.parametrize(
    ("stage", "name", "flags"),
    [(stage, name, ()) for stage in stages.STAGES for name in sorted(stages.MADE_BY[stage])]
    + [("train", name, ("--fresh",)) for name in sorted(stages.MADE_BY["train"])],
)
def test_a_folder_in_place_of_a_file_is_refused_before_the_work_begins(start, stage, name, flags):
    folder = start(stage)
    (folder / name / "inner").mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    result = stages.call(stage, *flags, model=folder)
    stages.assert_fails(result, 1, folder / name, "rm -r")
    assert result.stdout == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("stage", stages.STAGES)
def test_leftovers_that_cannot_be_written_to_are_removed(start, elsewhere, stage):
    folder = start(stage)
    kinds = itertools.cycle(["a folder", "a link to a file", "a pipe", "a link to nowhere"])
    for name, kind in zip(sorted(stages.MADE_BY[stage]), kinds, strict=False):
        KINDS[kind](folder / f".{name}.part", elsewhere)
    ended = stages.run(stage, *stages.QUICK, model=folder) if stage == "train" else stages.call(stage, model=folder)
    stages.assert_succeeds(ended)
    expected = stages.MADE_BY[stage] | {"mnist_cnn.pt"}
    assert {*os.listdir(folder)} - {"results"} - stages.LOCKS == expected
