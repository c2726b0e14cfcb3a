"""A Slurm cluster in containers: a controller and two nodes, on a network of their own, that share a checkout."""

import re
import shutil

import stages
from pipeline import PREFIX, Pipeline, docker, image, output_of
from stages import DATA, FOLDERS, TREE, batches_saved, images_trained_on, read_json, results, wait_until

IMAGE = f"{PREFIX}-slurm"
NODES = ["n1", "n2"]
CHECKOUT = "/checkout"
ONE_CORE = ("--num-processes", "1")
EPOCHS = 4  # enough for the training to be in the middle when there is the first checkpoint
FLAGS = ("--epochs", str(EPOCHS), *ONE_CORE)


class Cluster(Pipeline):
    """A cluster for a block. Its nodes share a new folder with a checkout of the tree, where its jobs write to `model`.

    Jobs are those of the user who owns the data.
    """

    files = ()

    def __init__(self, folder):
        super().__init__()
        self.model, self.user = folder / "model", DATA.stat().st_uid
        for name in ("deploy", *FOLDERS.values()):
            shutil.copytree(TREE / name, folder / name)
        folder.chmod(0o777)
        common = {
            "image": IMAGE,
            "init": True,
            "environment": {"JOB_UID": self.user},
            "volumes": [f"{folder}:{CHECKOUT}", f"{DATA}:{CHECKOUT}/data:ro"],
        }
        daemons = {"control": "slurmctld"} | dict.fromkeys(NODES, "slurmd")
        services = {name: common | {"hostname": name, "command": [daemon, "-D"]} for name, daemon in daemons.items()}
        self.override = {"services": services}

    def start_daemons(self):
        """Builds the image on top of that of train, starts the containers, and waits until Slurm has both nodes."""
        dockerfile = (TREE / "tests/containers/Dockerfile.slurm").read_text()
        options = ("--quiet", "--tag", IMAGE, "--build-arg", f"TRAIN_IMAGE={image('train')}")
        output_of("build", *options, "-", input=dockerfile, timeout=300)
        started = self.compose("up", "--detach")
        assert started.returncode == 0, started.stderr
        wait_until(lambda: self.states() == dict.fromkeys(NODES, "IDLE"), "two idle nodes")

    def execute(self, *words):
        """Runs a command in the checkout, on the controller, as the user; what came of it."""
        options = ("--user", self.user, "--workdir", CHECKOUT, "--env", "PYTHON=python")
        return docker("exec", *options, f"{self.name}-control-1", *words)

    def command(self, *words):
        """Runs a command likewise, and returns what it prints; it must succeed."""
        done = self.execute(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def states(self):
        """The state of each node that Slurm has; of none before its controller runs."""
        shown = self.execute("scontrol", "show", "nodes", "--oneliner").stdout
        return dict(re.findall(r"NodeName=(\w+) .* State=([A-Z]+)", shown))

    def submit(self, *options, flags=()):
        """Submits deploy/train.sbatch, with options of sbatch and flags of train."""
        self.command("sbatch", *options, "deploy/train.sbatch", *flags)

    def jobs(self):
        """What Slurm says of each job, by the job's name: of several with one name, of the last."""
        lines = self.command("scontrol", "show", "jobs", "--oneliner").splitlines()
        jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
        return {job["JobName"]: job for job in jobs}

    def end(self):
        """Waits until no job waits, runs or is being ended, and returns what Slurm says of them."""
        self.command("sh", "-c", 'while [ "$(squeue --noheader)" ]; do sleep 0.2; done')
        return self.jobs()


def start_training(cluster, *options, flags=FLAGS):
    """Submits a training; once two nodes have made a checkpoint, returns the run that is in the volume."""
    cluster.submit(*options, flags=flags)
    wait_until(lambda: batches_saved(cluster.model) > 0, "a checkpoint")
    assert results(cluster.model)["nodes"] == 2
    return results(cluster.model)["run"]


def assert_finished(cluster, jobs, run):
    """The training of a run and the two jobs that follow were successful, and have left an evaluated model."""
    states = {name: job["JobState"] for name, job in jobs.items()}
    assert states == dict.fromkeys(["mnist-train", "mnist-evaluate", "mnist-infer"], "COMPLETED")
    stages.assert_whole(cluster.model)
    assert results(cluster.model)["finished"]
    assert results(cluster.model)["run"] == run
    assert images_trained_on(cluster.model) == EPOCHS * 55_000
    assert read_json(cluster.model / "eval_results.json")["Accuracy"] > 95
    assert len([*(cluster.model / "results").iterdir()]) == 5
