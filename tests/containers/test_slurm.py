"""deploy/train.sbatch on a real Slurm, a controller and two nodes in containers. Long tests are in slurm_faults.py."""

import time

from slurm import FLAGS, assert_finished, start_training

from stages import results


def test_a_job_that_is_cancelled_saves_a_checkpoint_and_the_same_command_resumes_to_an_evaluated_model(cluster):
    run, asked = start_training(cluster), time.time()
    cluster.command("scancel", "--name=mnist-train")
    assert {job["JobState"] for job in cluster.end().values()} == {"CANCELLED"}
    assert (cluster.model / "checkpoint.pt").stat().st_mtime > asked
    assert not (cluster.model / "mnist_cnn.pt").exists()
    cluster.submit("--partition=other", flags=FLAGS)  # which is not the default
    jobs = cluster.end()
    assert {job["Partition"] for job in jobs.values()} == {"other"}
    assert_finished(cluster, jobs, run)
    assert results(cluster.model)["nodes"] == 2


def test_a_job_whose_training_is_refused_fails_and_the_others_do_not_start(cluster):
    cluster.submit(flags=("--lr", "0"))
    states = {name: job["JobState"] for name, job in cluster.end().items()}
    assert states == {"mnist-train": "FAILED", "mnist-evaluate": "CANCELLED", "mnist-infer": "CANCELLED"}
    assert not cluster.model.exists()
