"""What deploy/trainjob.yaml says: the claim, the TrainJob, and the Jobs of the other two stages."""

import yaml

import stages

CLAIM, TRAIN, *JOBS = yaml.safe_load_all((stages.TREE / "deploy/trainjob.yaml").read_text())


def patched_job(train):
    """The only job that a TrainJob patches of those that its runtime has."""
    (patch,) = train["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    return job


def pod_of(job):
    """The specification of the pods of a TrainJob or a Job."""
    return (patched_job(job)["template"] if job["kind"] == "TrainJob" else job)["spec"]["template"]["spec"]


def container_of(job):
    """The specification of the only container of these pods; what a TrainJob says of it elsewhere is not in it."""
    (container,) = pod_of(job)["containers"]
    return container
