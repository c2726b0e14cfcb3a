"""The documents, README.md and docs/*.md, compared with the code: flags, variables, files, links, a recipe."""

import re
import subprocess
import sys

import pytest
import yaml

import stages

README = stages.TREE / "README.md"
DOCUMENTS = [README, *sorted((stages.TREE / "docs").glob("*.md")), *(stages.TREE / "tests").rglob("README.md")]
ALL = "\n".join(path.read_text() for path in DOCUMENTS)
OF_TOOLS = """--abort-on-container-exit --abort-on-container-failure --all --attach-dependencies --build --build-arg
--cap-add --cpus --detach --entrypoint --exit-code-from --file --force --format --help --images --init --json --memory
--mount --name --network --no-deps --no-start --nodes --now --platform --print --profile --project-name --quiet
--recursive --remove-orphans --rm --signal --tag --time --type --user --volume --volumes --wait"""


def flags_of(program):
    return {*re.findall(r'add_argument\(\s*"(--[a-z-]+)"', program.read_text())}


def flags_in(text):
    return {*re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)}


@pytest.fixture(scope="module")
def of_programs(tmp_path_factory):
    """The flags of the three programs and of launch.py, from their own help, and those of serve; two may be removed."""
    texts = [stages.call(stage, "--help", model=tmp_path_factory.mktemp("model")).stdout for stage in stages.STAGES]
    for launch in stages.TREE.glob("model-train/cluster/launch.py"):
        texts.append(
            subprocess.run([sys.executable, launch, "--help"], capture_output=True, text=True, check=True).stdout
        )
    return flags_in(" ".join(texts)).union(*map(flags_of, stages.TREE.glob("model-infer/serve.py")))


def test_every_flag_of_a_program_is_documented(of_programs):
    assert of_programs - {"--help"} <= flags_in(ALL)


def test_every_flag_in_a_document_is_one_of_a_programs_or_a_tools(of_programs):
    ours = of_programs.union(*map(flags_of, (stages.TREE / "tests").rglob("*.py")))
    assert flags_in(ALL) <= ours | flags_in(OF_TOOLS)


def test_every_variable_of_the_compose_files_is_documented_and_no_other():
    files = [stages.TREE / "docker-compose.yml", *(stages.TREE / "deploy").glob("compose.*.yml")]
    variables = {*re.findall(r"\bMNIST_[A-Z_]+", "".join(file.read_text() for file in files))}
    assert {*re.findall(r"\bMNIST_[A-Z_]+", ALL)} == variables


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(stages.TREE)))
def test_every_file_that_a_document_names_or_links_to_is_there(path):
    text = path.read_text()
    names = re.findall(r"`(\.?[\w-][\w./-]*\.(?:py|yml|yaml|sbatch|toml|md|train|eval|infer))`", text)
    for name in names:
        found = (stages.TREE / name).exists() or [*stages.TREE.glob(f"*/{name}"), *stages.TREE.glob(f"tests/*/{name}")]
        assert found, name
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text):
        assert (path.parent / link).exists(), link


def test_every_program_and_every_file_of_the_volume_is_named_in_the_readme():
    text = README.read_text()
    programs = {path.name for folder in stages.FOLDERS.values() for path in (stages.TREE / folder).glob("*.py")}
    for name in programs.union(*stages.MADE_BY.values()):
        assert name in text, name


def test_every_target_that_a_document_calls_is_in_the_makefile():
    targets = {*re.findall(r"^([a-z][a-z-]*):", (stages.TREE / "Makefile").read_text(), re.MULTILINE)}
    called = {*re.findall(r"(?:`|^ *(?:\$ )?)make ([a-z-]+)", ALL, re.MULTILINE)}
    assert {"test", "data", "local"} <= called <= targets


def test_every_service_is_run_in_a_document_and_no_other():
    services = {*yaml.safe_load((stages.TREE / "docker-compose.yml").read_text())["services"]}
    assert {*re.findall(r"docker compose (?:run|up) (?:--?\S+ )*([a-z]+)", ALL)} == services


def test_the_readme_is_short_and_begins_with_the_main_commands():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    for command in ("docker compose up --build", "make test"):
        assert any(command in line for line in lines[:40]), command
