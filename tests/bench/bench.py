"""Measures the pipeline against PyTorch's mnist_hogwild example, everything in containers, and prints one table.

Reads   the repository, whose images it builds, and data
Writes  tests/bench/out/bench.json: every run, and the table; after every run, so that nothing is lost
        tests/bench/out/bench.png: accuracy against seconds

    make bench
    .venv/bin/python tests/bench/bench.py --quick

The reference (reference.py) trains as the example does, in the train image, on as many passes as it needs for its final
accuracy. It is never timed with its imports: its seconds are those from the first batch to the last. The pipeline's
are that too where the table says so, else those from its container's start to its exit.

Each seed is a round in which everything is measured once, so that a machine that is busy for a while slows down all
alike. The table has medians over the seeds, and of accuracies, always those of the test images by evaluate, the mean.
Every training has a volume of its own. The whole takes half an hour on two cores. An interrupted run goes on with
--resume. With --quick it takes two minutes, the reference is measured on two epochs and extrapolated to ten, and the
example with its default number of threads is left out.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import containers
import report

# The flags of train that reach the example's accuracy soonest, and those of people who give none.
RECIPES = {"quick": ["--epochs", "1", "--batch-size", "32", "--lr", "0.07"], "default": []}
CURVE_EPOCHS, CURVE_SEEDS = (2, 4, 8), 1  # further points of the plot
STAGE_REPEATS = 3


def main():
    """Builds the images, does the runs that are missing, and writes the report."""
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it too leaves nothing behind
    with containers.project():
        results = begin(args)
        try:
            measure(results, args)
        except KeyboardInterrupt:
            print("bench: interrupted; go on with --resume", file=sys.stderr)
    print(report.as_table(results["rows"]))
    report.warn_of_load(results["runs"])
    report.draw(results["runs"], args.output.with_suffix(".png"))


def measure(results, args):
    """Does the runs that are missing, and keeps each."""
    done = {(run["kind"], run["seed"]) for run in results["runs"]}
    plan = [*plan_rounds(args)]
    for place, (kind, seed, measure_one) in enumerate(plan, 1):
        if (kind, seed) not in done:
            results["runs"].append({"kind": kind, "seed": seed} | measure_one(seed))
            write(args.output, results)
            print(f"bench: {place} of {len(plan)}: {report.say(results['runs'][-1])}", flush=True)


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures the pipeline against PyTorch's mnist_hogwild example.")
    parser.add_argument("--quick", action="store_true", help="take two minutes: one seed, the reference extrapolated")
    parser.add_argument("--seeds", type=int, metavar="N", help="rounds (default: 5; with --quick: 1)")
    text = "rounds that measure the reference too (default: all)"
    parser.add_argument("--reference-seeds", type=int, metavar="N", help=text)
    text = "epochs of the reference; fewer than ten are extrapolated (default: 10; with --quick: 2)"
    parser.add_argument("--reference-epochs", type=int, metavar="N", help=text)
    default = Path(__file__).parent / "out/bench.json"
    text = "JSON file to write; the plot gets the same name (default: tests/bench/out/bench.json)"
    parser.add_argument("--output", type=Path, default=default, metavar="PATH", help=text)
    parser.add_argument("--resume", action="store_true", help="do the runs that the JSON file has not got yet")
    args = parser.parse_args()
    args.seeds = args.seeds or (1 if args.quick else 5)
    args.reference_epochs = args.reference_epochs or (2 if args.quick else 10)
    if args.reference_seeds is None:
        args.reference_seeds = args.seeds
    return args


def begin(args):
    """The results without a run, or on resuming those in the file."""
    inspect = ["image", "inspect", "--format", "{{.Id}}", *containers.IMAGES.values()]
    images = dict(zip(containers.IMAGES, containers.docker(*inspect).split(), strict=True))
    if args.resume and args.output.exists():
        results = json.loads(args.output.read_text())
        if (results["images"], results["quick"]) != (images, args.quick):
            sys.exit(f"bench: the runs in {args.output} are of other images or flags. Begin anew, without --resume.")
        return results
    args.output.parent.mkdir(parents=True, exist_ok=True)
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "quick": args.quick,
        "recipes": {name: " ".join(flags) for name, flags in RECIPES.items()},
        "compared": compared(args),
        "images": images,
        "sizes": containers.image_sizes(),
        "runs": [],
        "rows": [],
    }


def describe_machine():
    """What the figures depend on."""
    name = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    engine = containers.docker("version", "--format", "{{.Server.Version}}").strip()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "engine": engine,
    }


def write(path, results):
    """Brings the table up to date, and writes it with all runs."""
    results["rows"] = report.make_rows(results)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    part.rename(path)


# What is run --------------------------------------------------------------------------------------------------------


def plan_rounds(args):
    """Every run, round by round: its kind, its seed, and what measures it, given the seed."""
    one_worker = [*RECIPES[compared(args)], "--num-processes", "1"]
    for seed in range(1, args.seeds + 1):
        if seed <= args.reference_seeds:
            yield "reference", seed, partial(run_reference, args.reference_epochs, ["OMP_NUM_THREADS=1"])
        for kind, flags in RECIPES.items():
            yield kind, seed, partial(run_training, flags)
        yield "one worker", seed, partial(run_training, one_worker)
        yield "two threads", seed, partial(run_training, one_worker, program="two_threads")
        yield "stages", seed, run_stages
        if seed <= args.reference_seeds and not args.quick:
            yield "reference as it comes", seed, partial(run_reference, 1, [])
        if seed <= CURVE_SEEDS and not args.quick:
            for epochs in CURVE_EPOCHS:
                yield f"{epochs} epochs", seed, partial(run_training, ["--epochs", str(epochs)])


def compared(args):
    """The recipe on which different numbers of workers are compared."""
    return "quick" if args.quick else "default"


def run_reference(epochs, environment, seed):
    """The reference: seconds, test accuracy, both also by epoch, and peaks of memory."""
    command = [*python("reference"), "--data", "/opt/mount/data", "--epochs", str(epochs), "--seed", str(seed)]
    environment = [*environment, "TMPDIR=/opt/mount/model"]  # torchvision asks for a folder to write to
    with containers.new_volume() as volume:
        taken = containers.run("train", command, volume, environment, watched=True)
    results = json.loads(taken.pop("output").splitlines()[-1])
    return taken | results | {"accuracy": results["history"][-1]["accuracy"], "epochs": epochs}


def run_training(recipe, seed, program=None):
    """A training of ours: seconds, images/s, test accuracy, peaks of memory."""
    flags = [*recipe, "--seed", str(seed)]
    command = [*python(program), *flags] if program else flags
    with containers.new_volume() as volume:
        taken = containers.run("train", command, volume, watched=True, reads="train_results.json")
        judged = containers.run("evaluate", ["--min-accuracy", "0"], volume, reads="eval_results.json")
    results = taken.pop("file")
    del taken["output"]
    return taken | {
        "flags": flags,
        "settings": results["settings"],
        "epochs": results["settings"]["epochs"],
        "seconds": results["seconds"],
        "images_per_second": results["images_per_second"],
        "accuracy": judged["file"]["Accuracy"],
        "versions": results["versions"],
    }


def run_stages(seed):
    """Evaluate and infer, each beside the mere import of torch in its own container, and judging by itself."""
    taken = {}
    with containers.new_volume() as volume:
        containers.run("train", [*RECIPES["quick"], "--seed", str(seed)], volume)
        for _ in range(STAGE_REPEATS):
            for stage, flags in (("evaluate", ["--min-accuracy", "0"]), ("infer", [])):
                for name, command in ((stage, flags), (f"import in {stage}", ["python", "-c", "import torch"])):
                    seconds = containers.run(stage, command, volume)["container_seconds"]
                    taken.setdefault(name, []).append(seconds)
        judging = containers.run("evaluate", python("judging"), volume)
    return {name: statistics.median(seconds) for name, seconds in taken.items()} | json.loads(judging["output"])


def python(program):
    """The command of one of the benchmark's own programs, in a container."""
    return ["python", f"/opt/bench/{program}.py"]


if __name__ == "__main__":
    main()
