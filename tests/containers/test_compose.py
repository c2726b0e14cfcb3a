"""What Docker Compose makes of docker-compose.yml: exit statuses, as docs/operations.md has them, and an override."""

import re

import pytest

from pipeline import COMPOSE_FILE, Pipeline, docker, inspect
from stages import STAGES, TREE, assert_succeeds

STATUS = 7  # of the stage that fails
ROWS = re.findall(r"^\| `docker (compose .+)` \|(.+)\|$", (TREE / "docs/operations.md").read_text(), re.MULTILINE)
assert ROWS


def that_exits(**entrypoints):
    """Changes for Pipeline: each stage ends at once with success, or runs a shell script."""
    return {stage: {"entrypoint": ["sh", "-c", entrypoints.get(stage, "exit 0")]} for stage in STAGES}


def call(project, command):
    """Runs commands joined by && in a project without containers, and returns the exit status."""
    docker("rm", "--force", *project.containers())
    for words in command.split(" && docker "):
        if status := project.compose(*words.split()[1:]).returncode:
            break
    return status


@pytest.mark.parametrize("column", range(1 + len(STAGES)), ids=["all succeed", *(f"{stage} fails" for stage in STAGES)])
def test_the_commands_return_what_the_table_says(column):
    failing = {STAGES[column - 1]: f"exit {STATUS}"} if column else {}
    with Pipeline(**that_exits(**failing)) as project:
        for command, cells in ROWS:
            statuses = re.findall(r"\d", cells.split("|")[column].replace("infer's", str(STATUS)))
            assert str(call(project, command)) in statuses, command


def test_some_commands_return_while_infer_runs():
    with Pipeline(**that_exits(infer="sleep infinity")) as project:
        for command in ("compose up --detach", "compose up --wait", "compose create && docker compose start"):
            assert call(project, command) == 0, command
            assert project.container("infer").state()["Status"] == "running"


def test_infer_works_without_the_network_that_some_engines_refuse(volume):
    with Pipeline(volume) as project:
        project.files = (COMPOSE_FILE, TREE / "deploy/compose.no-host-network.yml")
        infer = project.start("infer")
        assert_succeeds(infer.end())
        assert inspect(infer.id)["HostConfig"]["NetworkMode"] == "none"
