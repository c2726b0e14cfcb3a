"""Data sets of one's own: docs/your-own.md's recipes applied to copies of the tree, and what is refused in one line."""

import ast
import dataclasses
import gzip
import json
import re
import shutil
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

import drawings
import stages
from stage import code, images
from stage.dataset import EMNIST_LETTERS, FASHION_MNIST, KMNIST, MNIST, PICTURES
from stage.process import Failure
from training.data import read_data
from training.details import download

PACKAGED = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
CHOICE = "DATA_SET = MNIST\n"
SHAPES = dataclasses.replace(PICTURES, name="shapes", classes=drawings.COLOURED_SHAPES)
LETTERS = dataclasses.replace(PICTURES, name="letters", classes=drawings.LETTERS, shape=(1, 28, 28))
ENTRIES = {
    "fashion": "DATA_SET = FASHION_MNIST\n",
    "letters": f"""DATA_SET = DataSet(
    name="letters",
    classes={drawings.LETTERS},
    pixel_mean=0.13,
    pixel_std=0.30,
    min_accuracy=60.0,
)\n""",
    "shapes": f"""DATA_SET = DataSet(
    name="shapes",
    classes={drawings.COLOURED_SHAPES},
    pixel_mean=(0.25, 0.25, 0.25),
    pixel_std=(0.25, 0.25, 0.25),
    shape=(3, 32, 32),
    min_accuracy=25.0,
)\n""",
}
FLAGS = {
    "fashion": ("--epochs", "1", "--batch-size", "250", "--lr", "0.2"),
    "letters": ("--epochs", "8", "--batch-size", "24"),
    "shapes": ("--epochs", "15", "--batch-size", "12"),
}


def copy_tree(folder, entry):
    """A copy of the tree in a folder, whose data set is another one."""
    text = (stages.TREE / "model-train/stage/dataset.py").read_text()
    assert text.count(CHOICE) == 1
    return stages.copy_tree(folder, {"stage/dataset.py": text.replace(CHOICE, entry)})


def replace_in(path, old, new):
    """Edits a file in which a text stands once."""
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def make_data(kind, folder):
    """The data of a trial. Fashion-MNIST's files are the package's where it is installed; else train downloads them."""
    if kind == "letters":
        drawings.draw_folder(folder / "letters", drawings.LETTERS, drawings.draw_letter, train=60)  # no test folder
    elif kind == "shapes":
        drawings.draw_folder(folder / "shapes", drawings.COLOURED_SHAPES, drawings.draw_shape, train=60, test=10)
    else:
        raw = folder / "FashionMNIST/raw"
        raw.mkdir(parents=True)
        for path in PACKAGED.glob("*.gz"):
            (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return folder


@pytest.fixture(scope="module", params=ENTRIES)
def trial(request, tmp_path_factory):
    """A tree with another data set, after all three stages: what the folders are, and the data set's name."""
    kind, tree = request.param, tmp_path_factory.mktemp(request.param)
    folders = {"data": make_data(kind, tree / "data"), "model": tree / "model", "tree": copy_tree(tree, ENTRIES[kind])}
    stages.assert_succeeds(stages.run("train", *FLAGS[kind], **folders))
    least = ("--min-accuracy", "60") if kind == "fashion" else ()  # its own is for a whole training
    stages.assert_succeeds(stages.run("evaluate", *least, **folders))
    stages.assert_succeeds(stages.run("infer", "--samples", "7", "--seed", "1", **folders))
    return kind, folders


def test_an_entry_is_all_that_another_data_set_needs(trial):
    kind, folders = trial
    classes = {"fashion": FASHION_MNIST.classes, "letters": drawings.LETTERS, "shapes": drawings.COLOURED_SHAPES}[kind]
    results = stages.read_json(folders["model"] / "eval_results.json")
    assert len(results["classes"]) == len(results["confusion_matrix"]) == len(classes)
    assert results["Accuracy"] < 100
    images_of = {"fashion": (55_000, 10_000), "letters": (26 * (60 - 9 - 5), 26 * 9), "shapes": (6 * 55, 60)}[kind]
    assert stages.results(folders["model"])["training_images"] == images_of[0]
    assert sum(sum(row) for row in results["confusion_matrix"]) == images_of[1]
    samples = stages.read_json(folders["model"] / "predictions.json")["predictions"]
    assert {len(sample["probabilities"]) for sample in samples} == {len(classes)}
    names = {path.name for path in (folders["model"] / "results").iterdir()}
    assert names == {f"{sample['prediction']}_{sample['index']}.png" for sample in samples}


@pytest.mark.parametrize("trial", ["shapes"], indirect=True)  # fashion's 10,000 images take a minute
def test_an_export_follows_the_data_set(trial, tmp_path):
    _, folders = trial
    volume = shutil.copytree(folders["model"], tmp_path / "volume")
    stages.assert_succeeds(stages.run("evaluate", "--export", **folders | {"model": volume}))
    file = onnx.load(volume / "export/model.onnx")
    (images,), (output,) = (
        [value.type.tensor_type.shape.dim for value in part] for part in (file.graph.input, file.graph.output)
    )
    assert [side.dim_value for side in images[1:]] == [32, 32, 3]
    assert output[1].dim_value == 6
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    assert (metadata["data_set"], json.loads(metadata["classes"])) == ("shapes", [*drawings.COLOURED_SHAPES])
    assert "Measured" not in (volume / "export/README.md").read_text()  # which is of digits


def test_a_finished_training_is_left_as_it_is_until_its_data_change(trial):
    kind, folders = trial
    with stages.unchanged(folders["model"]):
        stages.assert_succeeds(stages.run("train", **folders))
    if kind != "fashion":
        (picture, *_) = (folders["data"] / kind / "train").rglob("0.png")
        content = picture.read_bytes()
        Image.new("RGB", (40, 30)).save(picture)
        stages.assert_fails(stages.run("train", **folders), 2, "other data", "--fresh")
        picture.write_bytes(content)


# The code ------------------------------------------------------------------------------------------------------------

EDITS = {
    "net.py": ("model-train/net.py", "F.relu(self.fc1", "F.tanh(self.fc1"),
    "hogwild.py": ("model-train/hogwild.py", "WARMUP_FRACTION = 0.2", "WARMUP_FRACTION = 0.3"),
    "DATA_SET": ("model-train/stage/dataset.py", "pixel_mean=0.1307", "pixel_mean=0.5"),
}


@pytest.fixture
def tree(tmp_path):
    """A copy of the tree with MNIST."""
    return stages.copy_tree(tmp_path / "tree")


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("state", ["volume", "unfinished"])
def test_code_that_changed_since_a_training_is_named_and_nothing_is_touched(request, data, tree, state, name):
    folder = request.getfixturevalue(state)
    path, *change = EDITS[name]
    replace_in(tree / path, *change)
    with stages.unchanged(folder):
        stages.assert_fails(stages.run("train", model=folder, tree=tree), 2, name, "--fresh")


@pytest.mark.parametrize(("stage", "name"), [("evaluate", "net.py"), ("infer", "DATA_SET")])
def test_a_stage_whose_copies_are_old_names_make_copies(data, tree, volume, stage, name):
    path, *change = EDITS[name]
    replace_in(tree / path.replace("model-train", stages.FOLDERS[stage]), *change)
    with stages.unchanged(volume):
        stages.assert_fails(stages.run(stage, model=volume, tree=tree), 1, name, "make copies")
    (volume / "train_results.json").unlink()  # a model from elsewhere is used
    least = ("--min-accuracy", "0") if stage == "evaluate" else ()
    stages.assert_succeeds(stages.run(stage, *least, model=volume, tree=tree))


@pytest.mark.parametrize(
    ("stage", "name", "file", "old", "new"),
    [
        ("evaluate", "net.py", "net.py", "nn.Conv2d(10, 20, kernel_size=5)", "nn.Conv2d(10, 20, kernel_size=3)"),
        ("infer", "DATA_SET", "stage/dataset.py", 'tuple("0123456789")', 'tuple("0123456789a")'),
    ],
)
def test_make_copies_is_also_named_if_the_old_copies_network_has_another_shape(
    tree, volume, stage, name, file, old, new
):
    replace_in(tree / stages.FOLDERS[stage] / file, old, new)
    stages.assert_fails(stages.run(stage, model=volume, tree=tree), 1, name, "make copies")


# Parts that are removed -----------------------------------------------------------------------------------------------

# What the recipes have removed by hand, as patterns in which a dot can be the end of a line.
BY_HAND = {
    "the page": {
        "docker-compose.yml": ["  # Not a stage: the page.*?\n\n"],
        "model-infer/Dockerfile.infer": [
            *("# What serve needs.*?\n\n", "COPY --from=serve.*?\n", "ENV PYTHONPATH=/opt/serve\n"),
            "COPY --chmod=755 web .*?\n",
        ],
        "Makefile": [" serve(?= )", "\nserve:.*?\n\n", "model-infer/requirements-serve.txt ", " tests/prometheus.py"],
        "tests/bench/bench.py": [
            *("import serving\n", "def run_services.*?\n\n\n", ' +"services": .*?\n'),
            r" +print\(report.service_table.*?\n",
        ],
        "tests/test_tree.py": [', "web"'],
        "tests/containers/test_sbom.py": [', "infer": "/opt/serve"'],
    },
    "several nodes": {
        "model-train/train.py": ["if TYPE_CHECKING.*?\n\n", r" +if settings.is_node.*?train\)\n", *3 * [r" \| Nodes"]],
        "model-train/training/settings.py": [" +sync_every.*? = 20\n", "def is_node.*?\n\n\n"],
        "model-train/training/first_look.py": [" +if settings.is_node.*? return\n"],
        "model-train/stage/process.py": [" +elif [^\n]*SLURM_JOB_ID.*?\n.*?\n"],
        "model-train/Dockerfile.train": ["COPY --chmod=755 cluster .*?\n"],
        "Makefile": [" cluster-test", " scaling(?=\n)", "cluster-test:.*?\n\n", "scaling:.*?\n\n"],
        "tests/test_tree.py": [', "cluster"'],
        "tests/containers/conftest.py": [', "slurm"', r" +docker\([^\n]*-slurm.*?\n", "@pytest.fixture\ndef cluster.*"],
    },
}


@pytest.mark.parametrize("part", BY_HAND)
def test_a_part_that_is_not_needed_is_removed_by_a_recipe(finished, tmp_path, part):
    but = shutil.ignore_patterns(".git", ".venv", "*_cache*", "data", "model", "out")
    shutil.copytree(stages.TREE, tmp_path, ignore=but, dirs_exist_ok=True)
    (tmp_path / "data").symlink_to(stages.DATA)
    run = partial(subprocess.run, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    recipe = (tmp_path / "docs/your-own.md").read_text().partition(f"# Without {part}\n")[2].partition("\n#")[0]
    gone = {*tmp_path.rglob("*.py")}
    run("\n".join(re.findall("^    (.*)", recipe, re.MULTILINE)), shell=True)
    gone -= {*tmp_path.rglob("*.py")}
    for name, patterns in BY_HAND[part].items():
        assert f"`{name}`" in recipe
        text = (tmp_path / name).read_text()
        for pattern in patterns:
            text, found = re.subn(pattern, "", text, count=1, flags=re.DOTALL)
            assert found, f"{name}: {pattern}"
        (tmp_path / name).write_text(text)
    run(["make", "--silent", "copies"])
    run([Path(sys.executable).with_name("ruff"), "check", "--fix", "--no-cache", "."])
    names = {path.parent.name if path.stem == "__init__" else path.stem for path in gone}
    for path in tmp_path.glob("[mt]*/**/*.py"):
        imported = re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert not names & {*imported}, path
    run(["make", "--dry-run", "local", "tools-test", "bench", "chaos"])
    stages.assert_succeeds(stages.run("train", "--dry-run", model=tmp_path / "model", tree=tmp_path))
    stages.assert_succeeds(stages.run("infer", model=shutil.copytree(finished, tmp_path / "volume"), tree=tmp_path))


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def choose(monkeypatch):
    """A function that makes another data set that of this process."""

    def choose(data_set):
        for module in (images, download, code):
            monkeypatch.setattr(module, "DATA_SET", data_set)

    return choose


def write_raw(data, data_set, labels=None, count=78):
    """Writes small raw files of a data set: image n is dark but for one pixel in row 1, column 5."""
    folder = data / data_set.folder
    folder.mkdir(parents=True)
    labels = (
        [data_set.first_label + index % len(data_set.classes) for index in range(count)] if labels is None else labels
    )
    pixels = bytearray(28 * 28)
    pixels[28 + 5] = 255
    for name in data_set.sha256:
        content = struct.pack(">4B3I", 0, 0, 8, 3, len(labels), 28, 28) + bytes(pixels) * len(labels)
        if "labels" in name:
            content = struct.pack(">4B1I", 0, 0, 8, 1, len(labels)) + bytes(labels)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(("data_set", "pixel"), [(EMNIST_LETTERS, (5, 1)), (KMNIST, (1, 5))], ids=["EMNIST", "KMNIST"])
def test_raw_files_whose_sha256_is_not_known_are_read_by_their_headers(choose, tmp_path, data_set, pixel):
    choose(data_set)
    write_raw(tmp_path, data_set)
    read = read_data(tmp_path)
    assert read.sha256 == {name: stages.sha256(tmp_path / data_set.folder / name) for name in data_set.sha256}
    pictures, labels = images.to_tensors(read)
    assert pictures.shape == (78, 28, 28)
    assert pictures[0].nonzero().tolist() == [[*pixel]]
    assert labels.tolist()[:3] == [0, 1, 2]
    assert labels.max() == len(data_set.classes) - 1


def test_a_packed_file_of_the_wrong_md5_and_files_of_another_data_set_are_not_used(choose, tmp_path):
    choose(KMNIST)
    write_raw(tmp_path, MNIST)
    name = next(iter(KMNIST.sha256))
    (tmp_path / "KMNIST/raw").mkdir(parents=True)
    (tmp_path / "KMNIST/raw" / f"{name}.gz").write_bytes(gzip.compress((tmp_path / MNIST.folder / name).read_bytes()))
    assert download.use_what_is_there(tmp_path) == [*KMNIST.sha256]


WRONG_LABELS = {
    "more labels than classes": ([1, 2, 27] * 30, "1 to 27"),
    "a label under the first": ([0, 1, 2] * 30, "0 to 2"),
    "a class without images": ([1, 2] * 30, "fewer than 2 images of: c, d"),
}


@pytest.mark.parametrize(("labels", "words"), WRONG_LABELS.values(), ids=WRONG_LABELS.keys())
def test_labels_that_do_not_fit_the_classes_are_refused_in_one_line(choose, tmp_path, labels, words):
    choose(EMNIST_LETTERS)
    write_raw(tmp_path, EMNIST_LETTERS, labels)
    with pytest.raises(Failure, match=rf"{words}.*make copies"):
        read_data(tmp_path)


def test_a_raw_file_of_another_size_of_images_is_refused(choose, tmp_path):
    choose(dataclasses.replace(KMNIST, shape=(1, 32, 32)))
    write_raw(tmp_path, KMNIST)
    with pytest.raises(Failure, match="32 x 32"):
        images.read_all(tmp_path)


def test_a_data_set_that_torchvision_does_not_know_is_one_line_that_says_where_its_files_belong(choose, tmp_path):
    choose(dataclasses.replace(KMNIST, name="Unknown"))
    with pytest.raises(Failure, match=r"torchvision has no.*Unknown/raw/train-images-idx3-ubyte does not exist"):
        read_data(tmp_path)


def test_folders_of_pictures_that_do_not_fit_the_classes_are_refused_in_one_line(choose, tmp_path):
    choose(SHAPES)
    with pytest.raises(Failure, match=r"shapes/train does not exist.*shapes/train/CLASS"):
        read_data(tmp_path)
    drawings.draw_folder(tmp_path / "shapes", SHAPES.classes[:5], drawings.draw_shape, train=2)
    with pytest.raises(Failure, match=r"folders named .*'red circle'.*make copies"):
        read_data(tmp_path)
    (tmp_path / "shapes/train" / SHAPES.classes[5]).mkdir()
    with pytest.raises(Failure, match=f"fewer than 2 images of: .*{SHAPES.classes[5]}"):
        read_data(tmp_path)
    drawings.draw_folder(tmp_path / "shapes", SHAPES.classes, drawings.draw_shape, test=0)
    with pytest.raises(Failure, match="no test images"):
        read_data(tmp_path)


@pytest.mark.parametrize("fault", ["damaged", "16 bits"])
def test_a_picture_that_cannot_be_read_as_it_is_is_named(choose, tmp_path, fault):
    choose(SHAPES)
    drawings.draw_folder(tmp_path / "shapes", SHAPES.classes, drawings.draw_shape, train=4)
    broken = tmp_path / "shapes/train" / SHAPES.classes[2] / "1.png"
    if fault == "damaged":
        broken.write_bytes(broken.read_bytes()[:200])
    else:
        Image.new("I;16", (32, 32), 40_000).save(broken)
    with pytest.raises(Failure, match=f"{broken} is not a picture that can be read"):
        read_data(tmp_path)


def test_pictures_of_other_sizes_and_colours_become_those_of_the_data_set(choose, tmp_path):
    choose(SHAPES)
    drawings.draw_folder(tmp_path / "shapes", SHAPES.classes, drawings.draw_shape, train=8)
    folder = tmp_path / "shapes/train" / SHAPES.classes[0]
    for number, picture in enumerate([("L", (50, 20), 200), ("RGBA", (32, 32), (200, 0, 0, 255)), ("P", (9, 9), 3)]):
        Image.new(*picture).save(folder / f"{number}.png")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    pictures, labels = images.read_images(tmp_path, "train")
    assert pictures.shape == (6 * 6, 32, 32, 3)
    assert labels.bincount().tolist() == [6] * 6


@pytest.mark.parametrize("count", [2, 7, 20, 120])
def test_every_class_is_in_each_split_and_no_image_in_two(choose, tmp_path, count):
    choose(LETTERS)
    pictures = torch.arange(26 * count)[:, None, None].expand(-1, 2, 2)
    labels = torch.arange(26).repeat_interleave(count)
    (training, of_training), (validation, of_validation) = images.split_validation(pictures, labels)
    assert of_validation.bincount().tolist() == [-(-count // 12)] * 26
    assert len(of_training) == 26 * (count - -(-count // 12))
    assert {*training[:, 0, 0].tolist()} & {*validation[:, 0, 0].tolist()} == set()
    assert images.split_validation(pictures, labels)[1][0].equal(validation)


# The tree -------------------------------------------------------------------------------------------------------------

TASK_NUMBERS = {28, 10, 784, 5_000, 55_000, 60_000}
TENS = {  # where 10 is not the number of classes
    "data/fetch.py": "seconds",
    "model-train/training/plan.py": "tenths of an epoch",
    "model-infer/infer.py": "pictures in a row, a font size",
    "model-infer/web/connections.py": "seconds",
    "model-infer/pictures/heic.py": "the place of a byte",
    "model-infer/pictures/opening.py": "bytes a pixel",
    "model-infer/pictures/own.py": "inches",
    "model-infer/pictures/preparation.py": "pixels, in the preparation of digits for MNIST",
    "model-infer/web/request_limits.py": "seconds",
    "model-infer/web/metrics.py": "seconds",
}


@pytest.mark.parametrize("folder", ["data", *stages.FOLDERS.values()])
def test_the_numbers_of_mnist_stand_in_its_entry_alone(folder):
    found = []
    for path in {*(stages.TREE / folder).rglob("*.py")} - {*(stages.TREE / folder).glob("*/dataset.py")}:
        name, tree = str(path.relative_to(stages.TREE)), ast.parse(path.read_text())
        powers = {node.left for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)}
        for node in {*ast.walk(tree)} - powers if path.name != "net.py" else ():
            if isinstance(node, ast.Constant) and type(node.value) is int and node.value in TASK_NUMBERS:
                if not (node.value == 10 and name in TENS):
                    found.append(f"{name}:{node.lineno}: {node.value}")
            elif isinstance(node, ast.Attribute) and node.attr == "fc2":
                found.append(f"{name}:{node.lineno}: fc2")
    assert found == []
