"""What the stages may do, seen from inside their containers, and as which users they run."""

import json
import os

import pytest

from pipeline import DATA_FOLDER, MODEL, Pipeline, as_root, statuses
from stages import MADE_BY, QUICK, STAGES, assert_fails, assert_succeeds, assert_whole, contents

OTHER = 12345
FLAGS = {"train": (*QUICK, "--fresh"), "evaluate": ("--min-accuracy", "20"), "infer": ()}  # for little work

# Run by the image's own entrypoint in place of the program, this tells what the program would be able to do.
PROBE = """
import json, os, sys

def can(action, *arguments):
    try:
        action(*arguments)
        return True
    except OSError:
        return False

folders = ("/", "/opt/app", "/tmp", "/root", "/opt/mount/data", "/opt/mount/model")
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "users": status["Uid"].split() + status["Gid"].split(),
    "groups": status["Groups"].split(),
    "capabilities": {name: status[name].strip() for name in status if name.startswith("Cap")},
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "writes": [folder for folder in folders if can(open, f"{folder}/probe", "w")],
    "becomes_root": can(os.setuid, 0),
    "networks": os.listdir("/sys/class/net"),
    "flags": sys.argv[1:],
}))
"""


@pytest.fixture(scope="module")
def probed(owned, tmp_path_factory):
    """What the probe says in place of each stage's program."""
    probe = tmp_path_factory.mktemp("probe") / "probe.py"
    probe.write_text(PROBE)
    changes = {stage: {"volumes": [f"{probe}:/opt/app/{stage}.py:ro"]} for stage in STAGES}
    with Pipeline(data=owned[0], **changes) as project:
        ends = {stage: project.run(stage, "--a-flag", "of two words") for stage in STAGES}
    for ended in ends.values():
        assert_succeeds(ended)
    return {stage: json.loads(ended.stdout) for stage, ended in ends.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_as_the_owner_of_the_data_folder_without_a_capability_and_can_gain_none(probed, owned, stage):
    owner, found = owned[1], probed[stage]
    assert {*found["users"]} == {str(owner)}
    assert {*found["groups"]} <= {str(owner)}
    assert {*found["capabilities"].values()} == {"0" * 16}
    assert found["no_new_privileges"] == "1"
    assert found["becomes_root"] is (owner == 0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_to_the_volume_only_and_train_to_the_data_too_and_evaluate_has_no_network(probed, stage):
    assert probed[stage]["writes"] == [DATA_FOLDER] * (stage == "train") + [MODEL]
    assert (probed[stage]["networks"] == ["lo"]) is (stage == "evaluate")


@pytest.mark.parametrize("stage", STAGES)
def test_flags_reach_the_program_as_they_were_given(probed, stage):
    assert probed[stage]["flags"] == ["--a-flag", "of two words"]


def test_the_pipeline_works_in_a_new_volume_and_its_files_belong_to_the_owner_of_the_data(owned):
    data, owner = owned
    with Pipeline(data=data, **{stage: {"command": [*FLAGS[stage]]} for stage in STAGES}) as project:
        assert statuses(project.up()) == {"train": 0, "evaluate": 0, "infer": 0}
        owners = project.shell("find . -mindepth 1 -printf '%U:%G\n'").split()
    assert len(owners) > 9
    assert {*owners} == {f"{owner}:{owner}"}


@pytest.fixture
def shared(volume):
    """A copy of the complete volume, in which files may be given to others until the test is over."""
    yield volume
    as_root(volume, f"chown -hR {os.getuid()}:{os.getgid()} . && chmod -R u+rwX .")


def test_a_stage_runs_as_any_user_that_it_is_given(shared):
    with Pipeline(shared) as project:
        for stage in STAGES:
            assert_succeeds(project.run(stage, *FLAGS[stage], options=("--user", "1000")))
            assert {(shared / name).stat().st_uid for name in MADE_BY[stage]} == {1000}
    assert_whole(shared)


def test_files_of_others_in_a_sticky_folder_stay_and_the_fix_is_named(shared):
    before = contents(shared)
    with Pipeline(shared) as project:
        as_root(shared, f"chown -R {OTHER} . && chmod 1777 .")
        for stage in STAGES:
            assert_fails(project.run(stage, *FLAGS[stage], options=("--user", "1000")), 1, "owner of the folder")
    assert contents(shared) == before


def test_an_unfinished_file_of_another_user_is_removed(shared):
    parts = [shared / f".{name}.part" for stage in STAGES for name in MADE_BY[stage]]
    for part in parts:
        part.write_text("unfinished")
    with Pipeline(shared) as project:
        as_root(shared, f"chown {OTHER} .*.part && chmod 444 .*.part")
        for stage in STAGES:
            assert_succeeds(project.run(stage, *FLAGS[stage]))
            assert not any((shared / f".{name}.part").exists() for name in MADE_BY[stage])
    assert_whole(shared)
