"""Measures the pipeline against PyTorch's mnist_hogwild example, everything in containers, and prints a table.

Writes  tests/bench/out/bench.json (with --quick: quick.json): all runs and the table, after every run
        tests/bench/out/bench.png (with --quick: quick.png): accuracy against seconds

README.md says what is measured and how, and which commands there are.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import report
import serving

import containers  # puts the folders of the next ones in the path
import pipeline
from pipeline import Pipeline
from stage.files import publish
from stages import DATA, STAGES, command

OUTPUT = Path(__file__).parent / "out"
# The flags of train: what reaches the example's accuracy soonest, the defaults, the most accurate that takes no longer
# than the example, and the example's own recipe, with as many passes over the images as its 10 epochs with 2 workers
# that each walk the whole data set.
RECIPES = {
    "one epoch": "--epochs 1 --batch-size 48 --lr 0.09",
    "default": "",
    "most accurate": "--epochs 70 --averaging 0.25",
    "example": "--dropout 0.5 --batch-size 64 --lr 0.01 --momentum 0.5 --schedule constant --weight-decay 0 "
    "--max-grad-norm 1000000 --augmentation 0 --epochs 20",
}
CURVE_EPOCHS = (2, 4, 8)  # further points of the plot, with one seed
STAGE_REPEATS = 3
SPEEDS = "/opt/tests/bench/speeds.py"
# In place of train.py: two torch threads in each worker, not in their parent, which forks them.
TWO_THREADS = """
import os, runpy, sys, torch
sys.path.insert(0, "/opt/app")
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(2))
runpy.run_path("/opt/app/train.py", run_name="__main__")
"""


def main():
    """Builds the images, does the runs that are missing, and writes table and plot."""
    args = parse_args()
    path = OUTPUT / ("quick.json" if args.quick else "bench.json")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it removes its containers then too
    try:
        pipeline.build()
        results = begin(path, args)
        measure(results, path, args)
    except KeyboardInterrupt:
        sys.exit("bench: interrupted; continue with --resume")
    finally:
        pipeline.remove_images()
    print(report.describe_machine(results))
    print(report.as_table(report.make_rows(results)))
    print(report.describe_limit(results["runs"]))
    print(report.service_table(results["runs"]))
    report.warn_of_load(results["runs"])
    report.draw(results["runs"], path.with_suffix(".png"))


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures the pipeline against PyTorch's mnist_hogwild example.")
    text = "take a few minutes: one seed, the example extrapolated from two epochs, no run of the example's recipe"
    parser.add_argument("--quick", action="store_true", help=text)
    parser.add_argument("--seeds", type=int, metavar="N", help="rounds (default: 5; with --quick: 1)")
    parser.add_argument("--resume", action="store_true", help="do only the runs that are not in the JSON file yet")
    args = parser.parse_args()
    args.seeds = args.seeds or (1 if args.quick else 5)
    args.compared = "one epoch" if args.quick else "default"  # the recipe for comparing numbers of workers
    return args


def begin(path, args):
    """The results before the first run, or on resuming those in the file."""
    images = {stage: pipeline.inspect(pipeline.image(stage))["RootFS"]["Layers"] for stage in STAGES}
    if args.resume and path.exists():
        results = json.loads(path.read_text())
        if results["images"] != images:
            sys.exit(f"bench: the runs in {path} are of other images. Start over, without --resume.")
        return results
    path.parent.mkdir(exist_ok=True)
    return {
        "cpu": re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text() + "\nmodel name: unknown", re.M)[1],
        "cores": os.cpu_count(),
        "recipes": RECIPES,
        "compared": args.compared,
        "images": images,
        "sizes": containers.image_sizes(),
        "runs": [],
    }


def measure(results, path, args):
    """Does the runs that are missing, and saves each."""
    done = {(run["kind"], run["seed"]) for run in results["runs"]}
    plan = [*plan_runs(args)]
    for place, (kind, seed, measure_one) in enumerate(plan, 1):
        if (kind, seed) in done:
            continue
        run = {"kind": kind, "seed": seed} | measure_one(seed)
        results["runs"].append(run)
        content = json.dumps(results | {"rows": report.make_rows(results)}, indent=1)
        publish(path, content.encode())
        print(f"bench: {place} of {len(plan)}: {kind}, seed {seed}", flush=True)


def plan_runs(args):
    """Every run, round by round: its kind, its seed, and what measures it, given the seed."""
    one_worker = f"{RECIPES[args.compared]} --num-processes 1"
    kinds = {
        "reference": partial(run_reference, report.EPOCHS, ["OMP_NUM_THREADS=1"]),
        **{name: partial(run_training, flags) for name, flags in RECIPES.items()},
        "one worker": partial(run_training, one_worker),
        "two threads": partial(run_training, one_worker, program=("-c", TWO_THREADS)),
        "matrices": run_matrices,
        **{peer: partial(run_peer, peer) for peer in report.PEERS},
        "stages": run_stages,
        "services": run_services,
        "reference, default threads": partial(run_reference, 1, []),
    }
    if args.quick:
        kinds["reference"] = partial(run_reference, 2, ["OMP_NUM_THREADS=1"])
        del kinds["most accurate"], kinds["example"], kinds["reference, default threads"]
    for seed in range(1, args.seeds + 1):
        for kind, measure_one in kinds.items():
            yield kind, seed, measure_one
    for epochs in () if args.quick else CURVE_EPOCHS:
        yield f"{epochs} epochs", 1, partial(run_training, f"--epochs {epochs}")


def run_reference(epochs, environment, seed):
    """The example: seconds, test accuracy, both also by epoch, and peaks of memory."""
    arguments = ["/opt/tests/bench/reference.py", "--data=/opt/mount/data", f"--epochs={epochs}", f"--seed={seed}"]
    environment = [*environment, "TMPDIR=/opt/mount/model"]  # torchvision needs a folder to write to
    with Pipeline() as project:
        run = containers.run(project, "train", *arguments, environment=environment, watched=True)
    results = json.loads(run.pop("output").splitlines()[-1])
    return run | results | {"accuracy": results["history"][-1]["accuracy"], "epochs": epochs}


def run_training(flags, seed, program=("/opt/app/train.py",)):
    """A training of the pipeline: seconds, images/s, test accuracy, peaks of memory."""
    with Pipeline() as project:
        run = containers.run(project, "train", *program, *flags.split(), f"--seed={seed}", watched=True)
        containers.run(project, "evaluate", "/opt/app/evaluate.py", "--min-accuracy=0")
        record, evaluation = (json.loads(project.shell(f"cat {stage}_results.json")) for stage in ("train", "eval"))
    del run["output"]
    run |= {name: record[name] for name in ("settings", "seconds", "images_per_second", "precision", "versions")}
    return run | {"epochs": record["settings"]["epochs"], "accuracy": evaluation["Accuracy"]}


def run_matrices(seed):
    """The speed of matrix products on one core, which no training can exceed."""
    with Pipeline() as project:
        return json.loads(containers.run(project, "train", SPEEDS, "matrices")["output"])


def run_peer(peer, seed):
    """A peer, which no image contains: it runs in the virtual environment of the benchmark."""
    command = [sys.executable, Path(__file__).with_name("peers.py"), peer, f"--data={DATA}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_stages(seed):
    """Evaluate and infer, each beside the mere import of torch in its container, and predicting alone."""
    commands = {f"import in {stage}": (stage, "-c", "import torch") for stage in STAGES}
    commands["evaluate"] = ("evaluate", "/opt/app/evaluate.py", "--min-accuracy=0")
    commands["infer"] = ("infer", "/opt/app/infer.py")
    seconds = {name: [] for name in commands}
    with Pipeline() as project:
        containers.run(project, "train", "/opt/app/train.py", *RECIPES["one epoch"].split(), f"--seed={seed}")
        for _ in range(STAGE_REPEATS):
            for name, words in commands.items():
                seconds[name].append(containers.run(project, *words)["container_seconds"])
        predicting = containers.run(project, "evaluate", SPEEDS, "predict_all")
    return {name: statistics.median(times) for name, times in seconds.items()} | json.loads(predicting["output"])


def run_services(seed):
    """The service as a process, and what one might write instead: latency, predictions/s, refusals, by service."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (*RECIPES["one epoch"].split(), f"--seed={seed}")
        subprocess.run(command("train", *flags, model=folder), check=True, stdout=subprocess.DEVNULL)
        return serving.measure_services(Path(folder), DATA)


if __name__ == "__main__":
    main()
