"""deploy/train.sbatch on a real Slurm, a controller and two nodes in containers. Long tests are in slurm_faults.py."""

import time

from slurm import FLAGS, assert_finished, start_training

from stages import results


def test_a_refused_job_cancels_those_that_follow_and_a_cancelled_one_is_resumed_by_the_same_command(cluster):
    cluster.submit(flags=("--lr", "0"))  # which train refuses: the others do not start
    states = {name: job["JobState"] for name, job in cluster.end().items()}
    assert states == {"mnist-train": "FAILED", "mnist-evaluate": "CANCELLED", "mnist-infer": "CANCELLED"}
    assert not cluster.model.exists()
    # One that is cancelled saves a checkpoint, and the same command resumes to an evaluated model.
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
