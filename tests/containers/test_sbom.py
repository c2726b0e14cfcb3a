"""What cyclonedx-py finds in the images, as a software bill of materials (SBOM): the pinned packages, and no others."""

import json
import re
import subprocess

import pytest

from environments import make_environment
from pipeline import image, output_of
from stages import FOLDERS, STAGES, TREE

LAYERS = {"export": "/opt/export", "infer": "/opt/serve"}  # packages that only one image has
VENV = "/opt/venv/lib/python3.11/site-packages"


@pytest.fixture(scope="module")
def cyclonedx(tmp_path_factory):
    requirements = TREE / "tests/containers/requirements-cyclonedx.txt"
    return make_environment(tmp_path_factory.mktemp("cyclonedx"), requirements).with_name("cyclonedx-py")


def copy_metadata(stage, folder):
    """Copies what says which packages there are out of a stage's image, and returns the copies of their folders."""
    copies = []
    for source in [VENV, LAYERS[stage]] if stage in LAYERS else [VENV]:
        script = f"cd {source} && tar --create *.*-info"
        packed = output_of("run", "--rm", "--entrypoint", "sh", image(stage), "-c", script, text=False)
        copies.append(folder / source.strip("/"))
        copies[-1].mkdir(parents=True)
        subprocess.run(["tar", "--extract", "--directory", copies[-1]], input=packed, check=True)
    return copies


def pinned(stage):
    """The names and versions in the requirements of a stage, or of export, as a package index writes them."""
    paths = {*(TREE / FOLDERS.get(stage, FOLDERS["evaluate"])).glob("requirements*.txt")}
    if stage == "evaluate":
        paths.remove(TREE / FOLDERS[stage] / "requirements-export.txt")
    lines = [line for path in paths for line in path.read_text().split("\n")]
    found = [line.split()[0].split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in found}


@pytest.mark.parametrize("stage", [*STAGES, "export"])
def test_the_sbom_of_an_image_lists_the_pinned_packages_and_no_others(cyclonedx, tmp_path, stage):
    # cyclonedx-py asks a Python for its folders: this one names those of the image.
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps([str(path) for path in copy_metadata(stage, tmp_path)])}'\n")
    python.chmod(0o755)
    words = [cyclonedx, "environment", "--validate", "--output-reproducible", "--output-format", "JSON", python]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bill = json.loads(done.stdout)
    assert bill["bomFormat"] == "CycloneDX"
    found = {(re.sub(r"[-_.]+", "-", part["name"]).lower(), part["version"]) for part in bill["components"]}
    assert {(name, version.removesuffix("+cpu")) for name, version in found} == pinned(stage)
    assert all(part["purl"].startswith("pkg:pypi/") for part in bill["components"])
