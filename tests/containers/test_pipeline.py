"""What one run of the README's main command leaves: containers, order, files, figures, images, rights."""

import json
import os
import shlex
import subprocess

import compose
import example
import pytest
import stages
import torch
from PIL import Image

LARGEST_IMAGE, REAL_BASE = 850e6, 125e6

# In the place of a stage's program, this says what rights the program would have.
PROBE = """
import json, os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
status = {key: value.split() for key, value in status.items()}
mounts = ("/", "/opt/mount/data", "/opt/mount/model")
read_only = {path: bool(os.statvfs(path).f_flag & os.ST_RDONLY) for path in mounts}
networks = os.listdir("/sys/class/net")
print(json.dumps({"status": status, "networks": networks, "read_only": read_only, "flags": sys.argv[1:]}))
"""


def test_all_three_containers_end_well(pipeline):
    states = {stage: container["State"] for stage, container in pipeline.containers.items()}
    assert compose.exit_codes(states) == {"train": 0, "evaluate": 0, "infer": 0}, pipeline.logs


def test_every_stage_starts_after_the_one_before_it_has_ended(pipeline):
    compose.assert_in_order({stage: container["State"] for stage, container in pipeline.containers.items()})


def test_every_container_is_of_the_image_that_was_built_for_it(pipeline):
    for stage, container in pipeline.containers.items():
        assert container["Image"] == compose.inspect(pipeline.image(stage))[0]["Id"]


# The volume -----------------------------------------------------------------------------------------------------------


def test_the_volume_has_every_file_of_the_table_and_nothing_else(pipeline):
    files = {*stages.contents(pipeline.volume)}
    results = {name for name in files if name.startswith("results/")}
    assert files - results == set().union(*stages.MADE_BY.values())
    assert len(results) == 5


def test_every_file_of_the_volume_can_be_read_by_everybody(pipeline):
    modes = {path.name: path.stat().st_mode & 0o777 for path in pipeline.volume.rglob("*") if path.is_file()}
    assert {*modes.values()} == {0o644}, modes
    assert (pipeline.volume / "results").stat().st_mode & 0o555 == 0o555


def test_at_least_99_percent_of_the_test_images_are_read_right(pipeline):
    results = stages.read_json(pipeline.volume / "eval_results.json")
    assert results["Accuracy"] >= 99.0
    assert 0 < results["Test loss"] < 0.05


def test_the_examples_network_gets_the_same_results_out_of_the_model(pipeline, data):
    images, labels = example.read_test_images(data)
    log_probabilities = example.read_digits(example.load(pipeline.volume / "mnist_cnn.pt"), images)
    reads = log_probabilities.argmax(1)
    results = stages.read_json(pipeline.volume / "eval_results.json")
    loss = torch.nn.functional.nll_loss(log_probabilities, labels).item()
    assert results["Test loss"] == pytest.approx(loss, rel=1e-2)
    assert results["Accuracy"] == pytest.approx((reads == labels).sum().item() / 100, abs=0.03)
    matrix = torch.tensor(results["confusion_matrix"])
    expected = torch.stack([torch.bincount(reads[labels == digit], minlength=10) for digit in range(10)])
    assert (matrix - expected).abs().sum() <= 6  # an image or three may be on the edge
    assert [digit["count"] for digit in results["digits"]] == matrix.sum(1).tolist() == expected.sum(1).tolist()


def test_all_results_name_the_model_that_is_there(pipeline):
    sha256 = stages.sha256(pipeline.volume / "mnist_cnn.pt")
    for name in ("train_results.json", "eval_results.json", "predictions.json"):
        assert stages.read_json(pipeline.volume / name)["model_sha256"] == sha256


def test_the_model_is_the_one_that_the_workers_left_when_they_had_finished(pipeline):
    model = torch.load(pipeline.volume / "mnist_cnn.pt", weights_only=True)
    last = torch.load(pipeline.volume / "checkpoint.pt", weights_only=True)["model"]
    assert all(model[key].equal(last[key]) for key in model)


def test_the_training_was_one_pass_an_epoch_by_two_workers_over_the_images_not_held_out(pipeline):
    results = stages.read_json(pipeline.volume / "train_results.json")
    assert results["finished"] is True
    assert len(results["workers"]) == 2
    assert len(results["history"]) == results["settings"]["epochs"]
    assert sum(worker["images"] for worker in results["workers"]) == 55_000 * results["settings"]["epochs"]
    assert all(worker["images"] > 0 for worker in results["workers"])


def test_the_pictures_are_named_as_the_predictions_say(pipeline):
    predictions = stages.read_json(pipeline.volume / "predictions.json")["predictions"]
    names = {f"{sample['prediction']}_{sample['index']}.png" for sample in predictions}
    assert stages.pictures(pipeline.volume) == names


def test_the_predictions_are_those_of_the_examples_network(pipeline, data):
    images, labels = example.read_test_images(data)
    model = example.load(pipeline.volume / "mnist_cnn.pt")
    for sample in stages.read_json(pipeline.volume / "predictions.json")["predictions"]:
        index = sample["index"]
        expected = example.read_digits(model, images[index : index + 1]).exp()[0]
        torch.testing.assert_close(torch.tensor(sample["probabilities"]), expected, atol=1e-3, rtol=1e-2)
        assert sample["probabilities"][sample["prediction"]] == max(sample["probabilities"])
        assert sample["truth"] == labels[index]


def test_every_picture_can_be_looked_at(pipeline):
    paths = [*pipeline.volume.rglob("*.png")]
    assert len(paths) == 9
    for path in paths:
        picture = Image.open(path).convert("RGB")
        assert min(picture.size) > 200, path
        assert len(picture.getcolors(10**6)) > 10, path


def test_the_command_that_infer_prints_last_copies_everything_out(pipeline, tmp_path):
    command = shlex.split(pipeline.logs["infer"].splitlines()[-1].rpartition(": ")[2])
    assert command[:3] == ["docker", "compose", "cp"]
    environment = os.environ | {
        "COMPOSE_PROJECT_NAME": pipeline.project.name,
        "COMPOSE_FILE": str(stages.TREE / "docker-compose.yml"),
    }
    copied = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert copied.returncode == 0, copied.stderr
    assert stages.contents(tmp_path / command[-1]) == stages.contents(pipeline.volume)


# The images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", stages.STAGES)
def test_the_image_has_the_programs_of_the_tree_and_the_net_py_of_all(pipeline, stage):
    sums = compose.docker("run", "--rm", "--entrypoint", "sh", pipeline.image(stage), "-c", "sha256sum /opt/app/*.py")
    found = {path.rpartition("/")[2]: sha256 for sha256, path in (line.split() for line in sums.splitlines())}
    expected = {path.name: stages.sha256(path) for path in (stages.TREE / stages.FOLDERS[stage]).glob("*.py")}
    assert found == expected
    assert found["net.py"] == stages.sha256(stages.TREE / "model-train" / "net.py")


def test_the_three_images_store_the_layers_with_torch_once(pipeline):
    layers = [compose.inspect(pipeline.image(stage))[0]["RootFS"]["Layers"] for stage in stages.STAGES]
    below_the_programs = [own[:-1] for own in layers]
    assert below_the_programs[0] == below_the_programs[1] == below_the_programs[2]
    assert len({own[-1] for own in layers}) == 3


@pytest.mark.parametrize("stage", stages.STAGES)
def test_no_image_is_larger_than_850_mb_on_the_real_base(pipeline, stage):
    size = compose.inspect(pipeline.image(stage))[0]["Size"]
    # A stand-in for the base image, which has wheels in it, does not have the real one's size.
    probe = "import os; print(os.path.isdir('/opt/wheels'))"
    if "True" in compose.docker("run", "--rm", "--entrypoint", "python", pipeline.image(stage), "-c", probe):
        size += REAL_BASE - compose.inspect(compose.BASE_IMAGE)[0]["Size"]
    assert size <= LARGEST_IMAGE


# Rights ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=stages.STAGES)
def rights(request, pipeline, tmp_path_factory):
    """The rights that a stage's program has in its container, and the name of the stage."""
    stage = request.param
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.py").write_text(PROBE)
    folder.chmod(0o755)
    mount = f"{folder / 'probe.py'}:/opt/app/{stage}.py:ro"
    said = pipeline.project("run", "--rm", "-T", "--no-deps", "--volume", mount, stage, "--a-flag", "of two words")
    return stage, json.loads(said.stdout)


def test_a_stage_runs_as_the_owner_of_the_data_folder(rights):
    owner = stages.DATA.stat()
    assert {*rights[1]["status"]["Uid"]} == {str(owner.st_uid)}
    assert {*rights[1]["status"]["Gid"]} == {str(owner.st_gid)}
    assert {*rights[1]["status"]["Groups"]} <= {str(owner.st_gid)}


def test_a_stage_has_no_capability_and_can_get_none(rights):
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(rights[1]["status"][kind][0], 16) == 0, kind
    assert rights[1]["status"]["NoNewPrivs"] == ["1"]


def test_a_stage_can_write_only_where_its_files_go(rights):
    stage, found = rights
    assert found["read_only"] == {"/": True, "/opt/mount/data": stage != "train", "/opt/mount/model": False}


def test_only_evaluate_has_no_network(rights):
    stage, found = rights
    assert (found["networks"] == ["lo"]) == (stage == "evaluate")


def test_flags_reach_the_program_as_they_were_given(rights):
    assert rights[1]["flags"] == ["--a-flag", "of two words"]


def test_torchvision_can_be_imported_where_only_memory_can_be_written_to(pipeline):
    # Train imports it only to fetch the data, which no other test does: none has the mirrors at hand.
    said = pipeline.project(
        *("run", "--rm", "-T", "--no-deps", "--entrypoint", "python", "train"), "-c", "import torchvision.datasets"
    )
    assert said.returncode == 0, said.stderr
