"""The version of the pipeline: its one home is stage/__init__.py."""

import re

import pytest

import stages
from stage import VERSION


@pytest.mark.parametrize("program", stages.STAGES)
def test_every_program_tells_the_version(tmp_path, program):
    result = stages.call(program, "--version", model=tmp_path)
    stages.assert_succeeds(result)
    assert result.stdout == f"{program} {VERSION}\n"


def test_a_training_tells_it(trained):
    assert stages.results(trained)["version"] == VERSION


def test_the_changelog_tells_what_is_new_in_it():
    versions = re.findall(r"^## \[(.*)\] - \d{4}-\d\d-\d\d$", (stages.TREE / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == VERSION
    assert versions == sorted(versions, key=lambda text: [*map(int, text.split("."))], reverse=True)
