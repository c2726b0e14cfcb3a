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
from pipeline import DATA_FOLDER

LONG = ("--epochs", "200", "--num-processes", "1")  # flags for a training that is still going on after the fault

# Takes a container's network interface down for some seconds, as if the cable had been pulled.
CUT = """python -c '
import fcntl, socket, struct, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    found = fcntl.ioctl(any_socket, 0x8913, struct.pack("16sH14x", b"eth0", 0))  # SIOCGIFFLAGS
    _, flags = struct.unpack("16sH14x", found)
    for number, seconds in ((flags & ~1, SECONDS), (flags, 0)):  # without IFF_UP, and with it
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"eth0", number))  # SIOCSIFFLAGS
        time.sleep(seconds)'"""
# Kills a Hogwild worker of a node: a process whose parent has the same command, that of torchrun's children.
KILL_WORKER = r"""for pid in $(grep -l '[s]pawn_main' /proc/[0-9]*/cmdline | cut -d/ -f3); do
  grep -q '[s]pawn_main' "/proc/$(sed -n 's/^PPid:\s*//p' /proc/$pid/status)/cmdline" && kill -9 $pid && exit
done; exit 1"""


@pytest.fixture
def timed(capsys):
    """A function that waits for a condition, prints at once how many seconds that took, and returns them."""

    def wait(what, condition):
        began = time.monotonic()
        stages.wait_until(condition, what)
        seconds = time.monotonic() - began
        with capsys.disabled():
            print(f"\n  {what}: {seconds:.1f} s", end="")
        return seconds

    return wait


@pytest.fixture
def two(tmp_path):
    """Two nodes that train for long: the project, the containers of train, which has the rendezvous, and train-2."""
    with Cluster(tmp_path, LONG) as project:
        containers = project.start_nodes()
        nodes.wait_until_they_train(containers)
        stages.wait_until(lambda: stages.batches_saved(tmp_path), "a checkpoint")  # without one, they would start again
        yield project, *containers


def progresses(volume):
    """A condition: there is a checkpoint of more batches than now."""
    before = stages.batches_saved(volume)
    return lambda: stages.batches_saved(volume) > before


def starts(*containers):
    """What nodes said each time that one of them was node 0: such as ("resuming", "2"), on so many nodes."""
    logs = "".join(container.logs() for container in containers)
    return re.findall(r"train: (starting|resuming).* on (\d) nodes?", logs)


def resumes(count, *containers):
    """A condition: node 0 is one of the containers, and has resumed on a number of nodes."""
    return lambda: ("resuming", str(count)) in starts(*containers)


def is_running(container):
    return container.state()["Status"] == "running"


def run_inside(container, script):
    done = container.inside(script)
    assert done.returncode == 0, done.stderr


def test_a_killed_node_leaves_the_other_to_go_on_alone_and_joins_when_it_comes_back(two, tmp_path, timed):
    project, train, other = two
    other.send(SIGKILL)
    assert timed("node killed: the other goes on alone", resumes(1, train)) < 60
    stages.wait_until(progresses(tmp_path))
    project.start_nodes("train-2")
    timed("node started again: both train together", resumes(2, train, other))
    stages.wait_until(progresses(tmp_path))
    assert is_running(train)


def test_a_node_that_is_stopped_leaves_a_checkpoint_and_the_other_goes_on(two, tmp_path, timed):
    _, train, other = two
    before = stages.batches_saved(tmp_path)
    other.send(SIGTERM)
    assert other.end(20).returncode == 128 + SIGTERM
    assert stages.batches_saved(tmp_path) > before
    timed("node stopped: the other goes on alone", resumes(1, train))
    stages.wait_until(progresses(tmp_path))


def test_the_loss_of_the_rendezvous_ends_the_other_node_in_one_clear_line_and_both_resume(two, tmp_path, timed):
    project, train, other = two
    train.send(SIGKILL)
    assert timed("node with the rendezvous killed: the other ends", lambda: not is_running(other)) < 60
    ended = other.end()
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if "launch: cannot reach the rendezvous" in line]
    assert "Traceback" not in ended.stderr
    stages.assert_whole(tmp_path)
    assert not (tmp_path / "mnist_cnn.pt").exists()
    project.start_nodes()
    stages.wait_until(progresses(tmp_path))


def test_a_killed_worker_costs_nothing_but_its_time(tmp_path):
    with Cluster(tmp_path, ("--epochs", "12", "--num-processes", "2")) as project:
        containers = project.start_nodes()
        nodes.wait_until_they_train(containers)
        _, follower = nodes.by_rank(containers)
        run_inside(follower, KILL_WORKER)
        ends = project.end_nodes()
    assert [end.returncode for end in ends] == [0, 0], ends
    (lost,) = stages.results(tmp_path)["lost_workers"]
    assert (lost["signal"], lost["rank"] >= 2) == (SIGKILL, True)
    assert stages.images_trained_on(tmp_path) == 12 * 55_000


def test_the_only_worker_of_a_node_is_killed_and_all_nodes_go_on_from_the_checkpoint(two, tmp_path, timed):
    leader, follower = nodes.by_rank(two[1:])
    run_inside(follower, KILL_WORKER)
    timed("only worker of node 1 killed: both go on", resumes(2, leader, follower))
    stages.wait_until(progresses(tmp_path))
    assert is_running(leader)


def test_a_network_that_is_cut_for_5_seconds_is_waited_for(two, tmp_path, timed):
    _, train, other = two
    before = starts(train, other)
    run_inside(other, CUT.replace("SECONDS", "5"))
    timed("network cut for 5 s: progress after its end", progresses(tmp_path))
    assert starts(train, other) == before


def test_a_network_that_is_cut_for_60_seconds_loses_a_node_for_a_while_at_most(two, tmp_path, timed):
    _, train, other = two
    cutting = threading.Thread(target=run_inside, args=(other, CUT.replace("SECONDS", "60")))
    cutting.start()
    timed("network cut for 60 s: the node with the rendezvous goes on alone", resumes(1, train))
    cutting.join()
    joins = resumes(2, train, other)
    timed("the other one joins or ends, after the cut", lambda: joins() or not is_running(other))
    assert joins() or "cannot reach the rendezvous" in other.end().stderr
    stages.wait_until(progresses(tmp_path))
    assert is_running(train)


def test_a_late_node_joins(tmp_path, timed):
    with Cluster(tmp_path, LONG) as project:
        (train,) = project.start_nodes("train")
        timed("one node alone: it trains", lambda: ("starting", "1") in starts(train))
        stages.wait_until(progresses(tmp_path))
        (other,) = project.start_nodes("train-2")
        timed("late node: both train together", resumes(2, train, other))
        stages.wait_until(progresses(tmp_path))


def test_a_node_whose_data_is_damaged_keeps_both_from_training(tmp_path, timed):
    raw = shutil.copytree(stages.DATA / "MNIST", tmp_path / "data" / "MNIST") / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes(b"")  # and cannot be downloaded
    damaged = {"volumes": [f"{tmp_path / 'data'}:{DATA_FOLDER}"]}
    with Cluster(tmp_path / "volume", LONG, **{"train-2": damaged}) as project:
        containers = project.start_nodes()
        timed("damaged data: both end", lambda: not any(map(is_running, containers)))
        ends = [container.end() for container in containers]
    assert 0 not in [end.returncode for end in ends]
    for end in ends:
        (line,) = end.stderr.splitlines()
        assert "train-labels-idx1-ubyte" in line
    assert not (tmp_path / "volume" / "mnist_cnn.pt").exists()
