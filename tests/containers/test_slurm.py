"""deploy/train.sbatch on a real Slurm: a controller and two nodes in containers."""

import time

import pytest
import slurm
from pipeline import docker
from stages import assert_whole, batches_saved, images_trained_on, read_json, results, wait_until

FLAGS = ("--epochs", "2", "--num-processes", "1")  # two nodes of one core


@pytest.fixture(scope="module")
def image(first_run):
    slurm.build()
    yield
    docker("image", "rm", "--force", slurm.IMAGE)


@pytest.fixture
def cluster(image, tmp_path):
    with slurm.Cluster(tmp_path) as cluster:
        yield cluster


def start_training(cluster, *options, flags=FLAGS):
    """Submits a training; its job, once there is a checkpoint of the middle."""
    job = cluster.submit(*options, flags=flags)
    wait_until(lambda: batches_saved(cluster.model) > 0, "a checkpoint")
    return job


def assert_all_completed(jobs):
    """The training and the two jobs that follow it were successful."""
    states = {name: job["JobState"] for name, job in jobs.items()}
    assert states == dict.fromkeys(["mnist-train", "mnist-evaluate", "mnist-infer"], "COMPLETED")


def assert_evaluated(model, epochs=2):
    """The folder has a finished model that is evaluated and used."""
    assert_whole(model)
    assert results(model)["finished"]
    assert images_trained_on(model) == epochs * 55_000
    assert read_json(model / "eval_results.json")["Accuracy"] > 95
    assert len([*(model / "results").iterdir()]) == 5


def test_a_job_that_is_cancelled_saves_a_checkpoint_and_the_same_command_resumes_to_an_evaluated_model(cluster):
    job = start_training(cluster)
    asked = time.time()
    cluster.run("scancel", job)
    assert {job["JobState"] for job in cluster.end().values()} == {"CANCELLED"}
    assert (cluster.model / "checkpoint.pt").stat().st_mtime > asked
    assert not (cluster.model / "mnist_cnn.pt").exists()
    run = results(cluster.model)["run"]
    cluster.submit(flags=FLAGS)
    assert_all_completed(cluster.end())
    assert_evaluated(cluster.model)
    assert results(cluster.model)["run"] == run


def put_down(cluster):
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")


def kill(cluster):
    docker("kill", f"{cluster.name}-n2-1")


@pytest.mark.long
@pytest.mark.parametrize("lose_node", [put_down, kill])
def test_a_job_that_loses_a_node_starts_again_on_the_other_and_finishes(cluster, lose_node):
    start_training(cluster)
    run = results(cluster.model)["run"]
    lose_node(cluster)
    jobs = cluster.end()
    assert_all_completed(jobs)
    assert (jobs["mnist-train"]["Restarts"], jobs["mnist-train"]["NodeList"]) == ("1", "n1")
    assert cluster.states()["n2"] == "DOWN"
    assert_evaluated(cluster.model)
    assert results(cluster.model)["run"] == run


@pytest.mark.long
def test_a_job_that_reaches_its_time_limit_goes_back_to_the_queue_until_it_is_finished(cluster):
    start_training(cluster, "--time=2", flags=("--epochs", "40", "--num-processes", "1"))
    jobs = cluster.end(seconds=400)
    assert_all_completed(jobs)
    assert int(jobs["mnist-train"]["Restarts"]) >= 1
    assert_evaluated(cluster.model, epochs=40)


def test_a_job_whose_training_is_refused_fails_and_the_others_do_not_start(cluster):
    cluster.submit(flags=("--lr", "0"))
    states = {name: job["JobState"] for name, job in cluster.end().items()}
    assert states == {"mnist-train": "FAILED", "mnist-evaluate": "CANCELLED", "mnist-infer": "CANCELLED"}
    assert not cluster.model.exists()
