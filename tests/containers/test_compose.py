"""What Docker Compose makes of docker-compose.yml: exit statuses, as docs/operations.md has them, and an override."""

import re

import pytest

from pipeline import COMPOSE_FILE, Pipeline, inspect
from stages import STAGES, TREE, assert_succeeds

STATUS = 7  # of the stage that fails
ROWS = re.findall(r"^\| `docker (compose .+)` \|(.+)\|$", (TREE / "docs/operations.md").read_text(), re.MULTILINE)
CASES = [
    (command, stage, {int(number) for number in re.findall(r"\d", cell.replace("infer's", str(STATUS)))})
    for command, cells in ROWS
    for stage, cell in zip((None, *STAGES), cells.split("|"), strict=True)
]
assert CASES


def that_exits(**entrypoints):
    """Changes for Pipeline: each stage ends at once with success, or runs a shell script."""
    return {stage: {"entrypoint": ["sh", "-c", entrypoints.get(stage, "exit 0")]} for stage in STAGES}


def call(project, command):
    """Runs commands joined by && in a project, and returns the exit status."""
    for words in command.split(" && docker "):
        if status := project.compose(*words.split()[1:]).returncode:
            break
    return status


@pytest.mark.parametrize(("command", "stage", "statuses"), CASES)
def test_a_command_returns_what_the_table_says(command, stage, statuses):
    with Pipeline(**that_exits(**({stage: f"exit {STATUS}"} if stage else {}))) as project:
        assert call(project, command) in statuses


@pytest.mark.parametrize(
    "command", ["compose up --detach", "compose up --wait", "compose create && docker compose start"]
)
def test_some_commands_return_while_infer_runs(command):
    with Pipeline(**that_exits(infer="sleep infinity")) as project:
        assert call(project, command) == 0
        assert project.container("infer").state()["Status"] == "running"


def test_infer_works_without_the_network_that_some_engines_refuse(volume):
    with Pipeline(volume) as project:
        project.files = (COMPOSE_FILE, TREE / "deploy/compose.no-host-network.yml")
        infer = project.start("infer")
        assert_succeeds(infer.end())
        assert inspect(infer.id)["HostConfig"]["NetworkMode"] == "none"
