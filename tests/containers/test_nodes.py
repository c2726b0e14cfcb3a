"""Two nodes in containers, by deploy/compose.cluster.yml and by deploy/trainjob.yaml; more in cluster_faults.py."""

import os
from signal import SIGTERM

import pytest

import nodes
import stages
from manifest import JOBS, TRAIN, container_of, pod_of
from nodes import Cluster
from pipeline import DATA_FOLDER, PREFIX, as_root, image, statuses

FIRST_POD = "mnist-train-node-0-0.mnist-train"  # the name of its host


def test_one_command_trains_on_two_nodes_and_the_other_stages_use_the_model(tmp_path):
    with Cluster(tmp_path, ("--epochs", "2", "--batch-size", "500", "--num-processes", "1")) as project:
        project.compose("up", "--no-build", seconds=300)
        ends = {name: project.container(name).end() for name in (*stages.STAGES, "train-2")}
    assert statuses(ends) == dict.fromkeys((*stages.STAGES, "train-2"), 0)
    assert stages.results(tmp_path)["nodes"] == 2
    model = stages.sha256(tmp_path / "mnist_cnn.pt")
    assert stages.results(tmp_path)["model_sha256"] == model
    assert stages.read_json(tmp_path / "eval_results.json")["model_sha256"] == model
    assert len([*(tmp_path / "results").glob("*.png")]) == 5


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


# The pods of deploy/trainjob.yaml as containers: its commands, user, rights and mount, without a Kubernetes -----------


def service(job, stage, folder):
    """A Compose service that runs as a pod of a job would, with a folder for its volume."""
    user, container = pod_of(job)["securityContext"], container_of(job)
    (mount,) = container["volumeMounts"]
    return {
        "image": image(stage),
        "user": f"{user['runAsUser']}:{user['runAsGroup']}",
        "read_only": container["securityContext"]["readOnlyRootFilesystem"],
        "cap_drop": container["securityContext"]["capabilities"]["drop"],
        "security_opt": ["no-new-privileges:true"],
        "volumes": [f"{folder}:{mount['mountPath']}", f"{stages.DATA}:{DATA_FOLDER}:ro"],
    }


def node(rank, folder):
    """A service that runs as the TrainJob's pod of that rank would, with the variables of Kubeflow Trainer."""
    trainer, port = TRAIN["spec"]["trainer"], 29500
    sizes = {"PET_NNODES": trainer["numNodes"], "PET_NPROC_PER_NODE": trainer["numProcPerNode"]}
    return service(TRAIN, "train", folder) | {
        "entrypoint": trainer["command"],
        "command": [*trainer["args"], "--epochs", "1"],
        "environment": sizes | {"PET_NODE_RANK": rank, "PET_MASTER_ADDR": FIRST_POD, "PET_MASTER_PORT": port},
        "networks": {"default": {"aliases": [FIRST_POD] if rank == 0 else []}},
    }


def test_the_commands_of_the_manifest_train_on_two_nodes_evaluate_and_predict(first_run, tmp_path):
    tmp_path.chmod(0o777)
    pods = {f"node-{rank}": node(rank, tmp_path) for rank in range(TRAIN["spec"]["trainer"]["numNodes"])}
    pods |= {stage: service(job, stage, tmp_path) for stage, job in zip(stages.STAGES[1:], JOBS, strict=True)}
    try:
        with Cluster() as project:
            project.files, project.override = (), {"services": pods}
            for names in (["node-0", "node-1"], ["evaluate"], ["infer"]):
                ends = [container.end() for container in project.start_nodes(*names)]
                assert [end.returncode for end in ends] == [0] * len(names), ends
    finally:
        as_root(tmp_path, f"chown -R {os.getuid()}:{os.getgid()} .")  # it belongs to the user of the pods
    model = tmp_path / "model"
    stages.assert_whole(model)
    assert stages.results(model)["nodes"] == 2
    assert stages.images_trained_on(model) == 55_000
    assert stages.read_json(model / "eval_results.json")["Accuracy"] > 95
    assert len([*(model / "results").iterdir()]) == 5
