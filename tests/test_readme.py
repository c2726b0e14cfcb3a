"""README.md against the code: its flags, files, targets and services are those that there are."""

import re

import pytest
import stages
import yaml

# Flags in the README that are not the programs' but of the tools that its commands call.
OF_TOOLS = {
    *("--build", "--rm", "--volumes", "--build-arg", "--no-deps", "--remove-orphans", "--detach", "--help"),
    *("--signal", "--entrypoint", "--project-name", "--mount", "--volume", "--name", "--cpus", "--memory"),
}


@pytest.fixture(scope="module")
def readme():
    """The text of README.md."""
    return (stages.TREE / "README.md").read_text()


def flags_in(text):
    """The long flags that a text names."""
    return {*re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of each program, from its own help."""
    folder = tmp_path_factory.mktemp("help")
    return {stage: flags_in(stages.run(stage, "--help", model=folder).stdout) for stage in stages.STAGES}


def names_in_code(readme):
    """Whatever stands in backticks, and every word of the blocks of commands."""
    blocks = re.findall(r"^```.*?^```", readme, re.MULTILINE | re.DOTALL)
    return {*re.findall(r"`([^`\s]+)`", readme), *" ".join(blocks).split()}


@pytest.mark.parametrize("stage", stages.STAGES)
def test_every_flag_of_a_program_is_in_the_readme(readme, flags, stage):
    assert flags[stage] - {"--help"} <= flags_in(readme)


def test_every_flag_in_the_readme_is_one_of_a_programs_or_a_tools(readme, flags):
    scripts = [path.read_text() for path in (stages.TREE / "tests").rglob("*.py") if not path.name.startswith("test_")]
    ours = set().union(*flags.values(), re.findall(r'add_argument\("(--[a-z-]+)"', "".join(scripts)))
    assert flags_in(readme) <= ours | OF_TOOLS


def test_every_file_of_the_tree_that_the_readme_names_is_there(readme):
    made = {"mnist_cnn.pt"}.union(*stages.MADE_BY.values())
    named = {
        name
        for name in names_in_code(readme)
        if re.fullmatch(r"\.?[\w-][\w./-]*\.(py|yml|toml|train|eval|infer)", name)
    }
    assert named
    for name in named - made:
        assert (stages.TREE / name).exists() or [*stages.TREE.glob(f"*/{name}")], name


def test_every_picture_and_page_that_the_readme_links_to_is_there(readme):
    for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme):
        assert (stages.TREE / link).exists(), link


def test_every_program_is_named_in_the_readme(readme):
    for folder in stages.FOLDERS.values():
        for program in (stages.TREE / folder).glob("*.py"):
            assert program.name in readme


def test_every_file_of_the_volume_is_named_in_the_readme(readme):
    for name in set().union(*stages.MADE_BY.values()):
        assert name in readme


def test_every_target_that_the_readme_calls_is_in_the_makefile(readme):
    targets = {*re.findall(r"^([a-z][a-z-]*):", (stages.TREE / "Makefile").read_text(), re.MULTILINE)}
    called = {*re.findall(r"(?:`|^ *(?:\$ )?)make ([a-z-]+)", readme, re.MULTILINE)}
    assert {"test", "data", "local"} <= called <= targets


def test_every_service_that_the_readme_runs_is_in_the_compose_file(readme):
    services = {*yaml.safe_load((stages.TREE / "docker-compose.yml").read_text())["services"]}
    called = {*re.findall(r"docker compose run (?:-\S+ )*([a-z]+)", readme)}
    assert called == services


def test_the_readme_has_the_main_command_and_that_of_the_tests_on_its_first_screen(readme):
    first_screen = readme.splitlines()[:40]
    assert any("docker compose up --build" in line for line in first_screen)
    assert any("make test" in line for line in first_screen)
