"""The three images: what is in them, what they share, how large they are, and how their build strips libraries."""

import json

import pytest

from pipeline import BASE_IMAGE, docker, image, image_size, in_image, inspect
from stages import STAGES, TREE

IMPORT = "\nRUN MPLCONFIGDIR="  # the Dockerfile's step that imports

# Tells of every library in the image its package, and whether it is, to the byte, what its package brought along.
COMPARE = """
import base64, hashlib, importlib.metadata, json, pathlib

found = []
for package in importlib.metadata.distributions(path=["/opt/venv/lib/python3.11/site-packages"]):
    for file in package.files:
        path = pathlib.Path(file.locate())
        if ".so" in path.suffixes and path.exists():
            sha256 = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
            found.append((package.name, sha256 == file.hash.value))
print(json.dumps(found))
"""


def test_the_three_images_store_the_layers_with_torch_once():
    layers = [inspect(image(stage))["RootFS"]["Layers"] for stage in STAGES]
    shared = len(inspect(BASE_IMAGE)["RootFS"]["Layers"]) + 3  # the virtual environment, the folders, the entrypoint
    assert layers[0][:shared] == layers[1][:shared] == layers[2][:shared]
    assert len({own[-1] for own in layers}) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_no_image_is_larger_than_850_mb_on_the_real_base(stage):
    assert image_size(stage) <= 850e6


NAMES = " -o ".join(f"-name '{name}'" for name in (".env*", ".git", ".netrc", ".npmrc", "id_*", "*.key", ".ssh"))
TOOLS = "gcc g++ cc c++ clang ld as make strip pip pip3 uv conda curl wget git ssh"
# Prints tools, tests, caches, files with secrets and variables with secrets that an image has.
SUPERFLUOUS = rf"""set -e
for tool in {TOOLS}; do command -v $tool || true; done
find /opt/venv /opt/app -type d \( -name test -o -name tests \) ! -path '*.dist-info/*'
find /root/.cache /var/cache/apt /var/lib/apt/lists /tmp /var/tmp -type f 2>/dev/null || true
find / -xdev \( -path /proc -o -path /sys -o -path '*.dist-info' \) -prune -o \( {NAMES} \) -print
env | grep -iE '^[^=]*(SECRET|PASSW|TOKEN)' || true"""


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_has_nothing_superfluous(stage):
    assert in_image(stage, SUPERFLUOUS) == ""


def test_torchvision_can_be_imported_where_only_memory_can_be_written_to(first_run):
    # Train imports it only to download the data, which no container test does: none has the mirrors at hand.
    project, _ = first_run
    imported = project.run("train", "-c", "import torchvision.datasets", options=("--entrypoint", "python"))
    assert imported.returncode == 0, imported


def test_matplotlib_finds_a_list_of_fonts_in_a_folder_that_it_can_write_to(first_run):
    project, _ = first_run
    program = "import matplotlib, os; folder = matplotlib.get_cachedir(); print(folder, *os.listdir(folder))"
    listed = project.run("evaluate", "-c", program, options=("--entrypoint", "/opt/entrypoint.sh"))
    folder, name = listed.stdout.split()
    assert (folder, name.startswith("fontlist-")) == ("/dev/shm/matplotlib", True)


def test_the_build_strips_the_libraries_of_torch_alone():
    found = json.loads(in_image("train", COMPARE, program=("python", "-c")))
    assert len(found) > 20
    assert ["torch", False] in found
    assert {same for package, same in found if package != "torch"} == {True}


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_the_build_fails_if_an_import_warns(package):
    text = (TREE / "model-train" / "Dockerfile.train").read_text()
    assert text.count(IMPORT) == 1
    plant = f"\nRUN echo 'import warnings; warnings.warn(\"planted\")' >>{package}/__init__.py{IMPORT}"
    options = ("--progress", "plain", "--target", "packages", "--output", "type=cacheonly", "--file", "-")
    built = docker("build", *options, TREE / "model-train", input=text.replace(IMPORT, plant), timeout=600)
    assert built.returncode != 0
    assert "planted" in built.stderr
