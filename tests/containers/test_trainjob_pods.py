"""The pods of deploy/trainjob.yaml as containers: its commands, user, rights and mount, without a Kubernetes.

The variables are those that Kubeflow Trainer sets for two nodes.
"""

import pytest

from manifest import JOBS, TRAIN, container_of, pod_of
from pipeline import DATA_FOLDER, Pipeline, as_root, image
from stages import DATA, STAGES, assert_whole, images_trained_on, read_json, results

FIRST_NODE = "mnist-train-node-0-0.mnist-train"


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
        "volumes": [f"{folder}:{mount['mountPath']}", f"{DATA}:{DATA_FOLDER}:ro"],
    }


def node(rank, folder):
    """A service that runs as the TrainJob's pod of that rank would."""
    trainer, port = TRAIN["spec"]["trainer"], 29500
    sizes = {"PET_NNODES": trainer["numNodes"], "PET_NPROC_PER_NODE": trainer["numProcPerNode"]}
    return service(TRAIN, "train", folder) | {
        "entrypoint": trainer["command"],
        "command": [*trainer["args"], "--epochs", "1"],
        "environment": sizes | {"PET_NODE_RANK": rank, "PET_MASTER_ADDR": FIRST_NODE, "PET_MASTER_PORT": port},
        "networks": {"default": {"aliases": [FIRST_NODE] if rank == 0 else []}},
    }


@pytest.fixture
def pods(first_run, tmp_path):
    """A function that starts the pods of some names and waits until they end: their exit statuses."""
    tmp_path.chmod(0o777)
    services = {f"node-{rank}": node(rank, tmp_path) for rank in range(TRAIN["spec"]["trainer"]["numNodes"])}
    services |= {stage: service(job, stage, tmp_path) for stage, job in zip(STAGES[1:], JOBS, strict=True)}
    with Pipeline() as project:
        project.files, project.override = (), {"services": services}

        def run(*names):
            started = project.compose("up", "--detach", *names)
            assert started.returncode == 0, started.stderr
            ended = [project.container(name).end() for name in names]
            assert [end.returncode for end in ended] == [0] * len(names), ended

        yield run
    as_root(tmp_path, "rm -rf model")  # which belongs to the user of the pods


def test_the_commands_of_the_manifest_train_on_two_nodes_evaluate_and_predict(pods, tmp_path):
    pods("node-0", "node-1")
    pods("evaluate")
    pods("infer")
    model = tmp_path / "model"
    assert_whole(model)
    assert results(model)["nodes"] == 2
    assert images_trained_on(model) == 55_000
    assert read_json(model / "eval_results.json")["Accuracy"] > 95
    assert len([*(model / "results").iterdir()]) == 5
