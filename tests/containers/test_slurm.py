"""deploy/train.sbatch on a real Slurm: a controller and two nodes in containers."""

import time

import pytest
import slurm
from pipeline import docker
from stages import assert_whole, batches_saved, images_trained_on, read_json, results, wait_until

ONE_CORE = ("--num-processes", "1")
FLAGS = ("--epochs", "2", *ONE_CORE)


@pytest.fixture(scope="module")
def image(first_run):
    slurm.build()
    yield
    docker("image", "rm", "--force", slurm.IMAGE)


@pytest.fixture
def cluster(image, tmp_path):
    with slurm.Cluster(tmp_path) as cluster:
        cluster.start()
        yield cluster


def start_training(cluster, *options, flags=FLAGS):
    """Submits a training; once two nodes have made a checkpoint, returns the run that is in the volume."""
    cluster.submit(*options, flags=flags)
    wait_until(lambda: batches_saved(cluster.model) > 0, "a checkpoint")
    assert cluster.jobs()["mnist-train"]["NumNodes"] == "2"
    return results(cluster.model)["run"]


def assert_finished(cluster, jobs, run):
    """The training of a run and the two jobs that follow were successful, and have left an evaluated model."""
    states = {name: job["JobState"] for name, job in jobs.items()}
    assert states == dict.fromkeys(["mnist-train", "mnist-evaluate", "mnist-infer"], "COMPLETED")
    assert_whole(cluster.model)
    assert results(cluster.model)["finished"]
    assert results(cluster.model)["run"] == run
    assert images_trained_on(cluster.model) == 2 * 55_000
    assert read_json(cluster.model / "eval_results.json")["Accuracy"] > 95
    assert len([*(cluster.model / "results").iterdir()]) == 5


def test_a_job_that_is_cancelled_saves_a_checkpoint_and_the_same_command_resumes_to_an_evaluated_model(cluster):
    run, asked = start_training(cluster), time.time()
    cluster.run("scancel", "--name=mnist-train")
    assert {job["JobState"] for job in cluster.end().values()} == {"CANCELLED"}
    assert (cluster.model / "checkpoint.pt").stat().st_mtime > asked
    assert not (cluster.model / "mnist_cnn.pt").exists()
    cluster.submit(flags=FLAGS)
    jobs = cluster.end()
    assert jobs["mnist-train"]["NodeList"] == "n[1-2]"
    assert_finished(cluster, jobs, run)


def test_a_job_whose_training_is_refused_fails_and_the_others_do_not_start(cluster):
    cluster.submit(flags=("--lr", "0"))
    states = {name: job["JobState"] for name, job in cluster.end().items()}
    assert states == {"mnist-train": "FAILED", "mnist-evaluate": "CANCELLED", "mnist-infer": "CANCELLED"}
    assert not cluster.model.exists()


def put_down(cluster):
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")


def kill(cluster):
    docker("kill", f"{cluster.name}-n2-1")


@pytest.mark.long
@pytest.mark.parametrize("lose_node", [put_down, kill])
def test_a_job_that_loses_a_node_starts_again_on_the_other_and_finishes(cluster, lose_node):
    run = start_training(cluster)
    lose_node(cluster)
    jobs = cluster.end()
    assert (jobs["mnist-train"]["Restarts"], jobs["mnist-train"]["NodeList"]) == ("1", "n1")
    assert cluster.states()["n2"] == "DOWN"
    assert_finished(cluster, jobs, run)


@pytest.mark.long
def test_a_job_that_comes_close_to_its_time_limit_goes_back_to_the_queue_and_resumes(cluster):
    run = start_training(cluster, "--time=2", flags=("--epochs", "1000", *ONE_CORE))
    wait_until(lambda: cluster.jobs()["mnist-train"]["Restarts"] == "1", "the queue")
    saved = batches_saved(cluster.model)
    wait_until(lambda: batches_saved(cluster.model) > saved, "a new checkpoint")
    assert results(cluster.model)["run"] == run
