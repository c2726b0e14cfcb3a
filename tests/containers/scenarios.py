"""What is done to a training or another stage in containers, and what must hold then: the crash contract.

Each function takes a volume that all stages have run on, which it may change. Tests run some of them once, chaos.py all
of them many times.
"""

import time
from signal import SIGKILL

import pipeline
import stages
from pipeline import MODEL, OFTEN, Container, Pipeline, docker, output_of

LONG = ("--epochs", "100")  # flags for a training of 15 epochs to go on for long
FLAGS = {"train": ("--epochs", "16"), "evaluate": (), "infer": ()}  # for a stage to have something to do, but not much
PARTS = {  # what is there only while a stage publishes
    "train": [".checkpoint.pt.part", ".train_results.json.part", ".training.png.part", ".mnist_cnn.pt.part"],
    "evaluate": [".confusion_matrix.png.part", ".mistakes.png.part", ".eval_results.json.part"],
    "infer": [".results.new", ".predictions.json.part", ".predictions.png.part"],
}
MOST_SECONDS_LOST = 5
MOST_SECONDS_TO_STOP = 3

# Kills a process, with the engine's rights, at the instant in which a file is there; fails if it ends before.
KILL_ON_FILE = """
import os, sys, time
while not os.path.lexists(sys.argv[2]):
    os.kill(int(sys.argv[1]), 0)
    time.sleep(0.00005)
os.kill(int(sys.argv[1]), 9)
"""


def kill_once_there_is(container, project, file):
    """Kills a container of the project at the instant in which a file is in the volume; True if it did."""
    options = ("--rm", "--pid", "host", "--network", "none", "--volume", f"{project.name}_mnist:{MODEL}")
    script = ("--entrypoint", "python", pipeline.image("train"), "-c", KILL_ON_FILE)
    return docker("run", *options, *script, container.state()["Pid"], f"{MODEL}/{file}").returncode == 0


def kill_training(project, volume, *flags, wait=lambda train: None):
    """Kills a training after `wait`, checks what it leaves, and returns how its container ended.

    It writes train_results.json when it begins to train, and checkpoints as soon as the workers rest. So what is lost
    is the time since the last of these files was written.
    """
    before = stages.batches_saved(volume)
    train = project.start("train", *flags)
    wait(train)
    train.send(SIGKILL)
    ended = train.end()
    assert ended.returncode in (0, 128 + SIGKILL)
    stages.assert_whole(volume)
    assert stages.batches_saved(volume) >= before
    files = [volume / name for name in ("train_results.json", "checkpoint.pt")]
    written = max((file.stat().st_mtime for file in files if file.exists()), default=0)
    has_begun_to_train = written > ended.began
    assert not has_begun_to_train or ended.ended - written <= MOST_SECONDS_LOST
    return ended


def kill_while_publishing(volume, stage):
    """Kills a stage at the instant in which it writes a file, with each of its files in turn; then runs it."""
    names = {path.name for path in volume.iterdir()}
    with Pipeline(volume) as project:
        for file in PARTS[stage]:
            container = project.start(stage, *FLAGS[stage])
            assert kill_once_there_is(container, project, file)
            container.end()
            stages.assert_whole(volume)
        assert project.run(stage, *FLAGS[stage]).returncode == 0
    after = {path.name for path in volume.iterdir()}
    assert after >= names
    assert not any(name.startswith(".") for name in after - stages.LOCKS)


def stop_training(volume, number, wait=Container.wait_until_it_trains, data=None):
    """Sends a signal to a training after `wait`; data is a data folder other than that of the tree."""
    before = stages.batches_saved(volume)
    with Pipeline(volume, data) as project:
        train = project.start("train", *LONG, *OFTEN)
        wait(train)
        asked = time.time()
        train.send(number)
        ended = train.end()
    assert ended.returncode == 128 + number
    assert ended.ended - asked < MOST_SECONDS_TO_STOP
    assert len(ended.stderr.splitlines()) <= 1, ended
    stages.assert_whole(volume)
    assert stages.batches_saved(volume) >= before


def fill_disk(volume, left):
    """Trains on a full disk that has a copy of the volume and some kB left, and again when there is space."""
    with Pipeline(disk="4m") as project:
        output_of("cp", f"{volume}/.", f"{project.helper.id}:{MODEL}")
        project.shell(f"dd if=/dev/zero of=filler bs=4k 2>&1; truncate -s -{left}k filler")
        stages.assert_fails(project.run("train", *FLAGS["train"]), 1, "No space")
        project.shell("rm filler")
        copy = project.copy_out(volume.with_name("copy"))
        before, after = stages.contents(volume), stages.contents(copy)
        for found in (before, after):
            found.pop("train_results.json")  # may name the training that has been resumed
        assert after == before
        stages.assert_whole(copy)
        stages.assert_succeeds(project.run("train", *FLAGS["train"]))


MOMENTS = 14  # of an export, besides those of its publication
PARTS_OF_EXPORT = ["", *(f"/.{name}.part" for name in ("model.safetensors", "model.onnx", "README.md")), "/README.md"]
READ_TEST = 'images, labels = read_images(args.data, "test")'


def kill_exports(volume, folder):
    """Kills exports at many moments: the volume must have the old export or the new one. Each is of other images."""

    def project_of(count):
        """A project whose export reads only so many images: comparing all takes long."""
        text = (stages.TREE / "model-eval/evaluate.py").read_text()
        assert text.count(READ_TEST) == 1
        program = folder / "evaluate.py"
        program.write_text(text.replace(READ_TEST, f"images, labels = (p[:{count}] for p in {READ_TEST[17:]})"))
        mount = {"volumes": [f"{program}:/opt/app/evaluate.py:ro"]}
        return Pipeline(volume, export=mount)

    def count_exported():
        card = (volume / "export/README.md").read_text()
        return int(card.partition("On the ")[2].partition(" ")[0])

    with project_of(20) as project:
        first = project.run("export", "--min-accuracy", "0")
    stages.assert_succeeds(first)
    names, found = {path.name for path in (volume / "export").iterdir()}, [20]
    moments = [first.seconds * (number + 0.5) / MOMENTS for number in range(MOMENTS)]
    for count, moment in enumerate([*moments, *PARTS_OF_EXPORT, "/model.onnx"], 21):
        with project_of(count) as project:
            container = project.start("export", "--min-accuracy", "0")
            if isinstance(moment, float):
                time.sleep(moment)
                container.send(SIGKILL)
            else:
                killed = kill_once_there_is(container, project, f".export.new{moment}")
                assert killed or moment == "/README.md"  # the last file, after which the folder is renamed at once
            assert container.end().returncode in (0, 128 + SIGKILL)
        assert {path.name for path in (volume / "export").iterdir()} == names
        assert count_exported() in (found[-1], count)
        found.append(count_exported())
        for path in (volume / "export").glob("model.*"):
            assert path.stat().st_size > 80_000
    return found
