"""A Slurm cluster in containers: a controller and two nodes, on a network of their own, that share a checkout."""

import json
import re
import shutil
import uuid

from pipeline import PREFIX, docker, image, output_of
from stages import DATA, FOLDERS, SECONDS, TREE, wait_until

IMAGE = f"{PREFIX}-slurm"
NODES = ["n1", "n2"]
CHECKOUT = "/checkout"


def build():
    """Builds the image of the nodes on top of that of train."""
    dockerfile = (TREE / "tests/containers/Dockerfile.slurm").read_text()
    options = ("--quiet", "--tag", IMAGE, "--build-arg", f"TRAIN_IMAGE={image('train')}")
    output_of("build", *options, "-", input=dockerfile, timeout=300)


class Cluster:
    """A cluster for a block. Its nodes share a new folder with a checkout of the tree, where its jobs write to `model`.

    Jobs are those of the user who owns the data.
    """

    def __init__(self, folder):
        self.name, self.model, self.user = f"{PREFIX}-{uuid.uuid4().hex[:6]}", folder / "model", DATA.stat().st_uid
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
        self.services = {
            name: common | {"hostname": name, "command": [daemon, "-D"]} for name, daemon in daemons.items()
        }

    def __enter__(self):
        started = self.compose("up", "--detach")
        if started.returncode:
            raise RuntimeError(started.stderr)
        wait_until(lambda: self.states() == dict.fromkeys(NODES, "IDLE"), "two idle nodes")
        return self

    def __exit__(self, *_):
        self.compose("down", "--timeout", "0")

    def compose(self, *words):
        """Runs a Compose command on the three containers."""
        options = ("--progress", "quiet", "--project-name", self.name, "--file", "-")
        return docker("compose", *options, *words, input=json.dumps({"services": self.services}))

    def run(self, *words):
        """Runs a command of Slurm in the checkout as the user, and returns what it prints."""
        options = ("--user", self.user, "--workdir", CHECKOUT, "--env", "PYTHON=python")
        return output_of("exec", *options, f"{self.name}-control-1", *words)

    def states(self):
        """The state of each node."""
        return dict(
            re.findall(r"NodeName=(\w+) .* State=([A-Z]+)", self.run("scontrol", "show", "nodes", "--oneliner"))
        )

    def submit(self, *options, flags=()):
        """Submits deploy/train.sbatch with flags of train, and returns the id of the job."""
        return self.run("sbatch", "--parsable", *options, "deploy/train.sbatch", *flags).strip()

    def jobs(self):
        """What Slurm says of each job, by the job's name: of several with one name, of the last."""
        lines = self.run("scontrol", "show", "jobs", "--oneliner").splitlines()
        jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
        return {job["JobName"]: job for job in jobs}

    def end(self, seconds=SECONDS):
        """Waits until no job waits, runs or is being ended, and returns what Slurm says of them."""
        wait_until(lambda: not self.run("squeue", "--noheader"), "the end of all jobs", seconds)
        return self.jobs()
