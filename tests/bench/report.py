"""What the benchmark's runs come to: the table and the plot. See bench.py."""

import statistics

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

EPOCHS = 10  # of the example
FINAL_ACCURACY = 98.82  # percent of the test images after them, as seen where the reference is not trained to its end
COLUMNS = ("what", "ratio", "target", "reached", "ours", "the other's", "seeds", "test accuracy")

# The targets that are no ratios.
LEAST_MEAN, LEAST_ACCURACY = 99.45, 99.35  # percent, of the default recipe
LARGEST_DIFFERENCE = 0.05  # points, between one worker and two
LEAST_JUDGED = 60_000  # images/s
LARGEST_MEMORY, LARGEST_SHM, LARGEST_IMAGE, LARGEST_IMAGES = 900e6, 64 * 2**20, 750e6, 850e6  # bytes


def make_rows(results):
    """The rows of the table for which something has been measured, as dicts of figures in the units of the JSON file.

    A ratio says how many times faster ours is where its target is a least one, else how many times as much it takes.
    """
    runs = results["runs"]
    rows = [
        *recipe_rows(runs, results["recipes"]),
        *worker_rows(runs, results["compared"], results["recipes"]),
        *stage_rows(runs),
        *memory_rows(runs),
    ]
    return [row for row in rows if row["ours"] is not None] + size_rows(results["sizes"])


def recipe_rows(runs, recipes):
    """The quick and the default recipe, against the whole training of the reference."""
    whole, as_it_comes = whole_seconds(runs, "reference"), whole_seconds(runs, "reference as it comes")
    epochs = max(values(runs, "reference", "epochs"), default=0)
    note = f" ({epochs} epochs, extrapolated to {EPOCHS})" if 0 < epochs < EPOCHS else ""
    goal = FINAL_ACCURACY if epochs < EPOCHS else mean(values(runs, "reference", "accuracy"))
    quick, default = (" ".join(["train", recipes[name]]).strip() for name in ("quick", "default"))

    accuracies = values(runs, "quick", "accuracy")
    words, good = f"{describe(accuracies)}, example {goal:.2f} %", bool(accuracies) and mean(accuracies) >= goal
    inner, outer = values(runs, "quick", "seconds"), values(runs, "quick", "container_seconds")
    yield compare(f"`{quick}` against the example{note}, first batch to last", inner, whole, ">=", 30, "s", words, good)
    yield compare(f"`{quick}`, container's start to exit", outer, whole, ">=", 20, "s", words, good)
    what = f"the same, against the example with default threads (1 epoch, times {EPOCHS})"
    yield compare(what, outer, as_it_comes, ">=", 120, "s", words, good)

    accuracies = values(runs, "default", "accuracy")
    good = bool(accuracies) and mean(accuracies) >= LEAST_MEAN and min(accuracies) >= LEAST_ACCURACY
    outer = values(runs, "default", "container_seconds")
    yield compare(f"`{default}`, container's start to exit", outer, whole, ">=", 4, "s", describe(accuracies), good)


def worker_rows(runs, recipe, recipes):
    """Two workers against one, and against one with two threads, on the same recipe."""
    two, one, threads = (values(runs, kind, "images_per_second") for kind in (recipe, "one worker", "two threads"))
    words, good = "", False
    if two and one:
        means = [mean(values(runs, kind, "accuracy")) for kind in (recipe, "one worker")]
        words = "{:.2f} % and {:.2f} %".format(*means)
        good = round(abs(means[0] - means[1]), 3) <= LARGEST_DIFFERENCE
    name = " ".join(["train", recipes[recipe]]).strip()
    yield compare(f"`{name}` with 2 workers against 1", two, one, ">=", 1.9, "images/s", words, good)
    yield compare("the same, against 1 with two threads", two, threads, ">=", 1, "images/s")


def stage_rows(runs):
    """Evaluate and infer, and judging without what surrounds it."""
    for stage in ("evaluate", "infer"):
        own, bare = (values(runs, "stages", name) for name in (stage, f"import in {stage}"))
        yield compare(f"`{stage}` against `import torch`, container's start to exit", own, bare, "<=", 2, "s")
    speeds = values(runs, "stages", "judged_per_second")
    reached = bool(speeds) and median(speeds) >= LEAST_JUDGED
    yield make_row("judging the test images alone", None, f">= {LEAST_JUDGED:,}", reached, speeds, [], "images/s")


def memory_rows(runs):
    """The peak of a train container, with two workers, against the reference's."""
    ours, other = (values(runs, kind, "peak_bytes") for kind in ("default", "reference"))
    good = bool(ours) and median(ours) <= LARGEST_MEMORY
    row = compare("peak memory of the train container", ours, other, "<=", 1, "MB", good=good)
    yield row | {"target": f"<= 1 and {show(LARGEST_MEMORY, 'MB')}"}
    ours, other = (values(runs, kind, "shm_bytes") for kind in ("default", "reference"))
    reached = bool(ours) and max(ours) <= LARGEST_SHM
    yield make_row("its part in /dev/shm", None, f"<= {show(LARGEST_SHM, 'MB')}", reached, ours, other, "MB")


def size_rows(sizes):
    """The images' sizes."""
    note = ", on the real base" if sizes["stand_in_base"] else ""
    parts = [(f"image of {stage}{note}", size, LARGEST_IMAGE) for stage, size in sizes["each"].items()]
    parts.append((f"the three together{note}", sizes["together"], LARGEST_IMAGES))
    return [
        make_row(what, None, f"<= {largest / 1e6:.0f} MB", size <= largest, [size], [], "MB") | {"seeds": ""}
        for what, size, largest in parts
    ]


# Figures ------------------------------------------------------------------------------------------------------------

mean, median = statistics.mean, statistics.median


def values(runs, kind, name):
    """A figure of all runs of a kind, those left out that have none."""
    return [run[name] for run in runs if run["kind"] == kind and run[name] is not None]


def whole_seconds(runs, kind):
    """The seconds of the reference's runs of a kind; epochs that they have not got count as much as their last one."""
    ends = [[0, *(line["seconds"] for line in history)] for history in values(runs, kind, "history")]
    return [end[-1] + (EPOCHS - len(end) + 1) * (end[-1] - end[-2]) for end in ends]


def describe(accuracies):
    """Accuracies in words."""
    return f"mean {mean(accuracies):.2f} %, least {min(accuracies):.2f} %" if accuracies else ""


def compare(what, ours, other, sign, target, unit, accuracy="", good=True):
    """A row of ours against the other's, with a target for the ratio, which counts only at a good accuracy."""
    ratio = reached = None
    if ours and other and median(other):
        ratio = median(ours) / median(other)
        if sign == ">=" and unit == "s":
            ratio = 1 / ratio  # how many times faster
        reached = (ratio >= target if sign == ">=" else ratio <= target) and good
    return make_row(what, ratio, f"{sign} {target}", reached, ours, other, unit, accuracy)


def make_row(what, ratio, target, reached, ours, other, unit, accuracy=""):
    """A row: both medians, and how many seeds they are of."""
    seeds = str(len(ours)) if len(other) in (0, len(ours)) else f"{len(ours)} and {len(other)}"
    return {
        "what": what,
        "ratio": ratio,
        "target": target,
        "reached": reached,
        "ours": median(ours) if ours else None,
        "other": median(other) if other else None,
        "unit": unit,
        "seeds": seeds,
        "accuracy": accuracy,
    }


# What people see ----------------------------------------------------------------------------------------------------


def as_table(rows):
    """The rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.{1 if row['ratio'] >= 10 else 2}f}"
        figures = [show(row[name], row["unit"]) for name in ("ours", "other")]
        reached = {True: "yes", False: "no", None: "not measured"}[row["reached"]]
        lines.append([row["what"], ratio, row["target"], reached, *figures, row["seeds"], row["accuracy"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def show(value, unit):
    """A figure with its unit."""
    if value is None:
        return ""
    if unit == "s":
        return f"{value:.{2 if value < 10 else 1}f} s"
    return f"{value / 1e6:,.0f} MB" if unit == "MB" else f"{value:,.0f} {unit}"


def say(run):
    """A run in a line."""
    if run["kind"] == "stages":
        return f"evaluate {run['evaluate']:.2f} s, infer {run['infer']:.2f} s"
    return f"{run['kind']}, seed {run['seed']}: {run['seconds']:.2f} s, test accuracy {run['accuracy']:.2f} %"


def warn_of_load(runs):
    """Says so if the machine had other work to do: the reference's two workers should have kept two cores busy."""
    cpu, whole = values(runs, "reference", "cpu_seconds"), values(runs, "reference", "seconds")
    if cpu and sum(cpu) < 1.8 * sum(whole):
        print(f"bench: the reference got {sum(cpu) / sum(whole):.1f} of its 2 cores; measure anew on an idle machine")


def draw(runs, path):
    """Test accuracy against seconds: ours after one epoch and more, and the reference's epochs."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_ours(axes, [run for run in runs if run["kind"] in ("quick", "default") or run["kind"].endswith(" epochs")])
    draw_reference(axes, runs, "reference", "the example, 1 torch thread a worker", "tab:gray")
    draw_reference(axes, runs, "reference as it comes", "the example, default threads", "tab:red")
    axes.set(xscale="log", xlabel="seconds from the first batch to the last", ylabel="test accuracy in percent")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.08, 0.12)
    axes.grid(alpha=0.3)
    if axes.has_data():
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def draw_ours(axes, runs):
    """A point for every run of the pipeline, and a line through the medians of each number of epochs."""
    if not runs:
        return
    axes.plot([run["seconds"] for run in runs], [run["accuracy"] for run in runs], ".", color="tab:blue", alpha=0.35)
    groups = {}
    for run in runs:
        groups.setdefault(run["epochs"], []).append(run)
    points = [
        (median(run["seconds"] for run in group), mean(run["accuracy"] for run in group))
        for _, group in sorted(groups.items())
    ]
    axes.plot(*zip(*points, strict=True), "o-", color="tab:blue", label="this pipeline, 2 workers")
    for epochs, point in zip(sorted(groups), points, strict=True):
        label_point(axes, epochs, point)


def draw_reference(axes, runs, kind, label, color):
    """A line through the medians of the reference's epochs."""
    histories = values(runs, kind, "history")
    if not histories:
        return
    points = [
        (median(line["seconds"] for line in lines), mean(line["accuracy"] for line in lines))
        for lines in zip(*histories, strict=True)
    ]
    axes.plot(*zip(*points, strict=True), "s-", color=color, label=label)
    label_point(axes, 1, points[0])
    if len(points) > 1:
        label_point(axes, len(points), points[-1])


def label_point(axes, epochs, point):
    """Says how many epochs a point stands for."""
    text = f"{epochs} epoch{'s' * (epochs > 1)}"
    axes.annotate(text, point, xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8)
