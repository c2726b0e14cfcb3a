"""What the stages may do, as seen from inside their containers, and what their images do not have."""

import json
import shutil

import faults
import pytest
from faults import STAGES, Pipeline

OWNERS = (0, 1000, 1234)  # of a checkout: root, the first user of a machine, somebody

# Run by the image's own entrypoint in place of the program, this tells what the program would be able to do.
PROBE = """
import json, os

def can_write(folder):
    try:
        with open(f"{folder}/probe", "w"):
            return True
    except OSError:
        return False

def can_become_root():
    try:
        os.setuid(0)
        return True
    except OSError:
        return False

status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "users": status["Uid"].split() + status["Gid"].split(),
    "capabilities": {status[name].strip() for name in status if name.startswith("Cap")} - {"0" * 16} and status,
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "writes": [f for f in ("/", "/opt/app", "/tmp", "/root", "/opt/mount/data", "/opt/mount/model") if can_write(f)],
    "becomes_root": can_become_root(),
    "networks": sorted(os.listdir("/sys/class/net")),
}, default=list))
"""


@pytest.fixture(scope="module", autouse=True)
def images(pipeline):
    faults.IMAGES = pipeline.project.name


@pytest.fixture(scope="module", params=OWNERS)
def owned(request, data, tmp_path_factory):
    """A data folder with an owner, and the owner."""
    folder = shutil.copytree(data / "MNIST", tmp_path_factory.mktemp("owned") / "data" / "MNIST").parent
    give(folder, request.param)
    yield folder, request.param
    give(folder, tmp_path_factory.getbasetemp().stat().st_uid)


def give(folder, owner):
    """Gives a folder to somebody, which root may do: the one in a container."""
    options = ("--rm", "--network", "none", "--volume", f"{folder}:/folder", "--entrypoint", "chown")
    given = faults.docker("run", *options, f"{faults.IMAGES}-train", "-R", f"{owner}:{owner}", "/folder")
    assert given.returncode == 0, given.stderr


@pytest.fixture(scope="module", params=STAGES)
def probed(request, owned, tmp_path_factory):
    """A stage, the owner of its data folder, the data folder, and what the probe says."""
    stage, (data, owner) = request.param, owned
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.py").write_text(PROBE)
    mount = {stage: {"more_volumes": [f"{folder}/probe.py:/opt/app/{stage}.py:ro"]}}
    with Pipeline(folder / "volume", data, disk={}, **mount) as pipeline:
        ended = pipeline.run(stage)
    assert ended.status == 0, ended.stderr
    return stage, owner, data, json.loads(ended.stdout)


def test_a_stage_runs_as_the_owner_of_the_data_folder(probed):
    _, owner, _, said = probed
    assert {*said["users"]} == {str(owner)}


def test_a_stage_has_no_capability_and_can_gain_none(probed):
    _, owner, _, said = probed
    assert said["capabilities"] == []
    assert said["no_new_privileges"] == "1"
    assert said["becomes_root"] is (owner == 0)


def test_a_stage_writes_to_the_volume_only_and_train_to_the_data_too(probed):
    stage, _, _, said = probed
    assert said["writes"] == ["/opt/mount/data"] * (stage == "train") + ["/opt/mount/model"]


def test_evaluate_has_no_network(probed):
    stage, _, _, said = probed
    assert (said["networks"] == ["lo"]) is (stage == "evaluate")


def test_what_train_writes_to_the_data_folder_belongs_to_its_owner(probed):
    stage, owner, data, _ = probed
    if stage == "train":
        assert ((data / "probe").stat().st_uid, (data / "probe").stat().st_gid) == (owner, owner)


def test_all_stages_work_whoever_owns_the_data_folder(owned, tmp_path):
    data, owner = owned
    with Pipeline(tmp_path / "volume", data, disk={}) as pipeline:
        for stage, *flags in (
            ("train", "--epochs", "1", "--batch-size", "500"),
            ("evaluate", "--min-accuracy", "20"),
            ("infer",),
        ):
            ended = pipeline.run(stage, *flags)
            assert (ended.status, ended.stderr) == (0, "")
        find = ("find", faults.MODEL, "-mindepth", "1", "-printf", "%U:%G\n")
        owners = faults.docker("exec", pipeline.watcher, *find).stdout.split()
    assert len(owners) > 9
    assert {*owners} == {f"{owner}:{owner}"}


# Images --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=STAGES)
def inside(request, pipeline):
    """A function that runs a shell script in a stage's image, and returns the lines that it prints."""

    def run(script):
        image = pipeline.image(request.param)
        ended = faults.docker("run", "--rm", "--network", "none", "--entrypoint", "sh", image, "-c", script)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.splitlines()

    return run


@pytest.mark.parametrize("tools", ["gcc g++ cc c++ clang ld as make strip", "pip pip3 uv conda", "curl wget git ssh"])
def test_an_image_has_no_tool_that_running_does_not_need(inside, tools):
    assert inside(f"for tool in {tools}; do command -v $tool; done; true") == []


def test_an_image_has_no_tests_in_its_packages(inside):
    assert inside("find /opt/venv /opt/app -type d \\( -name test -o -name tests \\) ! -path '*.dist-info/*'") == []


def test_an_image_has_no_caches(inside):
    folders = "/root/.cache /var/cache/apt /var/lib/apt/lists /tmp /var/tmp"
    assert inside(f"find {folders} -type f 2>/dev/null; true") == []


def test_an_image_has_no_secrets(inside):
    names = " -o ".join(f"-name '{name}'" for name in (".env*", ".git", ".netrc", ".npmrc", "id_*", "*.key", ".ssh"))
    assert (
        inside(
            f"find / -xdev \\( -path /proc -o -path /sys -o -path '*.dist-info' \\) -prune -o \\( {names} \\) -print"
        )
        == []
    )
    assert [line for line in inside("env") if any(word in line.upper() for word in ("SECRET", "PASSW", "TOKEN"))] == []
