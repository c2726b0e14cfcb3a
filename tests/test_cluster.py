"""Training on several nodes: their shares of the batches, what keeps them from training together, and two of them."""

import contextlib
import functools
import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.distributed import run as torchrun

import hogwild
import nodes
import stages
import train
from cluster import launch
from cluster import nodes as cluster
from cluster.environment import HAS_BEGUN
from stage import process
from stage.process import Failure
from training import record, workers
from training.settings import Settings

DESCRIPTION = {"flags": {"--lr": "0.1"}, "data": {"train": "1" * 64}, "programs": {"net.py": "2" * 64}}


def new_nodes(rank, world, total=None, done=0, **changes):
    """One node among others, of a training of three epochs of 7 batches; `total` is to sum over the nodes."""
    new = record.Record.new(Settings(**{"epochs": 3, "batch_size": 10, "num_processes": 2} | changes), 960, {})
    new.batches = done
    images, labels = torch.zeros(65, 28, 28, dtype=torch.uint8), torch.zeros(65, dtype=torch.int64)
    shared = hogwild.SharedState(new, images, labels)
    node = SimpleNamespace(rank=rank, world=world, sum=total)
    return cluster.Nodes(node, new, shared)


@pytest.mark.parametrize("done", [0, 5, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_shares_of_the_nodes_are_disjoint_and_together_all_batches_that_are_left(world, done):
    record = new_nodes(0, 1, done=done).record
    shares = [range(workers.Workers(None, record, None, rank, world).next_to_send, 21, world) for rank in range(world)]
    assert sorted(number for numbers in shares for number in numbers) == [*range(done, 21)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_learning_rate_is_multiplied_by_the_number_of_nodes():
    shared = new_nodes(1, 4, lr=0.1, schedule="constant").shared
    assert hogwild.Trainer(0, shared).learning_rate(5) == pytest.approx(0.4)


def test_nodes_meet_after_some_batches_of_each_and_at_the_end_of_the_epoch():
    one = new_nodes(0, 2, sync_every=2)
    assert [one.next_sync(7), one.next_sync(3)] == [4, 3]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [("flags", "--lr", "0.2"), ("flags", "--seed", "7"), ("data", "train", "3" * 64), ("programs", "net.py", "4" * 64)],
)
def test_a_node_that_differs_from_node_0_is_refused_and_the_difference_named(kind, name, value):
    other = json.loads(json.dumps(DESCRIPTION))
    other[kind][name] = value
    assert cluster.check_same([DESCRIPTION, DESCRIPTION], 1) == b""
    with pytest.raises(Failure, match=f"the {kind} of the nodes differ: {name} is {value[:12]} on node 1") as refusal:
        cluster.check_same([DESCRIPTION, other], 1)
    assert refusal.value.status == 2


def test_a_node_describes_the_flags_given_the_data_read_and_the_programs(data, tmp_path, monkeypatch):
    (tmp_path / "begun").touch()
    monkeypatch.setenv(HAS_BEGUN, str(tmp_path / "begun"))
    args = SimpleNamespace(data=data, model=tmp_path, dry_run=False, fresh=True)
    node = SimpleNamespace(rank=1, world=2)
    described = json.loads(cluster.Preparation(node, args, {"lr": 0.2}, contextlib.ExitStack()).describe())
    assert described["flags"] == {"--lr": "0.2", "--fresh": "given"}
    assert described["data"] == {name: stages.sha256(data / stages.RAW / name) for name in stages.RAW_FILES}
    programs, top = described["programs"], stages.TREE / "model-train"
    assert {"net.py", "hogwild.py", "train.py", "stage/dataset.py", "training/workers.py"} <= programs.keys()
    assert programs == {name: stages.sha256(top / name) for name in programs}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_trains_on_its_share_and_node_0_alone_writes_to_the_volume(tmp_path, monkeypatch, rank):
    own = new_nodes(rank, 2)
    own.publish = mock.Mock()
    for patched in ("__enter__", "__exit__"):  # no worker is forked
        monkeypatch.setattr(workers.Workers, patched, lambda self, *error: self if not error else None)
    monkeypatch.setattr(process, "handle_stop_signals", mock.Mock())
    monkeypatch.setattr(train, "train_epochs", mock.Mock())
    args = SimpleNamespace(model=tmp_path, log_interval=None, dry_run=False)
    assert train.train(own.record, own.shared, (torch.zeros(0), torch.zeros(0)), own, args) == 0
    _, given, _, checkpoints, _ = train.train_epochs.call_args.args
    assert (given.next_to_send, given.nodes) == (rank, 2)
    checkpoints.save()
    if rank:
        own.publish.call_args.args[0]()  # it would publish the model
    assert {*stages.contents(tmp_path)} == (set() if rank else {"checkpoint.pt", "train_results.json"})


def test_on_one_machine_nothing_of_this_is_imported(data, tmp_path):
    result = stages.run("train", "--dry-run", model=tmp_path, PYTHONPROFILEIMPORTTIME=1)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0
    assert "hogwild" in imported
    assert not {"cluster", "distributed", "launch", "torch.distributed.run"} & imported


class Two:
    """Two nodes of two workers each as threads of this process, whose sum() adds their vectors up."""

    def __init__(self):
        self.barrier, self.vectors = threading.Barrier(2), [None, None]
        self.nodes = [new_nodes(rank, 2, functools.partial(self.sum, rank)) for rank in range(2)]
        self.workers = [mock.Mock(stop=SimpleNamespace(number=0)) for _ in self.nodes]

    def sum(self, rank, vector, while_waiting):
        self.vectors[rank] = vector.clone()
        while_waiting()
        self.barrier.wait(10)
        vector.copy_(self.vectors[0] + self.vectors[1])
        self.barrier.wait(10)

    def meet(self):
        """Has both nodes meet, and returns whether each is told that one is asked to stop."""
        with ThreadPoolExecutor(2) as pool:
            return [*pool.map(lambda each, workers: each.sync(workers), self.nodes, self.workers)]


def test_both_nodes_get_the_mean_of_their_parameters():
    two = Two()
    own = [torch.randn_like(each.shared.parameters) for each in two.nodes]
    for each, parameters in zip(two.nodes, own, strict=True):
        each.shared.parameters.copy_(parameters)
    assert two.meet() == [False, False]
    for each in two.nodes:
        torch.testing.assert_close(each.shared.parameters, (own[0] + own[1]) / 2)


def test_both_nodes_get_the_same_record_of_what_all_workers_have_done_and_of_those_that_were_killed():
    two = Two()
    for each, numbers in zip(two.nodes, [(0, 2, 4, 6), (1, 3, 5)], strict=True):
        for number in numbers:
            each.record.workers[1].add(10, 1, number + 0.5, 0.0)
    two.nodes[1].record.lost_workers.append(record.LostWorker(0, signal.SIGKILL, 3))
    for _ in range(2):  # the second time there is nothing new
        two.meet()
        for each in two.nodes:
            idle, busy = each.record.workers
            assert (idle.images, busy.images, busy.steps) == (0, 70, 7)
            assert busy.loss_sum == sum(range(7)) + 7 * 0.5
            assert each.record.lost_workers == [record.LostWorker(2, signal.SIGKILL, 3)]
            assert each.record.totals()[:2] == (7, 70)


def test_what_is_new_is_exact_also_where_float32_does_not_have_the_totals():
    one = new_nodes(0, 2)
    for worker in (one.record.workers[1], one.known[1]):
        worker.add(2**24, 0, 0.0, 0.0)
    one.record.workers[1].add(3, 1, 0.5, 0.0)
    assert one.news().tolist() == [[0] * 6, [3, 1, 0.5, 0, 0, 0]]


def test_a_worker_that_is_killed_during_a_meeting_is_recorded_at_the_next_one():
    two = Two()
    lost = record.LostWorker(1, signal.SIGKILL, None)
    watch = two.workers[0].watch
    watch.side_effect = lambda: two.nodes[0].record.lost_workers.append(lost)
    two.meet()
    watch.side_effect = None
    two.meet()
    assert [each.record.lost_workers for each in two.nodes] == [[lost], [lost]]


def test_both_nodes_know_when_one_is_asked_to_stop():
    two = Two()
    two.workers[1].stop.number = signal.SIGTERM
    assert two.meet() == [True, True]


# Two nodes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory):
    """How both nodes of a training of one epoch ended, and its volume, to look at."""
    folder, temporary = tmp_path_factory.mktemp("pair"), tmp_path_factory.mktemp("temporary")
    return nodes.run(*[nodes.command(*nodes.SMALL, "--averaging", "0.5", model=folder)] * 2, TMPDIR=temporary), folder


def test_two_nodes_leave_no_temporary_files(pair, tmp_path_factory):
    assert [*tmp_path_factory.getbasetemp().glob("temporary*/*")] == []


def test_two_nodes_train_a_model_on_every_image_once(pair):
    ends, folder = pair
    assert [(end.returncode, end.stderr) for end in ends] == [(0, ""), (0, "")]
    results = stages.results(folder)
    assert (results["finished"], results["nodes"]) == (True, 2)
    assert stages.images_trained_on(folder) == 55_000
    assert results["history"][0]["validation_accuracy"] > 90
    stages.assert_whole(folder)


def test_two_nodes_have_equal_parameters_after_the_last_averaging(pair):
    found = nodes.digests(pair[0])
    assert {*found} == {"0", "1"}
    assert found["0"] == found["1"]


def test_the_model_is_the_mean_of_the_parameters_of_both_nodes_after_the_last_batches(pair):
    saved = stages.load_checkpoint(pair[1])
    mean = saved["sum"] / saved["sum"][-1]
    assert saved["sum"][-1] == 55
    assert torch.cat([tensor.flatten() for tensor in saved["model"].values()]).equal(mean[:-1])


def test_the_training_loss_is_that_of_all_nodes(pair):
    results = stages.results(pair[1])
    (worker,), (epoch,) = results["workers"], results["history"]
    assert worker["steps"] == results["batches"] == 110
    assert epoch["train_loss"] == pytest.approx(worker["loss_sum"] / 55_000)
    assert 0.2 < epoch["train_loss"] < 2


def test_two_nodes_leave_a_finished_model_as_it_is(pair):
    _, folder = pair
    with stages.unchanged(folder):
        ends = nodes.run(*[nodes.command(model=folder)] * 2)
    for end in ends:
        stages.assert_succeeds(end)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--lr 0.1", "--lr 0.2"), ("--lr", "0.2", "0.1")),
        (("--batch-size 55000", "--batch-size 55000"), ("1 batches", "2 nodes", "--batch-size")),
    ],
    ids=["different flags", "more nodes than batches"],
)
def test_nodes_that_cannot_train_together_end_at_once_each_in_one_line(data, tmp_path, flags, names):
    port = stages.free_port()
    for end in nodes.run(*(nodes.command(*nodes.SMALL, *each.split(), port=port, model=tmp_path) for each in flags)):
        stages.assert_fails(end, 2, *names)
    assert stages.contents(tmp_path) == {}


def test_nodes_whose_volume_is_not_shared_end_each_in_one_line(data, tmp_path):
    port = stages.free_port()
    one, other = (nodes.command(*nodes.SMALL, port=port, model=tmp_path / name) for name in ("one", "other"))
    for end in nodes.run(one, other, NODE_TIMEOUT=2):
        stages.assert_fails(end, 1, "volume", "train_results.json")
    assert not [*tmp_path.rglob("mnist_cnn.pt")]


def test_a_record_that_is_no_text_is_not_that_of_node_0(tmp_path):
    (tmp_path / "train_results.json").write_bytes(b"\xff")
    with pytest.raises(Failure, match="is not what node 0 has written"):
        cluster.check_volume(tmp_path, record.Record.new(Settings(), 960, {}), SimpleNamespace(rank=1, timeout=0))


def test_a_checkpoint_of_another_network_is_refused_by_both_nodes(unfinished):
    stages.edit_checkpoint(unfinished, model=lambda saved: saved | {"fc2.weight": torch.zeros(12, 50)})
    with stages.unchanged(unfinished):
        ends = nodes.run(*[nodes.command(model=unfinished)] * 2)
    for end in ends:
        stages.assert_fails(end, 1, "checkpoint.pt", "fc2.weight")


def test_two_nodes_that_are_stopped_save_a_checkpoint_from_which_one_machine_goes_on(data, tmp_path):
    words = nodes.command("--epochs", "9", "--num-processes", "1", model=tmp_path)
    with nodes.running(words, words) as processes:
        stages.wait_until(lambda: stages.batches_saved(tmp_path) > 0, "a checkpoint")
        before = stages.batches_saved(tmp_path)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        ends = nodes.finish(processes)
    assert [end.returncode for end in ends] == [143, 143]
    assert stages.batches_saved(tmp_path) > before
    stages.assert_whole(tmp_path)
    done = len(stages.results(tmp_path)["history"])
    resumed = stages.run("train", "--epochs", str(done + 1), "--num-processes", "2", model=tmp_path)
    stages.assert_succeeds(resumed)
    assert "velocities" in resumed.stdout
    assert stages.images_trained_on(tmp_path) == 55_000 * (done + 1)
    assert stages.results(tmp_path)["nodes"] == 1


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--timeout 1 --rdzv-endpoint 192.0.2.1:29400", ("192.0.2.1", "rendezvous")),  # nobody's address (RFC 5737)
        ("--join-timeout 1", ("too few nodes",)),
    ],
)
def test_a_node_that_does_not_reach_the_rendezvous_or_stays_alone_ends_in_one_line(data, tmp_path, flags, names):
    (end,) = nodes.run(nodes.command(*nodes.SMALL, *flags.split(), model=tmp_path))
    stages.assert_fails(end, 1, *names)


@pytest.fixture
def own_address(monkeypatch):
    """The address of this machine in a network, while its own name, own-name, is at 127.0.1.1 as on Debian."""
    look_up = socket.getaddrinfo
    names = {"own-name": "127.0.1.1"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **kw: look_up(names.get(host, host), *more, **kw))
    monkeypatch.setattr(os, "environ", {})
    addresses = [address for address in launch.find_interfaces() if not address.startswith("127.")]
    return addresses[0] if addresses else pytest.skip("this machine is in no network")


@pytest.mark.parametrize("given", [None, "own-name"])
@pytest.mark.parametrize("endpoint", ["own-name", "its address"])
def test_a_node_tells_the_others_an_address_that_they_can_reach(own_address, given, endpoint):
    args = SimpleNamespace(local_addr=given)
    launch.announce_own_address(args, own_address if endpoint == "its address" else endpoint)
    assert os.environ["GLOO_SOCKET_IFNAME"] in launch.find_interfaces().values()
    assert os.environ["GLOO_SOCKET_IFNAME"] != launch.find_interfaces()["127.0.0.1"]
    assert given or launch.find_interfaces()[args.local_addr] == os.environ["GLOO_SOCKET_IFNAME"]


def test_the_node_that_has_the_address_of_the_endpoint_hosts_it(own_address, monkeypatch):
    monkeypatch.setattr("sys.argv", ["launch.py", "--rdzv-endpoint", f"{own_address}:29400"])
    words = launch.torchrun_words(launch.parse_args()[0], own_address, 29400)
    assert words[words.index("--rdzv-endpoint") + 1] == "127.0.0.1:29400"


@pytest.mark.parametrize(
    ("words", "restarts"),
    [("", 7), ("--max-restarts 5", 5), ("--rdzv-endpoint x:1", 3), ("--rdzv-endpoint x:1 --max-restarts 5", 5)],
)
def test_the_restarts_are_those_of_the_flag_or_else_3_at_an_endpoint_or_those_of_torchruns_variable(
    monkeypatch, words, restarts
):
    monkeypatch.setattr("sys.argv", ["launch.py", *words.split()])
    monkeypatch.setenv("PET_MAX_RESTARTS", "7")
    args, _ = launch.parse_args()
    assert int(torchrun.get_args_parser().parse_args(launch.torchrun_words(args, "x", 1)).max_restarts) == restarts


@pytest.mark.parametrize(
    "wrong",
    [
        *("--epochs 0", "--nnodes 2:1", "--nnodes two", "--nnodes 0", "--max-restarts -1", "--timeout 0"),
        *("--rdzv-endpoint host0", "--rdzv-endpoint :1", "--rdzv-endpoint host0:one", "--rdzv-endpoint host0:65536"),
        "--rdzv-id ",
        *("PET_NNODES two", "PET_NODE_RANK one", "PET_NODE_RANK 2", "PET_MASTER_PORT 65536", "PET_MASTER_PORT one"),
        *("PET_MASTER_PORT ", "PET_MASTER_ADDR ", "PET_MAX_RESTARTS -1"),
    ],
)
def test_a_wrong_flag_or_variable_of_torchrun_ends_a_node_in_one_line_with_status_2(tmp_path, wrong):
    words, (name, value) = nodes.command(model=tmp_path), wrong.split(" ")
    env = {"PET_NNODES": 2, "PET_NODE_RANK": 0, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": 1}
    del words[2:6]  # --rdzv-endpoint, --nnodes
    is_flag = name.startswith("--")
    (end,) = nodes.run(words + [name, value] * is_flag, **env | ({} if is_flag else {name: value}))
    stages.assert_fails(end, 2, *[name] * is_flag)


# deploy/train.sbatch, with stand-ins for Slurm's commands ------------------------------------------------------------


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A function that runs the job on one node, where sbatch is a script; it returns how the job ended.

    What the commands are called with is in the file `calls`.
    """
    names = ("PARTITION", "ACCOUNT", "QOS", "ID", "NODELIST")
    place = {f"SLURM_JOB_{name}": name.lower() for name in names} | {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}

    def run(script):
        record = f'echo "$(basename "$0") $*" >>{tmp_path}/calls'
        for name, does in (("sbatch", script), ("srun", "exit 3"), ("scontrol", "echo n1")):
            (tmp_path / name).write_text(f"#!/bin/sh\n{record}\n{does}\n")
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        with stages.running(["bash", stages.TREE / "deploy/train.sbatch"], PATH=path, **place) as process:
            return stages.finish(process)

    return run


def test_the_jobs_that_follow_a_training_have_its_partition_account_and_qos(sbatch, tmp_path):
    assert sbatch("echo 8").returncode == 3
    jobs = [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("sbatch")]
    assert len(jobs) == 2
    for job in jobs:
        assert {"--partition=partition", "--account=account", "--qos=qos"} <= {*job.split()}


def test_a_message_in_a_job_names_the_command_that_submits_one(volume):
    result = stages.run("train", "--lr", "0.2", model=volume, SLURM_JOB_ID=7)
    stages.assert_fails(result, 2, "sbatch deploy/train.sbatch --fresh")


def test_a_job_trains_although_those_that_follow_cannot_be_submitted_and_says_so(sbatch, tmp_path):
    stages.assert_fails(sbatch("exit 1"), 3, "cannot be submitted", "model-eval/evaluate.py")
    assert "srun" in (tmp_path / "calls").read_text()
