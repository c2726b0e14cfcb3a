"""deploy/trainjob.yaml against the schema of its TrainJob in trainjob.schema.json, and what else it must agree with."""

import json
import re

import jsonschema
import pytest
import yaml

import stages
from manifest import CLAIM, JOBS, TRAIN, container_of, patched_job, pod_of
from stage import files

VALIDATOR = jsonschema.Draft202012Validator(json.loads((stages.TREE / "tests/trainjob.schema.json").read_text()))
RESERVED = {f"PET_{name}" for name in ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
DOMAIN_AND_PATH = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[\w.-]+"


def test_the_train_job_fits_the_schema_and_passes_what_kubeflow_trainers_controller_checks():
    assert [error.message for error in VALIDATOR.iter_errors(TRAIN)] == []
    trainer, container = TRAIN["spec"]["trainer"], container_of(TRAIN)
    assert not RESERVED & {variable["name"] for variable in trainer.get("env", [])}
    assert patched_job(TRAIN)["name"] == container["name"] == "node"  # the only ones that the runtime has
    assert "env" not in container  # variables belong in spec.trainer
    assert re.fullmatch(DOMAIN_AND_PATH, TRAIN["spec"]["runtimePatches"][0]["manager"])


def test_every_node_runs_one_train_under_torchrun_in_a_runtime_that_has_no_command_of_its_own():
    spec = TRAIN["spec"]
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    assert spec["trainer"]["command"] == ["/opt/entrypoint.sh", "/opt/app/cluster/launch.py"]
    assert spec["trainer"]["numProcPerNode"] == 1


def test_the_objects_are_a_claim_for_many_nodes_and_a_job_for_each_stage():
    objects = (CLAIM, TRAIN, *JOBS)
    assert [(found["apiVersion"], found["kind"], found["metadata"]["labels"]["stage"]) for found in objects] == [
        ("v1", "PersistentVolumeClaim", "train"),
        ("trainer.kubeflow.org/v1alpha1", "TrainJob", "train"),
        ("batch/v1", "Job", "evaluate"),
        ("batch/v1", "Job", "infer"),
    ]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_images_have_the_names_that_compose_gives_them_with_the_name_that_the_manifest_says():
    images = [TRAIN["spec"]["trainer"]["image"], *(container_of(job)["image"] for job in JOBS)]
    names = [re.fullmatch(r"registry\.example\.com/([\w-]+):\d", image)[1] for image in images]
    (project,) = re.findall(r"docker compose -p (\w+) build", (stages.TREE / "deploy/trainjob.yaml").read_text())
    assert names == [f"{project}-{stage}" for stage in stages.STAGES]


@pytest.mark.parametrize("job", [TRAIN, *JOBS], ids=stages.STAGES)
def test_a_pod_has_no_rights_of_root_and_the_claim_where_the_program_looks_for_data_and_model(job):
    (mount,), (volume,) = container_of(job)["volumeMounts"], pod_of(job)["volumes"]
    assert volume == {"name": mount["name"], "persistentVolumeClaim": {"claimName": CLAIM["metadata"]["name"]}}
    assert mount["mountPath"] == str(files.DATA.parent) == str(files.MODEL.parent)
    assert pod_of(job)["securityContext"] == pod_of(TRAIN)["securityContext"]  # which the schema has checked
    assert pod_of(job)["securityContext"]["runAsNonRoot"]
    assert container_of(job)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_limits_are_those_of_compose():
    stage = yaml.safe_load((stages.TREE / "docker-compose.yml").read_text())["services"]["train"]
    cores = int(re.search(r":-(\d+)", stage["cpu_quota"])[1]) // stage["cpu_period"]
    limits = {"cpu": cores, "memory": re.search(r":-(\d+)g", stage["mem_limit"])[1] + "Gi"}
    resources = [TRAIN["spec"]["trainer"]["resourcesPerNode"], *(container_of(job)["resources"] for job in JOBS)]
    assert resources == [{"requests": limits, "limits": limits}] * 3


@pytest.mark.parametrize("job", JOBS, ids=stages.STAGES[1:])
def test_a_job_has_no_field_but_those_it_needs(job):
    assert {*job} == {"apiVersion", "kind", "metadata", "spec"}
    assert {*job["spec"]} == {"backoffLimit", "template"}
    assert {*pod_of(job)} == {"restartPolicy", "securityContext", "containers", "volumes"}
    assert {*container_of(job)} == {"name", "image", "args", "resources", "securityContext", "volumeMounts"}
