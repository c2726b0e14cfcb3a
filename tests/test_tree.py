"""The tree: copies that must be the same, docker-compose.yml, Dockerfiles, and the style of the code."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stages
import yaml

DOCKERFILES = {stage: next((stages.TREE / folder).glob("Dockerfile.*")) for stage, folder in stages.FOLDERS.items()}
DASHES = "# " + 118 * "-"


@pytest.fixture(scope="module")
def compose():
    """docker-compose.yml, read."""
    return yaml.safe_load((stages.TREE / "docker-compose.yml").read_text())


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.py", "artifacts.py", "process.py", "requirements-torch.txt", "requirements.txt"])
@pytest.mark.parametrize("stage", ["evaluate", "infer"])
def test_every_image_gets_the_same_copy_and_git_knows_that_it_is_one(stage, name):
    copy = stages.TREE / stages.FOLDERS[stage] / name
    assert copy.read_bytes() == (stages.TREE / "model-train" / name).read_bytes(), "run: make copies"
    command = ["git", "check-attr", "linguist-generated", copy.relative_to(stages.TREE)]
    answer = subprocess.run(command, cwd=stages.TREE, capture_output=True, text=True, check=True).stdout
    assert answer.split()[-1] == "set"


def test_the_data_set_and_what_runs_leave_stay_out_of_git():
    command = [
        "git",
        "check-ignore",
        "data/MNIST/raw/train-images-idx3-ubyte",
        "model/mnist_cnn.pt",
        "out/x",
        "tests/.venv/x",
    ]
    answer = subprocess.run(command, cwd=stages.TREE, capture_output=True, text=True, check=False).stdout
    assert answer.split() == command[2:]


def test_every_dependency_is_pinned():
    for path in stages.TREE.glob("*/requirements*.txt"):
        for line in path.read_text().splitlines():
            assert line.startswith(("#", "    ")) or not line or "==" in line, f"{path}: {line}"


# Dockerfiles ----------------------------------------------------------------------------------------------------------


def prologue_and_rest(stage):
    """The lines of a Dockerfile above and below its line of dashes, without the first, which names the stage."""
    lines = DOCKERFILES[stage].read_text().splitlines()[1:]
    dashes = lines.index(DASHES)
    return lines[:dashes], lines[dashes + 1 :]


def test_the_dockerfiles_have_the_names_that_are_expected():
    names = ["Dockerfile.train", "Dockerfile.eval", "Dockerfile.infer"]
    assert [path.name for path in DOCKERFILES.values()] == names


@pytest.mark.parametrize("stage", ["evaluate", "infer"])
def test_the_dockerfiles_share_their_prologue_and_so_the_layers_with_torch(stage):
    prologue, _ = prologue_and_rest(stage)
    assert prologue == prologue_and_rest("train")[0]
    assert "ARG BASE_IMAGE=python:3.11-slim-bookworm" in prologue


@pytest.mark.parametrize("stage", stages.STAGES)
def test_all_programs_of_a_stage_are_copied_into_its_image(stage):
    _, rest = prologue_and_rest(stage)
    (copy,) = [line.split() for line in rest if line.startswith("COPY")]
    assert {*copy[1:-1]} == {path.name for path in (stages.TREE / stages.FOLDERS[stage]).glob("*.py")}
    assert copy[-1] == "/opt/app/"


# docker-compose.yml ---------------------------------------------------------------------------------------------------


def test_the_project_and_its_services_have_the_names_that_are_expected(compose):
    assert compose["name"] == "mnist"
    assert [*compose["services"]] == stages.STAGES
    assert "version" not in compose
    assert not any("container_name" in service for service in compose["services"].values())


def test_every_stage_is_built_from_its_own_folder(compose):
    for stage, service in compose["services"].items():
        assert service["build"]["context"] == stages.FOLDERS[stage]
        assert service["build"]["dockerfile"] == DOCKERFILES[stage].name


def test_every_stage_waits_for_the_success_of_those_before_it(compose):
    needs = {stage: service.get("depends_on", {}) for stage, service in compose["services"].items()}
    success = {"condition": "service_completed_successfully"}
    assert needs == {"train": {}, "evaluate": {"train": success}, "infer": {"train": success, "evaluate": success}}


def test_no_stage_is_restarted(compose):
    assert [service["restart"] for service in compose["services"].values()] == ["no"] * 3


def test_the_mounts_are_writable_only_where_a_stage_writes(compose):
    model = "mnist:/opt/mount/model"
    mounts = {stage: service["volumes"] for stage, service in compose["services"].items()}
    assert mounts == {
        "train": ["./data:/opt/mount/data", model],
        "evaluate": ["./data:/opt/mount/data:ro", model],
        "infer": ["./data:/opt/mount/data:ro", model],
    }
    assert [*compose["volumes"]] == ["mnist"]


def test_only_train_has_a_network_of_its_own_kind(compose):
    modes = {stage: service.get("network_mode") for stage, service in compose["services"].items()}
    assert modes == {"train": None, "evaluate": "none", "infer": "host"}


def test_no_stage_has_more_rights_than_it_needs(compose):
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert {*service["cap_add"]} <= {"SETUID", "SETGID", "SETPCAP"}
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service


# Style ----------------------------------------------------------------------------------------------------------------


def assert_silent(*command, folder=stages.TREE):
    """A tool, run in a folder, finds nothing wrong."""
    command = [Path(sys.executable).with_name(command[0]), *command[1:]]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "layout"])
def test_ruff_finds_nothing(command):
    assert_silent("ruff", *command, "--no-cache", ".")


def test_hadolint_finds_nothing():
    assert_silent("hadolint", *DOCKERFILES.values())


@pytest.mark.parametrize("stage", stages.STAGES)
def test_mypy_finds_nothing(pytestconfig, stage):
    cache = pytestconfig.cache.mkdir("mypy")  # what torch's types are takes most of the time
    config = stages.TREE / "pyproject.toml"
    assert_silent(
        "mypy", "--config-file", config, "--cache-dir", cache, ".", folder=stages.TREE / stages.FOLDERS[stage]
    )


@pytest.mark.parametrize(
    ("pattern", "schema"),
    [("workflows/*.yml", "vendor.github-workflows"), ("dependabot.yml", "vendor.dependabot")],
)
def test_githubs_files_are_valid_by_their_published_schemas(pattern, schema):
    paths = [*(stages.TREE / ".github").glob(pattern)]
    assert paths
    assert_silent("check-jsonschema", "--builtin-schema", schema, *paths)


@pytest.mark.parametrize("folder", [*stages.FOLDERS.values(), "data", "tests"])
def test_no_class_has_more_than_120_lines_and_no_function_more_than_40(folder):
    long = []
    for path in (stages.TREE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > (120 if isinstance(node, ast.ClassDef) else 40):
                    long.append(f"{path.name}: {node.name} has {length} lines")
    assert long == []


def test_every_target_of_the_makefile_is_listed_by_make_alone():
    rules = [line for line in (stages.TREE / "Makefile").read_text().splitlines() if line.startswith(".PHONY:")]
    targets = " ".join(rules).split()[1:]
    listed = subprocess.run(["make"], cwd=stages.TREE, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target} " in listed for target in targets)


def test_prepare_refuses_another_kind_of_machine_in_one_line(tmp_path):
    for name in ("bash", "sh", "sed", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    engine = 'case "$1" in info|compose) exit 0;; esac\nexit 1\n'  # one that runs, and has no image
    for name, script in (("uname", "echo aarch64\n"), ("docker", engine)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        (tmp_path / name).chmod(0o755)
    command = [shutil.which("bash"), stages.TREE / ".ci" / "prepare"]
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    (line,) = (result.stdout + result.stderr).splitlines()
    assert result.returncode == 1
    assert "aarch64" in line
