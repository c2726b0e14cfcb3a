"""The pipeline as a whole: what the README's main command leaves, running it again, and a picture in HEIC."""

import json
import os
import shutil
import subprocess

import pillow_heif
import pytest
from PIL import Image

import example
from pipeline import COMPOSE_FILE, Pipeline, statuses
from stages import MADE_BY, assert_succeeds, contents, read_json, sha256

SUCCESS = {"train": 0, "evaluate": 0, "infer": 0}


def identity(path):
    """What changes about a file when anybody writes it."""
    return sha256(path), path.stat().st_mtime_ns, path.stat().st_ino


def test_all_stages_succeed(first_run):
    _, ended = first_run
    assert statuses(ended) == SUCCESS, ended


def test_the_volume_has_every_file_of_the_three_stages_and_nothing_else(complete):
    files = {*contents(complete)}
    results = {name for name in files if name.startswith("results/")}
    assert files - results == set().union(*MADE_BY.values())
    assert len(results) == 5


def test_the_model_has_at_least_99_percent_accuracy_in_the_examples_network_too(complete, data):
    images, labels = example.read_test_images(data)
    predicted = example.predict(example.load(complete / "mnist_cnn.pt"), images).argmax(1)
    accuracy = (predicted == labels).sum().item() / 100
    assert accuracy >= 99
    # An image or three may be on the edge.
    assert read_json(complete / "eval_results.json")["Accuracy"] == pytest.approx(accuracy, abs=0.03)


def test_the_command_that_infer_prints_last_copies_everything_out(first_run, volume, tmp_path):
    command = first_run[1]["infer"].stdout.splitlines()[-1].rpartition(": ")[2]
    with Pipeline(volume) as without_containers:  # as after `run --rm --no-deps infer`
        for project in (first_run[0], without_containers):
            folder = tmp_path / project.name
            folder.mkdir()
            (folder / "changes.json").write_text(json.dumps(project.override))
            files = {"COMPOSE_PROJECT_NAME": project.name, "COMPOSE_FILE": f"{COMPOSE_FILE}:changes.json"}
            subprocess.run(command, shell=True, cwd=folder, env=os.environ | files, capture_output=True, check=True)
            assert contents(folder / "out") == contents(volume)


def test_the_pipeline_again_runs_one_stage_after_the_other_trains_nothing_and_leaves_five_pictures(volume):
    before = identity(volume / "mnist_cnn.pt")
    with Pipeline(volume) as project:
        for _ in range(2):
            ended = project.up()
            assert statuses(ended) == SUCCESS
            assert ended["train"].seconds < 1
            assert ended["train"].ended <= ended["evaluate"].began
            assert ended["evaluate"].ended <= ended["infer"].began
            assert len([*(volume / "results").iterdir()]) == 5
    assert identity(volume / "mnist_cnn.pt") == before


def test_infer_reads_a_heic(volume, data, tmp_path):
    folder = shutil.copytree(data / "MNIST", tmp_path / "data" / "MNIST").parent
    image = Image.fromarray(255 - example.read_test_images(data)[0][0].numpy()).resize((280, 280))
    image.save(folder / "photo.png")
    pillow_heif.from_pillow(image).save(folder / "photo.heic", quality=90)
    with Pipeline(volume, folder) as project:
        words = ("run", "--rm", "-T", "--no-deps", "infer", "photo.png", "photo.heic")
        assert_succeeds(project.compose(*words))
    one, other = read_json(volume / "own" / "predictions.json")["predictions"]
    assert one["prediction"] == other["prediction"] == 7
    assert one["probabilities"] == pytest.approx(other["probabilities"], abs=0.02)
