"""The tree: copies that must be the same, docker-compose.yml, Dockerfiles, and the style of the code."""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

import stages

DOCKERFILES = {stage: next((stages.TREE / folder).glob("Dockerfile.*")) for stage, folder in stages.FOLDERS.items()}
COPIES = [
    *("net.py", "entrypoint.sh", ".dockerignore", "requirements-torch.txt", "requirements.txt"),
    *(f"stage/{path.name}" for path in (stages.TREE / "model-train/stage").glob("*.py")),
]


def run(*command, folder=stages.TREE):
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def compose():
    content = yaml.safe_load((stages.TREE / "docker-compose.yml").read_text())
    content["export"] = content["services"].pop("export")  # which is no stage
    content["services"].pop("serve", None)  # nor is this, which has tests of its own
    return content


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A function that runs git on the tree, which may belong to another user. A copy without .git has none."""
    if not (stages.TREE / ".git").exists():
        assert "CI" not in os.environ
        pytest.skip("this copy of the tree has no .git")
    (tmp_path / "gitconfig").write_text("[safe]\ndirectory = *\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    return partial(run, "git")


# Copies ---------------------------------------------------------------------------------------------------------------


def test_the_images_have_the_same_copies_and_the_version_on_their_labels_as_make_copies_makes_them(tmp_path):
    copied = stages.copy_tree(tmp_path)
    for folder in stages.FOLDERS.values():
        one, other = (stages.contents(tree / folder) for tree in (stages.TREE, copied))
        assert {name: one[name] for name in one if "_cache" not in name} == other, "run: make copies"


def test_git_knows_which_files_are_copies(git):
    copies = [f"{stages.FOLDERS[stage]}/{name}" for stage in ("evaluate", "infer") for name in COPIES]
    lines = git("check-attr", "linguist-generated", *copies).splitlines()
    assert lines == [f"{copy}: linguist-generated: set" for copy in copies]


def test_a_checkout_on_windows_has_line_feeds_in_every_text(git, tmp_path):
    git("clone", "--config", "core.autocrlf=true", stages.TREE, tmp_path / "checkout")
    lines = git("ls-files", "--eol", folder=tmp_path / "checkout").splitlines()
    assert [line for line in lines if not re.match(r"i/\S+ +w/(lf|-text|none) ", line)] == []
    here_document = "<<"  # which needs new engines
    assert not any(here_document in path.read_text() for path in DOCKERFILES.values())


def test_the_data_set_what_runs_leave_and_settings_of_ones_own_stay_out_of_git(git):
    paths = [
        "data/MNIST/raw/train-images-idx3-ubyte",
        "data/pictures/train/cat/1.png",
        "model/mnist_cnn.pt",
        "out/x",
        "tests/.venv/x",
        ".env",
    ]
    assert git("check-ignore", *paths).split() == paths
    scripts = ["data/make_pictures.py", "data/unpack.sh"]  # of one's own
    assert git("check-ignore", "--verbose", *scripts).count("!/data/") == len(scripts)


def test_every_dependency_is_pinned():
    lines = [line for path in stages.TREE.glob("*/requirements*.txt") for line in path.read_text().splitlines()]
    assert [line for line in lines if line and not line.startswith(("#", "    ")) and "==" not in line] == []


# Folders and imports --------------------------------------------------------------------------------------------------

ROOMS = {
    "train": {"stage", "training", "cluster"},
    "evaluate": {"stage", "export"},
    "infer": {"stage", "pictures", "web"},
}


def imports(stage):
    """The modules of a stage by their dotted names, each with those of the stage that it imports, lazily or not."""
    folder = stages.TREE / stages.FOLDERS[stage]
    modules = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    found = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = [node.module] if isinstance(node, ast.ImportFrom) else []
                found[name] |= {*module, *(".".join([*module, alias.name]) for alias in node.names)} & modules.keys()
    return found


@pytest.mark.parametrize("stage", stages.STAGES)
def test_imports_run_one_way(stage):
    left = imports(stage)
    while done := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in done}
    assert left == {}  # these import each other


@pytest.mark.parametrize("stage", stages.STAGES)
def test_the_folders_are_as_drawn_and_what_all_images_share_needs_nothing_else(stage):
    needs = imports(stage)
    assert {name.split(".")[0] for name in needs if "." in name} == ROOMS[stage]
    shared = [need for name in needs if name.startswith("stage.") for need in needs[name]]
    assert all(need.startswith("stage.") for need in shared)


def test_nothing_imports_train_and_only_train_imports_the_cluster_where_it_is_started_by_it():
    needs = imports("train")
    assert not [name for name in needs if "train" in needs[name]]
    outside = needs.keys() - {name for name in needs if name.startswith("cluster.")} - {"train"}
    assert not [name for name in outside if any(need.startswith("cluster.") for need in needs[name])]


# Dockerfiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", stages.STAGES)
def test_all_programs_of_a_stage_are_copied_so_that_any_user_may_run_what_only_its_owner_may_read(stage):
    folders = {path.parent.name for path in (stages.TREE / stages.FOLDERS[stage]).glob("*/*.py")}
    copied = {"entrypoint.sh /opt/entrypoint.sh", "*.py /opt/app/", *(f"{name} /opt/app/{name}" for name in folders)}
    lines = re.findall(r"^COPY (?!--from=).* /opt/.*", DOCKERFILES[stage].read_text(), re.MULTILINE)
    assert {*lines} == {f"COPY --chmod=755 {words}" for words in copied}


# docker-compose.yml ---------------------------------------------------------------------------------------------------


def test_the_project_its_services_and_their_dockerfiles_have_the_names_that_are_expected(compose):
    assert "name" not in compose  # so that a project is named after its checkout's folder, and has a volume of its own
    builds = {stage: service["build"] for stage, service in compose["services"].items()}
    names = zip(stages.STAGES, ("train", "eval", "infer"), strict=True)
    assert builds == {stage: {"context": f"model-{name}", "dockerfile": f"Dockerfile.{name}"} for stage, name in names}
    assert "version" not in compose
    assert not any("container_name" in service for service in compose["services"].values())


def test_images_have_the_projects_name_or_one_that_is_given_for_build_and_pull(compose):
    for stage, service in [*compose["services"].items(), ("export", compose["export"])]:
        assert service["image"] == f"${{MNIST_IMAGES:-${{COMPOSE_PROJECT_NAME}}}}-{stage}:${{MNIST_TAG:-latest}}"


def test_every_stage_waits_for_the_success_of_those_before_it(compose):
    needs = {stage: service.get("depends_on", {}) for stage, service in compose["services"].items()}
    success = {"condition": "service_completed_successfully"}
    assert needs == {"train": {}, "evaluate": {"train": success}, "infer": {"train": success, "evaluate": success}}


def test_infer_alone_is_on_the_hosts_network_which_an_override_takes_away_where_an_engine_refuses_it(compose):
    modes = {stage: service.get("network_mode") for stage, service in compose["services"].items()}
    assert modes == {"train": None, "evaluate": "none", "infer": "host"}
    override = yaml.safe_load((stages.TREE / "deploy/compose.no-host-network.yml").read_text())
    assert override == {"services": {"infer": {"network_mode": "none"}}}


@pytest.mark.parametrize("stage", stages.STAGES)
def test_no_stage_is_restarted_or_has_more_rights_than_it_needs(compose, stage):
    service = compose["services"][stage]
    assert (service["restart"], service["init"], service["read_only"]) == ("no", False, True)
    assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
    assert {*service["cap_add"]} <= {"SETUID", "SETGID", "SETPCAP"}
    assert "privileged" not in service


def test_export_starts_where_it_is_named_and_is_evaluate_with_more_packages(compose):
    export = compose["export"]
    assert (export["profiles"], export["extends"]) == (["export"], {"service": "evaluate"})
    assert export["build"] == {"target": "export"}
    assert export.keys() == {"profiles", "extends", "image", "build"}


# Style ----------------------------------------------------------------------------------------------------------------

BIN, GITHUB = Path(sys.executable).parent, stages.TREE / ".github"
SCHEMA = ("check-jsonschema", "--builtin-schema")
TOOLS = {
    "lint": ["ruff", "check", "--no-cache", "."],
    "layout": ["ruff", "format", "--check", "--no-cache", "."],
    "Dockerfiles": ["hadolint", *DOCKERFILES.values(), *stages.TREE.glob("tests/*/Dockerfile.*")],
    "workflows": [*SCHEMA, "vendor.github-workflows", *(GITHUB / "workflows").glob("*.yml")],
    "what workflows run": ["actionlint", *(GITHUB / "workflows").glob("*.yml")],
    "dependabot": [*SCHEMA, "vendor.dependabot", GITHUB / "dependabot.yml"],
}


@pytest.mark.parametrize("command", TOOLS.values(), ids=TOOLS.keys())
def test_a_tool_finds_nothing_wrong(command):
    tool, *words = command
    run(BIN / tool, *words)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_mypy_finds_nothing_wrong(pytestconfig, stage):
    options = ("--config-file", stages.TREE / "pyproject.toml", "--cache-dir", pytestconfig.cache.mkdir("mypy"))
    run(BIN / "mypy", *options, ".", folder=stages.TREE / stages.FOLDERS[stage])


@pytest.mark.parametrize("folder", [*stages.FOLDERS.values(), "data", "tests"])
def test_no_class_has_more_than_120_lines_and_no_function_more_than_40(folder):
    longest = {ast.ClassDef: 120, ast.FunctionDef: 40, ast.AsyncFunctionDef: 40}
    for path in (stages.TREE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if type(node) in longest:
                lines = node.end_lineno - node.lineno + 1
                assert lines <= longest[type(node)], f"{path.name}: {node.name} has {lines} lines"


def test_every_target_of_the_makefile_is_listed_by_make_alone():
    rules = [line for line in (stages.TREE / "Makefile").read_text().splitlines() if line.startswith(".PHONY:")]
    targets = " ".join(rules).split()[1:]
    listed = run("make")
    assert all(f"make {target} " in listed for target in targets)


# A python3 whose environments have a Python that only notes what it is asked for, and fails at some of it.
PYTHON = """
[ "$1" = -c ] && exec {real} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
mkdir -p .venv/bin
cat >.venv/bin/python <<'END'
#!/bin/sh
echo "$*" >>calls
case "$*" in {fails}) exit 1 ;; esac
END
chmod +x .venv/bin/python
"""
NEW, OLD = (3, 11), (3, 10, 12)


def write_program(path, script):
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that runs `make local`, without what comes after the environment, where Python fails at a pattern.

    It returns how make ended, and what Python was asked for.
    """
    for path in (stages.TREE / "Makefile", *stages.TREE.glob("model-*/requirements*.txt")):
        copy = tmp_path / path.relative_to(stages.TREE)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("TORCH_INDEX", "PYTHON3", "MAKEFLAGS"):  # the last has those given to a make that runs the tests
        monkeypatch.delenv(name, raising=False)

    def make_environment(fails, *words, goal=".venv/for-stages", version=NEW):
        write_program(tmp_path / "python3", PYTHON.format(fails=fails, real=sys.executable, version=version))
        (tmp_path / "calls").write_text("")
        command = ["make", "--silent", goal, *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return result, (tmp_path / "calls").read_text().splitlines()

    return make_environment


def test_where_the_index_of_pytorch_cannot_be_reached_torch_is_installed_from_the_default_one(make):
    result, calls = make("*download.pytorch.org*")
    assert result.returncode == 0, result.stderr
    assert "2.7 GB" in result.stderr
    assert not {"--no-deps", "--index-url"} & {*calls[1].split()}
    assert make("never")[1] == []


def test_an_index_for_torch_that_is_given_and_fails_is_named_and_no_other_is_used(make):
    result, calls = make("*mirror.example*", "TORCH_INDEX=https://mirror.example/cpu")
    assert result.returncode != 0
    assert "TORCH_INDEX=https://mirror.example/cpu" in result.stderr
    assert len(calls) == 1


@pytest.mark.parametrize("fails", ["*requirements-export.txt*", "*import*torch*"])
def test_an_installation_that_failed_is_not_taken_for_done(make, fails):
    result, _ = make(fails, "TORCH_INDEX=https://mirror.example/whole")
    assert result.returncode != 0
    result, calls = make("never")
    assert result.returncode == 0
    assert calls


@pytest.mark.parametrize("goal", ["local", "test", "data"])
def test_an_old_python_is_refused_before_anything_is_made_and_another_can_be_chosen(make, tmp_path, goal):
    result, _ = make("never", goal=goal, version=OLD)
    assert result.returncode != 0
    assert f"3.11 or newer is needed: make PYTHON3=python3.12 {goal}" in result.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()
    result, _ = make("never", f"PYTHON3={sys.executable}", "--dry-run", goal=goal, version=OLD)
    assert sys.executable in result.stdout


def test_prepare_refuses_another_kind_of_machine_in_one_line(tmp_path):
    for name in ("bash", "sh", "sed", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    engine = 'case "$1" in info|compose) exit 0;; esac\nexit 1\n'  # one that runs, and has no image
    for name, script in (("uname", "echo aarch64\n"), ("docker", engine)):
        write_program(tmp_path / name, script)
    command = [shutil.which("bash"), stages.TREE / ".ci" / "prepare"]
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    (line,) = (result.stdout + result.stderr).splitlines()
    assert result.returncode == 1
    assert "aarch64" in line
