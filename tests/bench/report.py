"""The benchmark's results: the table and the plot. See bench.py."""

import itertools
from statistics import mean, median

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

EPOCHS = 10  # of the example
PEERS = {  # what peers.py measures, in words
    "pytorch": "plain PyTorch, channels_last, 2 threads",
    "compile": "the same with torch.compile",
    "jax": "JAX, 2 threads",
}
SERVICES = ("serve", "FastAPI", "LitServe", "BentoML", "Cog")  # that serving.py measures
CLIENTS = (1, 32)  # at once
# What training on an image takes, a multiplication and an addition counted as two: the forward pass, and backwards as
# many for the gradients of the weights and of the inputs of each layer, except those of the images.
FLOP_PER_IMAGE = 2 * (3 * (24 * 24 * 10 * 25 + 8 * 8 * 20 * 250 + 320 * 50 + 50 * 10) - 24 * 24 * 10 * 25)
FIGURES = ("p50", "p99", "predictions/s", "CPU time")
SERVICE_COLUMNS = ("service", "clients", *FIGURES, "refused", *(f"ratio of {figure}" for figure in FIGURES))
COLUMNS = ("what", "ratio", "ours", "the other's", "seeds", "test accuracy")


def make_rows(results):
    """The rows of the table for which there are measurements, as dicts, in seconds, images/s and bytes.

    A ratio says how many times as fast the pipeline is, or with `import torch` and of memory, how many times as much
    it takes.
    """
    runs, recipes = results["runs"], results["recipes"]
    rows = [*recipe_rows(runs, recipes), *worker_rows(runs, results["compared"], recipes), *resource_rows(runs)]
    sizes = [make_row(what, [size], [], "MB") | {"seeds": ""} for what, size in results["sizes"].items()]
    return [row for row in rows if row["ours"] is not None] + sizes


def recipe_rows(runs, recipes):
    """The trainings, against the whole training of the example."""
    whole, default_threads = whole_seconds(runs, "reference"), whole_seconds(runs, "reference, default threads")
    epochs = max(values(runs, "reference", "epochs"), default=EPOCHS)
    note = "" if epochs == EPOCHS else f" ({epochs} epochs, extrapolated to {EPOCHS})"
    example = "" if note else describe(values(runs, "reference", "accuracy"), "; the example: ")
    for kind in recipes:
        name, accuracy = recipe_name(kind, recipes), describe(values(runs, kind, "accuracy")) + example
        ours, in_container = values(runs, kind, "seconds"), values(runs, kind, "container_seconds")
        yield make_row(f"{name} against the example{note}, first batch to last", ours, whole, "s", accuracy)
        yield make_row(f"{name}, container's start to exit", in_container, whole, "s", accuracy)
        if kind == "one epoch" and default_threads:
            what = f"the same, against the example with default threads (1 epoch, times {EPOCHS})"
            yield make_row(what, in_container, default_threads, "s", accuracy)


def worker_rows(runs, kind, recipes):
    """Two workers against one, against one with two threads, with the same recipe, and against the peers."""
    two, one, threads = (values(runs, name, "images_per_second") for name in (kind, "one worker", "two threads"))
    accuracies = [values(runs, name, "accuracy") for name in (kind, "one worker")]
    words = " and ".join(f"{mean(each):.2f} %" for each in accuracies if each)
    yield make_row(f"{recipe_name(kind, recipes)} with 2 workers against 1", two, one, "images/s", words)
    yield make_row("the same, against 1 with two threads", two, threads, "images/s")
    for peer, name in PEERS.items():
        other, first = (values(runs, peer, figure) for figure in ("images_per_second", "first_step_seconds"))
        note = f"the other's first step takes {median(first):.1f} s" if first else ""
        yield make_row(f"the same, against {name}", two, other, "images/s", note)


def resource_rows(runs):
    """The time of a stage beside its work, and the memory of a train container, with two workers."""
    runs_of_one_epoch = [run for run in runs if run["kind"] == "one epoch"]
    around = [run["container_seconds"] - run["seconds"] for run in runs_of_one_epoch]
    what = "what is not training in `train`, against `import torch`"
    yield make_row(what, around, values(runs, "stages", "import in train"), "s", cost=True)
    for stage in ("evaluate", "infer"):
        ours, other = (values(runs, "stages", name) for name in (stage, f"import in {stage}"))
        yield make_row(f"`{stage}` against `import torch`, container's start to exit", ours, other, "s", cost=True)
    yield make_row("predicting the test images alone", values(runs, "stages", "predicted_per_second"), [], "images/s")
    for what, name in (("peak memory of the train container", "peak_bytes"), ("its part in /dev/shm", "shm_bytes")):
        yield make_row(what, values(runs, "default", name), values(runs, "reference", name), "MB", cost=True)


def service_table(runs):
    """The services that serving.py compares, as a Markdown table: medians, and how many times as fast serve is."""
    lines = []
    for service, clients in itertools.product(SERVICES, CLIENTS):
        ours, other = (median_service(runs, name, clients) for name in ("serve", service))
        if other:
            texts = [format_figure(other[name], "" if name == "predictions/s" else "ms").strip() for name in FIGURES]
            ratios = [ratio_to(ours, other, name) if ours else "" for name in FIGURES]
            lines.append([service, str(clients), *texts, f"{100 * other['refused']:.1f} %", *ratios])
    return markdown(SERVICE_COLUMNS, lines)


def median_service(runs, service, clients):
    """The medians of a service's figures at a number of clients, by name; nothing if it was not measured."""
    figures = [run[service] for run in runs if run["kind"] == "services" and service in run]
    names = (*FIGURES, "refused") if figures else ()
    return {name: median(figure[f"{name}, {clients} clients"] for figure in figures) for name in names}


def ratio_to(ours, other, name):
    """How many times as good a figure of ours is as the other's."""
    ratio = ours[name] / other[name]
    return f"{ratio if name == 'predictions/s' else 1 / ratio:.2f}"


def values(runs, kind, name):
    """A figure of all runs of a kind that have it."""
    return [run[name] for run in runs if run["kind"] == kind and run[name] is not None]


def whole_seconds(runs, kind):
    """The seconds of the example's runs of a kind; epochs that were not run count as much as the last one that was."""
    ends = [[0, *(line["seconds"] for line in history)] for history in values(runs, kind, "history")]
    return [end[-1] + (EPOCHS - len(end) + 1) * (end[-1] - end[-2]) for end in ends]


def recipe_name(kind, recipes):
    """A recipe as the command of the person who uses it; the example's is too long for a table."""
    return "`train` with the example's recipe" if kind == "example" else f"`{f'train {recipes[kind]}'.strip()}`"


def describe(accuracies, prefix=""):
    """Accuracies in words."""
    return f"{prefix}mean {mean(accuracies):.2f} %, least {min(accuracies):.2f} %" if accuracies else ""


def make_row(what, ours, other, unit, accuracy="", cost=False):
    """A row: both medians, their ratio, and how many seeds they are of."""
    row = {"what": what, "unit": unit, "accuracy": accuracy, "ratio": None}
    row["ours"], row["other"] = (median(figures) if figures else None for figures in (ours, other))
    row["seeds"] = str(len(ours)) if len(other) in (0, len(ours)) else f"{len(ours)} and {len(other)}"
    if row["other"] and (row["ours"] or 0) > row["other"] / 1000:
        row["ratio"] = row["other"] / row["ours"] if unit == "s" and not cost else row["ours"] / row["other"]
    return row


def as_table(rows):
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        ratio = f"{row['ratio']:.{1 if row['ratio'] >= 10 else 2}f}" if row["ratio"] else ""
        figures = [format_figure(row[name], row["unit"]) for name in ("ours", "other")]
        lines.append([row["what"], ratio, *figures, row["seeds"], row["accuracy"]])
    return markdown(COLUMNS, lines)


def markdown(columns, lines):
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


def format_figure(value, unit):
    """A figure with its unit."""
    if value is None:
        return ""
    if unit == "s":
        return f"{value:.{2 if value < 10 else 1}f} s"
    factor, digits = {"ms": (1000, 2), "MB": (1e-6, 0)}.get(unit, (1, 0))
    return f"{factor * value:,.{digits}f} {unit}"


def describe_machine(results):
    """What the figures depend on, in a line."""
    trained = [f"{run['precision']}, torch {run['versions']['torch']}" for run in results["runs"] if "precision" in run]
    return ", ".join([f"{results['cores']} cores of {results['cpu']}", *trained[:1]])


def describe_limit(runs):
    """How near one worker comes to the speed of its core's matrix products, in a line for each dtype."""
    speed = median(values(runs, "one worker", "images_per_second"))
    lines = [f"1 worker trains on {speed:,.0f} images/s, of {FLOP_PER_IMAGE / 1e6:.2f} MFLOP each"]
    for dtype in ("float32", "bfloat16"):
        limit = median(values(runs, "matrices", dtype))
        share = speed * FLOP_PER_IMAGE / (limit * 1e9)
        lines.append(f"{share:.0%} of what a core that multiplies {dtype} matrices at {limit:.0f} GFLOP/s allows")
    return "\n".join(lines)


def warn_of_load(runs):
    """Warns if the machine had other work to do: the example's two workers should have used two cores fully."""
    cpu, whole = values(runs, "reference", "cpu_seconds"), values(runs, "reference", "seconds")
    if cpu and sum(cpu) < 1.8 * sum(whole):
        print(f"bench: the example got {sum(cpu) / sum(whole):.1f} of its 2 cores; measure again on an idle machine")


def draw(runs, path):
    """Test accuracy against seconds: of the pipeline after one epoch and more, and of the example's epochs."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds = ("one epoch", "default", "most accurate")
    trained = [run for run in runs if run["kind"] in kinds or run["kind"].endswith(" epochs")]
    axes.plot([run["seconds"] for run in trained], [run["accuracy"] for run in trained], ".", color="C0", alpha=0.35)
    draw_line(axes, trained, "o-C0", "this pipeline, 2 workers")
    draw_line(axes, [run for run in runs if run["kind"] == "example"], "o-C2", "this pipeline, the example's recipe")
    draw_line(axes, epochs_of(runs, "reference"), "s-C7", "the example, 1 torch thread a worker")
    draw_line(axes, epochs_of(runs, "reference, default threads"), "s-C3", "the example, default threads")
    axes.set(xscale="log", xlabel="seconds from the first batch to the last", ylabel="test accuracy in percent")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.08, 0.12)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def epochs_of(runs, kind):
    """The epochs of the example's runs of a kind, each with its number."""
    return [line | {"epochs": epoch} for lines in values(runs, kind, "history") for epoch, line in enumerate(lines, 1)]


def draw_line(axes, points, style, label):
    """A line of the median seconds and mean accuracies by number of epochs; a long one has labels at its ends only."""
    counts = sorted({point["epochs"] for point in points})
    groups = [[point for point in points if point["epochs"] == epochs] for epochs in counts]
    x = [median(point["seconds"] for point in group) for group in groups]
    y = [mean(point["accuracy"] for point in group) for group in groups]
    if counts:
        axes.plot(x, y, style, label=label)
    for place, epochs in enumerate(counts):
        if len(counts) <= 5 or place in (0, len(counts) - 1):
            text = f"{epochs} epoch{'s' * (epochs > 1)}"
            axes.annotate(text, (x[place], y[place]), (0, 8), textcoords="offset points", ha="center", fontsize=8)
