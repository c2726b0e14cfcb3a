"""Symbols are stripped off torch's own libraries and off nothing else, and the build notices a doubtful import."""

import json

import faults
import pytest
import stages

PACKAGES = "WORKDIR /opt/venv/lib/python3.11/site-packages\n"  # the Dockerfile's line ahead of the steps looked at here
LAST_STAGE = "\nFROM ${BASE_IMAGE}\n"  # and the one behind them

# Says of every library in the image that is not torch's whether it is, to the byte, what its package brought along.
COMPARE = """
import base64, hashlib, importlib.metadata, json, pathlib

same = {}
for package in importlib.metadata.distributions(path=["/opt/venv/lib/python3.11/site-packages"]):
    for file in package.files:
        path = pathlib.Path(file.locate())
        if package.name != "torch" and ".so" in path.suffixes and path.exists():
            sha256 = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
            same[str(file)] = sha256 == file.hash.value
print(json.dumps(same))
"""


@pytest.fixture
def build(pipeline):
    """A function that builds the image's packages with a script run ahead of the steps that strip, and one behind.

    It needs what the images' build has downloaded, and leaves no image.
    """

    def run(ahead, behind="true"):
        text = (stages.TREE / "model-train" / "Dockerfile.train").read_text()
        assert (text.count(PACKAGES), text.count(LAST_STAGE)) == (1, 1)
        text = text.replace(PACKAGES, f"{PACKAGES}RUN {ahead}\n").replace(LAST_STAGE, f"\nRUN {behind}\n{LAST_STAGE}")
        options = ("--progress", "plain", "--target", "packages", "--output", "type=cacheonly", "--file", "-")
        return faults.docker("build", *options, stages.TREE / "model-train", input=text, timeout=600)

    return run


def test_the_build_strips_the_libraries_of_torch_alone(build):
    others = "torchvision/planted.so numpy/planted.so"
    plant = (
        f"for to in torch/planted.so {others}; do cp torch/lib/libshm.so $to; done && sha256sum {others} >/planted.sum"
    )
    built = build(plant, "sha256sum --check /planted.sum && ! cmp torch/planted.so numpy/planted.so")
    assert built.returncode == 0, built.stderr


def test_every_library_but_those_of_torch_is_what_its_package_brought_along(pipeline):
    options = ("--rm", "--network", "none", "--entrypoint", "python")
    said = faults.docker("run", *options, pipeline.image("train"), "-c", COMPARE)
    same = json.loads(said.stdout)
    assert len(same) > 20
    assert {*same.values()} == {True}


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_the_build_fails_if_an_import_warns(build, package):
    built = build(f"echo 'import warnings; warnings.warn(\"planted\")' >>{package}/__init__.py")
    assert built.returncode != 0
    assert "planted" in built.stderr
