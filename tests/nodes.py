"""Two nodes that train together: as processes of this machine, and as containers of deploy/compose.cluster.yml."""

import contextlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import stages
from pipeline import COMPOSE_FILE, Pipeline, image
from stages import TREE

CLUSTER_FILE = TREE / "deploy" / "compose.cluster.yml"
SMALL = ("--epochs", "1", "--batch-size", "500", "--num-processes", "1")  # flags for a training that takes little time


def command(*flags, model, port=None, data=stages.DATA, tree=TREE):
    """The command line of one of two nodes on this machine; flags can be those of launch.py and of train."""
    endpoint = ["--rdzv-endpoint", f"127.0.0.1:{port or stages.free_port()}"]
    program = [sys.executable, str(tree / "model-train/cluster/launch.py"), *endpoint]
    where = ["--data", str(data), "--model", str(model)]
    return [*program, "--nnodes", "2", "--local-addr", "127.0.0.1", *where, *flags]


@contextlib.contextmanager
def running(*commands, **env):
    """Starts a process for each command, as stages.running() does."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(stages.running(words, **env)) for words in commands]


def finish(processes):
    """Waits for the end of all processes, and returns what came of each."""
    with ThreadPoolExecutor() as pool:
        return [*pool.map(stages.finish, processes)]


def run(*commands, **env):
    """Runs all commands at once to their ends, and returns what came of each."""
    with running(*commands, **env) as processes:
        return finish(processes)


def digests(ends):
    """The sha256 of the parameters that each node says it has after the last averaging, by rank."""
    return dict(re.findall(r"node (\d) of \d: .* sha256 (\w{64})", "".join(end.stdout for end in ends)))


class Cluster(Pipeline):
    """The services of both compose files: train and train-2 are nodes, which get the flags of train in `flags`."""

    files = (COMPOSE_FILE, CLUSTER_FILE)
    nodes = ("train", "train-2")

    def __init__(self, volume=None, flags=(), environment=None, **changes):
        environment = {"MNIST_TRAIN_FLAGS": " ".join(map(str, flags))} | (environment or {})
        super().__init__(volume, environment=environment, **changes)
        self.override["services"]["train-2"] = {"image": image("train")} | changes.get("train-2", {})

    def start_nodes(self, *names):
        """Starts the nodes that are named, or both, and returns their containers."""
        names = names or self.nodes
        started = self.compose("up", "--no-build", "--no-deps", "--detach", *names)
        assert started.returncode == 0, started.stderr
        return [self.container(name) for name in names]

    def end_nodes(self, seconds=240):
        """Waits for the end of both nodes, and returns how they ended."""
        return [self.container(name).end(seconds) for name in self.nodes]


def wait_until_they_train(containers):
    """Waits until one of the nodes, which is node 0 then, has finished an epoch."""
    stages.wait_until(lambda: any("epoch 1 of" in container.logs() for container in containers), "the first epoch")


def by_rank(containers):
    """The containers ordered by rank: node 0 says what it does, the other one does not."""
    return sorted(containers, key=lambda container: "epoch 1 of" not in container.logs())
