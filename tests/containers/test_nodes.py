"""Two nodes in containers, as deploy/compose.cluster.yml starts them. The long tests are in cluster_faults.py."""

from collections import defaultdict
from signal import SIGTERM

import pytest

import nodes
import stages
from nodes import Cluster
from pipeline import PREFIX, statuses

BATCHES = 115  # of an epoch, with batches of 480 images: an odd number


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory):
    """All services of both compose files, run to their ends: how they ended, the volume, and what the nodes did."""
    folder = tmp_path_factory.mktemp("two_nodes")
    volume, recorded = folder / "volume", folder / "recorded"
    recorded.mkdir()
    flags = ("--epochs", "2", "--batch-size", "480", "--num-processes", "1")
    with Cluster(volume, flags, recorded) as project:
        project.compose("up", "--no-build", seconds=300)
        ends = {name: project.container(name).end() for name in (*stages.STAGES, "train-2")}
    did = defaultdict(list)
    for host, what, which in (line.split() for line in (recorded / "log").read_text().splitlines()):
        did[host, what].append(which)
    return ends, volume, did


def test_one_command_trains_on_two_nodes_and_the_other_stages_use_the_model(trained_by_two):
    ends, volume, _ = trained_by_two
    assert statuses(ends) == dict.fromkeys((*stages.STAGES, "train-2"), 0)
    model = stages.sha256(volume / "mnist_cnn.pt")
    assert stages.results(volume)["model_sha256"] == model
    assert stages.read_json(volume / "eval_results.json")["model_sha256"] == model
    assert len([*(volume / "results").glob("*.png")]) == 5


def test_the_batches_of_the_nodes_are_disjoint_and_together_complete(trained_by_two):
    _, _, did = trained_by_two
    taken = [[int(number) for number in numbers] for (_, what), numbers in did.items() if what == "batch"]
    assert len(taken) == 2
    for epoch in range(2):
        shares = [[number for number in numbers if number // BATCHES == epoch] for numbers in taken]
        assert sorted(shares[0] + shares[1]) == [*range(epoch * BATCHES, (epoch + 1) * BATCHES)]
        assert abs(len(shares[0]) - len(shares[1])) == 1


def test_one_node_alone_writes_to_the_volume(trained_by_two):
    _, volume, did = trained_by_two
    writers = {host for host, what in did if what == "file"}
    assert writers == {stages.results(volume)["host"]}
    assert {*did[writers.pop(), "file"]} == stages.MADE_BY["train"]


def test_a_signal_to_both_nodes_ends_in_a_checkpoint_from_which_the_same_command_resumes(tmp_path):
    with Cluster(tmp_path, ("--epochs", "60", "--num-processes", "1")) as project:
        containers = project.start_nodes()
        nodes.wait_until_they_train(containers)
        before = stages.batches_saved(tmp_path)
        for container in containers:
            container.send(SIGTERM)
        ends = project.end_nodes(seconds=20)
        assert [end.returncode for end in ends] == [143, 143], ends
        saved = stages.batches_saved(tmp_path)
        assert saved > before
        stages.assert_whole(tmp_path)
        project.start_nodes()
        stages.wait_until(lambda: stages.batches_saved(tmp_path) > saved, "progress")


@pytest.mark.parametrize("by", ["name", "address"])
def test_two_hosts_whose_own_names_are_at_127_0_1_1_train_together(tmp_path, by):
    subnet = f"10.{int(PREFIX[-2:], 16)}.213"
    with Cluster(tmp_path / "volume", nodes.SMALL) as project:
        endpoint = {"name": "host0", "address": f"{subnet}.10"}[by]
        for number, node in enumerate(project.nodes):
            hosts = tmp_path / node
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 host{number}\n")  # as Debian has it
            service = project.override["services"][node]
            service["hostname"] = f"host{number}"
            service["volumes"] = [f"{hosts}:/etc/hosts:ro"]
            service["networks"] = {"nodes": {"ipv4_address": f"{subnet}.{10 + number}", "aliases": [f"host{number}"]}}
            flags = ["--nnodes=2", f"--rdzv-endpoint={endpoint}:29400"]
            service["entrypoint"] = ["/opt/entrypoint.sh", "/opt/app/cluster/launch.py", *flags]
        project.override["networks"] = {"nodes": {"ipam": {"config": [{"subnet": f"{subnet}.0/24"}]}}}
        project.start_nodes()
        ends = project.end_nodes()
    assert [(end.returncode, end.stderr) for end in ends] == [(0, "")] * 2
    assert stages.images_trained_on(tmp_path / "volume") == 55_000
