"""docs/your-own.md: its recipe for another data set, applied to a copy of the tree."""

import gzip
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import stages

PACKAGED = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
ORIGINAL = re.compile(r"^DATA_SET = DataSet\(.*?^\)\n", re.DOTALL | re.MULTILINE)


@pytest.fixture
def tree(tmp_path):
    """A copy of the tree with the recipe's DATA_SET in place of MNIST's."""
    for folder in stages.FOLDERS.values():
        shutil.copytree(stages.TREE / folder, tmp_path / folder)
    shutil.copy(stages.TREE / "Makefile", tmp_path)
    (recipe,) = re.findall(r"```python\n(.*?)```", (stages.TREE / "docs/your-own.md").read_text(), re.DOTALL)
    original = tmp_path / "model-train/stage/dataset.py"
    text, replaced = ORIGINAL.subn(lambda match: recipe, original.read_text())
    assert replaced == 1
    original.write_text(text)
    subprocess.run(["make", "copies"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.fixture
def fashion(tmp_path):
    """The data folder: the package's files where it is installed; else train downloads them."""
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for path in PACKAGED.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return raw.parents[1]


def test_the_recipe_for_fashion_mnist_trains_evaluates_and_predicts(tree, fashion):
    folders = {"data": fashion, "model": tree / "model", "tree": tree}
    stages.assert_succeeds(stages.run("train", "--epochs", "1", "--batch-size", "250", "--lr", "0.2", **folders))
    stages.assert_succeeds(stages.run("evaluate", "--min-accuracy", "60", **folders))
    stages.assert_succeeds(stages.run("infer", **folders))
    assert 60 < stages.read_json(tree / "model" / "eval_results.json")["Accuracy"] < 95
