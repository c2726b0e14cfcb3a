"""What happens to a node or to the network while two nodes train, and how long the other node takes to go on or to end.

make cluster-test                       # each test prints its figures
make cluster-test FLAGS="-k network"
"""

import re
import shutil
import threading
import time
from signal import SIGKILL, SIGTERM

import pytest

import nodes
import stages
from nodes import Cluster
from pipeline import DATA_FOLDER, statuses

LONG = ("--epochs", "200", "--num-processes", "1")  # flags for a training that is still going on after the fault
APP = "/opt/app"

# Takes a container's network interface down for some seconds, as if the cable had been pulled.
CUT = """mount -o remount,rw /sys && cd /sys/class/net/eth0 && read flags <flags
echo $((flags & ~1)) >flags && sleep SECONDS && echo $flags >flags"""
# Kills a Hogwild worker of a node: a process whose parent has the same command, that of torchrun's children.
KILL_WORKER = r"""for pid in $(grep -l '[s]pawn_main' /proc/[0-9]*/cmdline | cut -d/ -f3); do
  grep -q '[s]pawn_main' "/proc/$(sed -n 's/^PPid:\s*//p' /proc/$pid/status)/cmdline" && exec kill -9 $pid
done; exit 1"""


@pytest.fixture
def report(capsys):
    """A function that prints a figure at once."""

    def say(text):
        with capsys.disabled():
            print(f"\n  {text}", end="")

    return say


@pytest.fixture
def volume(tmp_path):
    return tmp_path / "volume"


@pytest.fixture
def two(volume):
    """Two nodes that train for long: the project, the containers of train, which has the rendezvous, and train-2."""
    with Cluster(volume, LONG) as project:
        containers = project.start_nodes()
        nodes.wait_until_they_train(containers)
        stages.wait_until(lambda: stages.batches_saved(volume), "a checkpoint")  # without one, they would start again
        yield project, *containers


def seconds_until(condition, what):
    """Waits for a condition; returns the seconds that took."""
    began = time.monotonic()
    stages.wait_until(condition, what)
    return time.monotonic() - began


def seconds_until_progress(volume):
    """Waits until a new checkpoint has more batches than the one there is; returns the seconds that took."""
    before = stages.batches_saved(volume)
    return seconds_until(lambda: stages.batches_saved(volume) > before, "progress")


def starts(*containers):
    """What nodes said that they do each time that one was node 0: such as ("resuming", "2"), on so many nodes."""
    logs = "".join(container.logs() for container in containers)
    return re.findall(r"train: (starting|resuming).* on (\d) nodes?", logs)


def seconds_until_start(what, count, *containers):
    """Waits until a node has said that it is starting or resuming on a number of nodes."""
    return seconds_until(lambda: (what, str(count)) in starts(*containers), f"{what} on {count} nodes")


def is_running(container):
    return container.state()["Status"] == "running"


def run_inside(container, script):
    done = container.inside(script)
    assert done.returncode == 0, done.stderr


def test_a_killed_node_leaves_the_other_to_go_on_alone_and_joins_when_it_comes_back(two, volume, report):
    project, train, other = two
    other.send(SIGKILL)
    taken = seconds_until_start("resuming", 1, train)
    report(f"node killed: the other went on alone after {taken:.1f} s")
    assert taken < 60
    seconds_until_progress(volume)
    (other,) = project.start_nodes("train-2")
    report(f"node started again: both trained after {seconds_until_start('resuming', 2, train, other):.1f} s")
    seconds_until_progress(volume)
    assert is_running(train)


def test_a_node_that_is_stopped_leaves_a_checkpoint_and_the_other_goes_on(two, volume, report):
    _, train, other = two
    before = stages.batches_saved(volume)
    other.send(SIGTERM)
    assert other.end(20).returncode == 128 + SIGTERM
    assert stages.batches_saved(volume) > before
    report(f"node stopped: the other went on alone after {seconds_until_start('resuming', 1, train):.1f} s")
    seconds_until_progress(volume)


def test_the_loss_of_the_rendezvous_ends_the_other_node_in_one_clear_line_and_both_resume(two, volume, report):
    project, train, other = two
    killed = time.time()
    train.send(SIGKILL)
    ended = other.end(60)
    report(f"node with the rendezvous killed: the other ended after {ended.ended - killed:.1f} s")
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if "launch: cannot reach the rendezvous" in line]
    assert "Traceback" not in ended.stderr
    stages.assert_whole(volume)
    assert not (volume / "mnist_cnn.pt").exists()
    project.start_nodes()
    seconds_until_progress(volume)


def test_a_killed_worker_costs_nothing_but_its_time(volume, report):
    with Cluster(volume, ("--epochs", "12", "--num-processes", "2")) as project:
        containers = project.start_nodes()
        nodes.wait_until_they_train(containers)
        _, follower = nodes.by_rank(containers)
        run_inside(follower, KILL_WORKER)
        ends = project.end_nodes()
    assert [end.returncode for end in ends] == [0, 0], ends
    results = stages.results(volume)
    (lost,) = results["lost_workers"]
    report(f"worker of node 1 killed: recorded as {lost}")
    assert (lost["signal"], lost["rank"] >= 2) == (SIGKILL, True)
    assert stages.images_trained_on(volume) == 12 * 55_000


def test_the_only_worker_of_a_node_is_killed_and_all_nodes_go_on_from_the_checkpoint(two, volume, report):
    leader, follower = nodes.by_rank(two[1:])
    run_inside(follower, KILL_WORKER)
    taken = seconds_until_start("resuming", 2, leader, follower)
    report(f"only worker of node 1 killed: both went on after {taken:.1f} s")
    seconds_until_progress(volume)
    assert is_running(leader)


def test_a_network_that_is_cut_for_5_seconds_is_waited_for(two, volume, report):
    _, train, other = two
    before = starts(train, other)
    run_inside(other, CUT.replace("SECONDS", "5"))
    report(f"network cut for 5 s: progress {seconds_until_progress(volume):.1f} s after its end")
    assert starts(train, other) == before


def test_a_network_that_is_cut_for_60_seconds_loses_a_node_for_a_while_at_most(two, volume, report):
    _, train, other = two
    began = time.monotonic()
    cutting = threading.Thread(target=run_inside, args=(other, CUT.replace("SECONDS", "60")))
    cutting.start()
    seconds_until_start("resuming", 1, train)
    report(f"network cut for 60 s: the node with the rendezvous went on alone after {time.monotonic() - began:.1f} s")
    cutting.join()
    after = time.monotonic()

    def has_joined_or_ended():
        if ("resuming", "2") in starts(train, other):
            return "joined"
        return not is_running(other) and f"ended ({other.end().stderr.splitlines()[-1]})"

    outcome = stages.wait_until(has_joined_or_ended, "the end of the other node")
    report(f"the other one {outcome} {time.monotonic() - after:.1f} s after the cut")
    seconds_until_progress(volume)
    assert is_running(train)


def test_a_late_node_joins(volume, report):
    with Cluster(volume, LONG) as project:
        (train,) = project.start_nodes("train")
        report(f"one node alone: trained after {seconds_until_start('starting', 1, train):.1f} s")
        seconds_until_progress(volume)
        (other,) = project.start_nodes("train-2")
        report(f"late node: both trained after {seconds_until_start('resuming', 2, train, other):.1f} s")
        seconds_until_progress(volume)


def other_code(folder):
    """A node whose image has another program."""
    program = folder / "net.py"
    program.write_text((stages.TREE / "model-train" / "net.py").read_text() + "\n# another one\n")
    return {"volumes": [f"{program}:{APP}/net.py:ro"]}


def other_data(folder):
    """A node whose image is for other data, which it has."""
    shutil.copytree(stages.DATA / "MNIST", folder / "data" / "MNIST")
    labels = folder / "data" / stages.RAW / "t10k-labels-idx1-ubyte"
    sha256 = stages.sha256(labels)
    labels.write_bytes(labels.read_bytes()[:-1] + b"\0")
    program = folder / "dataset.py"
    text = (stages.TREE / "model-train/stage/dataset.py").read_text()
    program.write_text(text.replace(sha256, stages.sha256(labels)))
    return {"volumes": [f"{program}:{APP}/stage/dataset.py:ro", f"{folder / 'data'}:{DATA_FOLDER}"]}


def damaged_data(folder):
    """A node whose data is damaged, and cannot be downloaded."""
    shutil.copytree(stages.DATA / "MNIST", folder / "data" / "MNIST")
    (folder / "data" / stages.RAW / "train-labels-idx1-ubyte").write_bytes(b"")
    return {"volumes": [f"{folder / 'data'}:{DATA_FOLDER}"]}


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (other_code, ["programs", "net.py"]),
        (other_data, ["data", "t10k-labels"]),
        (damaged_data, ["train-labels-idx1-ubyte"]),
    ],
)
def test_a_node_that_differs_keeps_both_from_training(volume, tmp_path, report, make, names):
    with Cluster(volume, LONG, **{"train-2": make(tmp_path)}) as project:
        project.start_nodes()
        ends = dict(zip(project.nodes, project.end_nodes(120), strict=True))
    report(f"{make.__name__}: both ended after {max(end.seconds for end in ends.values()):.1f} s")
    assert 0 not in statuses(ends).values()
    for end in ends.values():
        (line,) = end.stderr.splitlines()
        assert all(name in line for name in names), line
    assert not (volume / "mnist_cnn.pt").exists()
