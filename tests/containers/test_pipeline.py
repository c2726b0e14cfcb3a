"""The pipeline as a whole: what the README's main command leaves, running it again, and stages that do not start."""

import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor

import example
import pytest
import torch
from pipeline import COMPOSE_FILE, Pipeline, image, inspect, statuses
from stages import MADE_BY, STAGES, contents, pictures, read_json, sha256, wait_until

SUCCESS = {"train": 0, "evaluate": 0, "infer": 0}


def assert_in_order(ended):
    """Each stage started only when the one before it had ended."""
    assert ended["train"].ended <= ended["evaluate"].began
    assert ended["evaluate"].ended <= ended["infer"].began


def identity(path):
    """What changes about a file when anybody writes it."""
    return sha256(path), path.stat().st_mtime_ns, path.stat().st_ino


def save_untrained(volume):
    """Leaves a checkpoint of the example's network, which has learned nothing, in an empty volume."""
    volume.mkdir()
    torch.save(example.untrained().state_dict(), volume / "mnist_cnn.pt")


# One run --------------------------------------------------------------------------------------------------------------


def test_all_stages_succeed(first_run):
    assert statuses(first_run.ended) == SUCCESS, first_run.ended


def test_every_stage_starts_after_the_one_before_it_has_ended(first_run):
    assert_in_order(first_run.ended)


def test_every_container_is_of_the_image_that_was_built_for_it(first_run):
    images = {stage: inspect(image(stage))[0]["Id"] for stage in STAGES}
    assert {stage: container["Image"] for stage, container in first_run.containers.items()} == images


def test_every_container_has_an_init_process(first_run):
    assert all(container["HostConfig"]["Init"] for container in first_run.containers.values())


def test_the_volume_has_every_file_of_the_three_stages_and_nothing_else(complete):
    files = {*contents(complete)}
    results = {name for name in files if name.startswith("results/")}
    assert files - results == set().union(*MADE_BY.values())
    assert len(results) == 5


def test_every_file_of_the_volume_can_be_read_by_every_user(complete):
    modes = {path.name: path.stat().st_mode & 0o777 for path in complete.rglob("*") if path.is_file()}
    assert {*modes.values()} == {0o644}, modes
    assert (complete / "results").stat().st_mode & 0o555 == 0o555


def test_the_model_has_at_least_99_percent_accuracy_in_the_examples_network_too(complete, data):
    images, labels = example.read_test_images(data)
    predicted = example.predict(example.load(complete / "mnist_cnn.pt"), images).argmax(1)
    accuracy = (predicted == labels).sum().item() / 100
    assert accuracy >= 99
    # An image or three may be on the edge.
    assert read_json(complete / "eval_results.json")["Accuracy"] == pytest.approx(accuracy, abs=0.03)


def test_all_results_name_the_model_that_is_there(complete):
    names = ("train_results.json", "eval_results.json", "predictions.json")
    models = {read_json(complete / name)["model_sha256"] for name in names}
    assert models == {sha256(complete / "mnist_cnn.pt")}


def test_the_command_that_infer_prints_last_copies_everything_out(first_run, tmp_path):
    command = shlex.split(first_run.ended["infer"].stdout.splitlines()[-1].rpartition(": ")[2])
    assert command[:3] == ["docker", "compose", "cp"]
    variables = {"COMPOSE_PROJECT_NAME": first_run.project.name, "COMPOSE_FILE": str(COMPOSE_FILE)}
    subprocess.run(command, cwd=tmp_path, env=os.environ | variables, capture_output=True, check=True)
    assert contents(tmp_path / command[-1]) == contents(first_run.volume)


# Again ----------------------------------------------------------------------------------------------------------------


def test_evaluate_again_leaves_the_model_alone_and_train_takes_less_than_a_second(volume):
    before = identity(volume / "mnist_cnn.pt")
    with Pipeline(volume) as project:
        assert project.compose("run", "--rm", "-T", "evaluate").returncode == 0
        train = project.container("train").end()
    assert identity(volume / "mnist_cnn.pt") == before
    assert train.status == 0
    assert train.seconds < 1


def test_the_pipeline_again_runs_all_stages_in_order_and_leaves_five_pictures(volume):
    before = identity(volume / "mnist_cnn.pt")
    with Pipeline(volume) as project:
        for _ in range(2):
            ended = project.up()
            assert statuses(ended) == SUCCESS
            assert_in_order(ended)
            assert len(pictures(volume)) == 5
    assert identity(volume / "mnist_cnn.pt") == before


def test_a_checkpoint_of_the_examples_network_goes_through_the_pipeline(tmp_path):
    volume = tmp_path / "volume"
    save_untrained(volume)
    before = identity(volume / "mnist_cnn.pt")
    with Pipeline(volume, evaluate={"command": ["--min-accuracy", "0"]}) as project:
        assert statuses(project.up()) == SUCCESS
    assert identity(volume / "mnist_cnn.pt") == before
    assert read_json(volume / "eval_results.json")["Accuracy"] < 40


# What does not start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status"),
    [({"command": ["--lr", "0"]}, 2), ({"network_mode": "none"}, 1)],
    ids=["a wrong flag", "no data and no network"],
)
def test_if_train_fails_neither_of_the_others_starts(tmp_path, change, status):
    data, volume = tmp_path / "data", tmp_path / "volume"
    data.mkdir()
    with Pipeline(volume, data, train=change) as project:
        assert statuses(project.up()) == {"train": status, "evaluate": None, "infer": None}
    assert not contents(volume)


def test_if_the_network_is_untrained_evaluate_fails_and_infer_does_not_start(tmp_path):
    volume = tmp_path / "volume"
    save_untrained(volume)
    with Pipeline(volume) as project:
        assert statuses(project.up()) == {"train": 0, "evaluate": 1, "infer": None}
    assert {*contents(volume)} == {"mnist_cnn.pt"}


def test_compose_stop_stops_the_training_and_keeps_evaluate_from_starting(unfinished):
    with Pipeline(unfinished) as project, ThreadPoolExecutor() as pool:
        up = pool.submit(project.up)
        train = wait_until(lambda: project.container("train"))
        train.wait_until_it_trains()
        project.compose("stop")
        assert statuses(up.result(timeout=60)) == {"train": 143, "evaluate": None, "infer": None}
