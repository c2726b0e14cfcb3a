"""What Slurm does with the job of deploy/train.sbatch when it loses a node, and when it comes close to its time limit.

make cluster-test FLAGS="-k job"
"""

import pytest
from slurm import ONE_CORE, assert_finished, start_training

from pipeline import docker
from stages import batches_saved, results, wait_until


def put_down(cluster):
    cluster.command("scontrol", "update", "nodename=n2", "state=down", "reason=test")


def kill(cluster):
    docker("kill", f"{cluster.name}-n2-1")


@pytest.mark.parametrize("lose_node", [put_down, kill])
def test_a_job_that_loses_a_node_starts_again_on_the_other_and_finishes(cluster, lose_node):
    run = start_training(cluster)
    lose_node(cluster)
    jobs = cluster.end()
    assert (jobs["mnist-train"]["Restarts"], jobs["mnist-train"]["NodeList"]) == ("1", "n1")
    assert cluster.states()["n2"] == "DOWN"
    assert_finished(cluster, jobs, run)
    assert results(cluster.model)["nodes"] == 1


def test_a_job_that_comes_close_to_its_time_limit_goes_back_to_the_queue_and_resumes(cluster):
    run = start_training(cluster, "--time=2", flags=("--epochs", "1000", *ONE_CORE))
    wait_until(lambda: cluster.jobs()["mnist-train"]["Restarts"] == "1", "the queue")
    saved = batches_saved(cluster.model)
    wait_until(lambda: batches_saved(cluster.model) > saved, "a new checkpoint")
    assert results(cluster.model)["run"] == run
