"""How far training on several nodes carries: measured for one and two nodes, modelled for more. See docs/cluster.md.

    make scaling                            # measures, simulates, and draws docs/scaling.png
    make scaling FLAGS=measure              # pairs of trainings in containers, on one node and on two, a core each
    make scaling FLAGS=simulate             # the accuracy of up to 64 nodes, with real SGD in one process
    make scaling FLAGS=draw                 # the table and the plot from the results of both

Results are kept in tests/bench/out/scaling.json: what is there is not done again.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import nodes
import pipeline
import stages
from nodes import Cluster
from pipeline import Pipeline
from stage import figures
from stage.images import read_images, split_validation

RESULTS, PLOT = Path(__file__).parent / "out" / "scaling.json", stages.TREE / "docs" / "scaling.png"
SEEDS = range(1, 6)
NODES, SYNC_EVERY, SIMULATED_SEEDS, SIMULATED_EPOCHS = (1, 2, 4, 8, 16, 32, 64), (5, 20, 100), (1, 2), 5
LOW_PEAK = 0.4  # the highest learning rate with which more than 4 nodes are simulated too: that of 4 nodes
LATENCY, BANDWIDTH = 100e-6, 1e9 / 8  # of the modelled network: seconds a message, bytes a second (1 Gbit/s)
VECTOR_BYTES = 4 * 21_840
EPOCHS, BATCHES, VALIDATION_SECONDS = 15, 573, 0.1


def main():
    """Does the steps that are named, or all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("steps", nargs="*", default=["measure", "simulate", "draw"])
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"measured": {}, "simulated": {}}
    for step in parser.parse_args().steps:
        {"measure": measure, "simulate": simulate, "draw": draw}[step](results)


def save(results):
    """Keeps what has been measured so far."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1))


# Measured -------------------------------------------------------------------------------------------------------------


def measure(results):
    """Trains pairs: on one node and on two, with the default recipe, one worker and one core a node."""
    pipeline.build()
    try:
        for seed in SEEDS:
            if str(seed) not in results["measured"]:
                flags = ("--num-processes", "1", "--seed", str(seed))
                results["measured"][str(seed)] = {"1": train_on_one(flags), "2": train_on_two(flags)}
                save(results)
                print(seed, results["measured"][str(seed)], flush=True)
        results["bytes_per_second"] = results.get("bytes_per_second") or measure_traffic()
        results["all_reduce_seconds"] = measure_all_reduce()
        save(results)
    finally:
        pipeline.remove_images()


def train_on_one(flags):
    """Trains without any of this, as on one machine, and evaluates."""
    with tempfile.TemporaryDirectory() as folder, Pipeline(Path(folder) / "volume", train={"cpuset": "0"}) as project:
        ended = project.run("train", *flags)
        return measured(project, [ended], Path(folder) / "volume")


def train_on_two(flags):
    """Trains on two nodes, and evaluates."""
    cores = {"train": {"cpuset": "0"}, "train-2": {"cpuset": "1"}}
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "volume", flags, **cores) as project:
        project.start_nodes()
        return measured(project, project.end_nodes(), Path(folder) / "volume")


def measure_traffic():
    """The bytes a second that a node sends while two train, in a training of its own: looking takes time."""
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "volume", ("--num-processes", "1")) as project:
        containers = project.start_nodes()
        nodes.wait_until_they_train(containers)
        before, began = bytes_sent(containers[0]), time.monotonic()
        time.sleep(10)
        return (bytes_sent(containers[0]) - before) / (time.monotonic() - began)


def measure_all_reduce():
    """The median of the seconds that an all_reduce of the parameters takes two idle processes, on a core each."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return max(pool.map(all_reduce, range(2), [stages.free_port()] * 2))


def all_reduce(rank, port):
    """What one of the two processes does: the seconds."""
    import torch
    from torch import distributed

    os.sched_setaffinity(0, {rank})
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    vector, times = torch.zeros(VECTOR_BYTES // 4), []
    for _ in range(500):
        began = time.monotonic()
        distributed.all_reduce(vector)
        times.append(time.monotonic() - began)
    distributed.destroy_process_group()
    return statistics.median(times)


def bytes_sent(container):
    """The bytes that a container has sent over its network so far."""
    found = re.search(r"eth0:(.*)", container.inside("cat /proc/net/dev").stdout)
    return int(found[1].split()[8])


def measured(project, ends, volume):
    """What is kept of a training; the accuracy is that on the test images."""
    for end in (*ends, project.run("evaluate")):
        if end.returncode:
            sys.exit(f"scaling: a stage failed: {end}")
    record, evaluation = stages.results(volume), stages.read_json(volume / "eval_results.json")
    said = re.findall(r"(\d+) averagings took ([\d.]+) s", "".join(end.stdout for end in ends))
    return {
        "seconds": record["seconds"],
        "container_seconds": max(end.ended for end in ends) - min(end.began for end in ends),
        "images_per_second": record["images_per_second"],
        "validation": record["history"][-1]["validation_accuracy"],
        "test": evaluation["Accuracy"],
        "averagings": [int(count) for count, _ in said],
        "averaging_seconds": [float(seconds) for _, seconds in said],
    }


# Simulated ------------------------------------------------------------------------------------------------------------


def simulate(results):
    """Trains as N nodes would, one after the other in one process: the arithmetic needs no network."""
    runs = [(1, 20, seed, 0.1) for seed in SIMULATED_SEEDS]
    runs += [(world, sync, seed, 0.1) for seed in SIMULATED_SEEDS for world in NODES[1:] for sync in SYNC_EVERY]
    runs += [(world, 20, seed, LOW_PEAK / world) for seed in SIMULATED_SEEDS for world in NODES if world > 4]
    wanted = [run for run in runs if name_of(*run) not in results["simulated"]]
    with ProcessPoolExecutor(2) as pool:
        for run, accuracy in zip(wanted, pool.map(train_as_nodes, wanted), strict=True):
            results["simulated"][name_of(*run)] = accuracy
            save(results)
            print(name_of(*run), accuracy, flush=True)


def name_of(world, sync, seed, lr=0.1):
    """The key of a simulated training in the results."""
    return f"{world} nodes, --sync-every {sync}, --seed {seed}, --lr {lr:.4g}"


def train_as_nodes(run):
    """The validation accuracy, in percent, that N nodes of one worker reach; None if they diverge."""
    import torch

    import hogwild
    import net
    from training.record import Record
    from training.settings import Settings

    world, sync, seed, lr = run
    training, (validation, labels) = split_validation(*read_images(stages.DATA, "train"))
    wanted = Settings(epochs=SIMULATED_EPOCHS, num_processes=1, sync_every=sync, seed=seed, lr=lr)
    record = Record.new(wanted, len(training[0]), {})
    trainers = []
    for _ in range(world):
        shared = hogwild.SharedState(record, *training)
        shared.peak_lr = lr * world  # as cluster/nodes.py has it
        trainers.append(hogwild.Trainer(0, shared))
    end, per_epoch, batch = shared.schedule_end, shared.batches_per_epoch, 0
    try:
        while batch < end:
            limit = min((batch // per_epoch + 1) * per_epoch, batch + sync * world)
            for number in range(batch, limit):
                trainers[number % world].train_batch(number)
            mean = torch.stack([trainer.shared.parameters for trainer in trainers]).mean(0)
            for trainer in trainers:
                trainer.shared.parameters.copy_(mean)
            batch = limit
    except ArithmeticError:
        return None
    outputs = net.predict(shared.model, validation)
    accuracy = 100 * (outputs.argmax(1) == labels).float().mean().item()
    return accuracy if outputs.isfinite().all() else None


# Both ---------------------------------------------------------------------------------------------------------------


def model_seconds(results, world, sync):
    """The seconds that N nodes would train, from the costs measured here and the stated network."""
    batch_seconds, pause_seconds = measured_costs(results)
    pauses = -(-BATCHES // (sync * world)) * EPOCHS if world > 1 else 0
    # gloo's ring: 2 (N - 1) messages one after the other, each of 1/N of the vector.
    network = 2 * (world - 1) * (LATENCY + VECTOR_BYTES / world / BANDWIDTH)
    return -(-BATCHES // world) * EPOCHS * batch_seconds + pauses * (pause_seconds + network)


def measured_costs(results):
    """Seconds of a batch on one core, and of a pause of two nodes for an averaging, waiting for each other included."""
    pairs = results["measured"].values()
    batch = statistics.median(pair["1"]["seconds"] for pair in pairs) / (EPOCHS * BATCHES)
    two = statistics.median(pair["2"]["seconds"] for pair in pairs)
    pauses = -(-BATCHES // 40) * EPOCHS
    return batch, max(0.0, (two - -(-BATCHES // 2) * EPOCHS * batch) / pauses)


def mean_accuracy(results, world, sync, lr=0.1):
    """The mean of the simulated seeds; None if one has diverged."""
    found = [results["simulated"][name_of(world, sync if world > 1 else 20, seed, lr)] for seed in SIMULATED_SEEDS]
    return None if None in found else statistics.mean(found)


def draw(results):
    """Prints the tables and draws the plot."""
    pairs = [*results["measured"].values()]
    ratios = sorted(pair["1"]["seconds"] / pair["2"]["seconds"] for pair in pairs)
    print("ratios", [round(ratio, 3) for ratio in ratios], "median", round(statistics.median(ratios), 3))
    for world, name in itertools.product("12", ("seconds", "container_seconds", "images_per_second")):
        print(world, name, round(statistics.median(pair[world][name] for pair in pairs), 2))
    for world, name in itertools.product("12", ("validation", "test")):
        print(world, name, round(statistics.mean(pair[world][name] for pair in pairs), 3))
    two = [pair["2"] for pair in pairs]
    print("averagings", two[0]["averagings"], "s", [statistics.median(pair["averaging_seconds"]) for pair in two])
    print("bytes/s", results["bytes_per_second"], "seconds of an all_reduce", results["all_reduce_seconds"])
    print("costs: batch, pause", measured_costs(results))
    for world in NODES:
        seconds = [f"{model_seconds(results, world, sync):.1f} s" for sync in SYNC_EVERY]
        accuracies = [mean_accuracy(results, world, sync) for sync in SYNC_EVERY]
        low = mean_accuracy(results, world, 20, LOW_PEAK / world) if world > 4 else None
        print(world, *seconds, *accuracies, low, sep=" | ")
    plot(results)


def plot(results):
    """Draws accuracy and speed by the number of nodes."""
    figure = figures.new_figure(9, 3.6, layout="constrained")
    accuracy, speed = figure.subplots(1, 2)
    one = model_seconds(results, 1, 20)
    for sync, marker in zip(SYNC_EVERY, "osv", strict=True):
        label = f"--sync-every {sync}"
        points = [(world, mean_accuracy(results, world, sync)) for world in NODES]
        accuracy.plot(*zip(*[point for point in points if point[1]], strict=True), marker + "-", label=label)
        speed.plot(NODES, [one / model_seconds(results, world, sync) for world in NODES], marker + "-", label=label)
    points = [(world, mean_accuracy(results, world, 20, LOW_PEAK / world)) for world in NODES if world > 4]
    accuracy.plot(*zip(*points, strict=True), "k^:", label=f"--sync-every 20, --lr {LOW_PEAK} / nodes")
    measured = statistics.median(pair["1"]["seconds"] / pair["2"]["seconds"] for pair in results["measured"].values())
    speed.plot([1, 2], [1, measured], "k*", markersize=12, label="measured")
    speed.plot(NODES, NODES, "--", color=figures.GREY, label="ideal")
    accuracy.set(title=f"Validation accuracy after {SIMULATED_EPOCHS} epochs", ylabel="percent", ylim=(94.5, 99.6))
    speed.set(title="Speed of training, modelled", ylabel="times that of one node", yscale="log")
    for axes in (accuracy, speed):
        axes.set(xscale="log", xlabel="nodes", xticks=NODES, xticklabels=NODES)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    PLOT.write_bytes(figures.as_png(figure))


if __name__ == "__main__":
    main()
