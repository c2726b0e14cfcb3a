"""docs/your-own.md: its recipe for another data set, applied to a copy of the tree."""

import gzip
import re
import shutil
import subprocess
from pathlib import Path

import stages

PACKAGED = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
ORIGINAL = re.compile(r"^DATA_SET = DataSet\(.*?^\)\n", re.DOTALL | re.MULTILINE)


def test_the_recipe_for_fashion_mnist_trains_evaluates_and_predicts(tmp_path):
    for folder in stages.FOLDERS.values():
        shutil.copytree(stages.TREE / folder, tmp_path / folder)
    shutil.copy(stages.TREE / "Makefile", tmp_path)
    (recipe,) = re.findall(r"```python\n(.*?)```", (stages.TREE / "docs/your-own.md").read_text(), re.DOTALL)
    original = tmp_path / "model-train/stage/dataset.py"
    text, replaced = ORIGINAL.subn(lambda match: recipe, original.read_text())
    assert replaced == 1
    original.write_text(text)
    subprocess.run(["make", "copies"], cwd=tmp_path, check=True)
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for path in PACKAGED.glob("*.gz"):  # where the package is not installed, train downloads the files
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    folders = {"data": tmp_path / "data", "model": tmp_path / "model", "tree": tmp_path}
    stages.assert_succeeds(stages.run("train", "--epochs", "1", "--batch-size", "250", "--lr", "0.2", **folders))
    stages.assert_succeeds(stages.run("evaluate", "--min-accuracy", "60", **folders))
    stages.assert_succeeds(stages.run("infer", **folders))
    assert 60 < stages.read_json(tmp_path / "model" / "eval_results.json")["Accuracy"] < 95
