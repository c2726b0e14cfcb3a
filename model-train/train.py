"""Trains the digit classifier: Hogwild on the CPU, the network and technique of PyTorch's mnist_hogwild example.

Reads   DATA/MNIST/raw: the four raw files, which torchvision fetches into DATA if they are not there
Writes  MODEL/mnist_cnn.pt: the state_dict of the finished model
        MODEL/checkpoint.pt: all that resuming needs
        MODEL/train_results.json: settings, progress, history per epoch, workers, versions, sha256 sums
        MODEL/training.png: the curves

    docker compose run --rm train
    docker compose run --rm train --epochs 20
    python model-train/train.py --data data --model model

What is in MODEL decides what a run does: see plan.py. The training itself is in hogwild.py.
"""

import argparse
import contextlib
import hashlib
import io
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import plan


def main():
    """Runs the stage and returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    args = parse_args()
    asked = {name: getattr(args, name) for name in plan.SETTINGS if getattr(args, name) is not None}
    decide = partial(plan.decide, asked, args.fresh or args.dry_run, args.model)
    try:
        args.model.mkdir(parents=True, exist_ok=True)
        todo = decide()
        if args.dry_run:
            return train(todo, args)
        if todo.action != "nothing":
            with plan.hold(args.model):
                todo = decide()  # anew: another training may have ended between the first look and the lock
                if todo.action != "nothing":
                    return train(todo, args)
        print(f"train: {todo.line}")
        return 0
    except plan.Refusal as refusal:
        print(f"train: {refusal}", file=sys.stderr)
        return refusal.status
    except OSError as error:
        print(f"train: {error}. When that is mended, run it again.", file=sys.stderr)
        return 1


def parse_args():
    """The command line. Settings that are not given are None: the volume decides about them."""
    parser = argparse.ArgumentParser(
        prog="train",
        description="Trains the digit classifier. What is not given is as the model in the volume was trained, or if "
        "there is none, as said below.",
    )
    parser.error = lambda message: parser.exit(2, f"train: {message}. See: train --help\n")
    helps = {
        "batch_size": "images per step",
        "epochs": "passes over the 55,000 training images, in all",
        "lr": "peak of the learning rate",
        "momentum": "SGD momentum of each worker",
        "seed": "of the initial weights and of every shuffle",
        "num_processes": "Hogwild workers, one thread each",
    }
    for name, text in helps.items():
        _, default, smallest, largest = plan.SETTINGS[name]
        text += f" ({smallest:,} to {largest:,}; default: {default})"
        parser.add_argument(plan.flag(name), type=partial(parse_setting, name), metavar="N", help=text)
    parser.add_argument(
        "--log-interval",
        type=partial(parse_setting, "epochs"),  # any count will do
        metavar="N",
        help="print a line every N batches (default: one every 5 seconds, or a bar on a terminal)",
    )
    parser.add_argument("--dry-run", action="store_true", help="train on a few batches, publish nothing")
    parser.add_argument(
        "--fresh", action="store_true", help="start over; the old model stays until the new one is done"
    )
    parser.add_argument(
        "--data", type=Path, default="/opt/mount/data", help="folder of the data (default: %(default)s)"
    )
    parser.add_argument(
        "--model", type=Path, default="/opt/mount/model", help="folder of the volume's files (default: %(default)s)"
    )
    return parser.parse_args()


def parse_setting(name, text):
    """The value of a setting from the command line."""
    value = text
    with contextlib.suppress(ValueError):
        value = plan.SETTINGS[name][0](text)
    try:
        return plan.checked(name, value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} {error}") from None


def train(todo, args):
    """Does what the plan says, and returns the exit status."""
    import net  # only now, since it imports torch, which takes longer than all that came before
    import training

    with net.plain_errors("train"):
        fetch_data(args.data)
        images, labels = net.read_split(args.data, "train")
        if args.dry_run:
            todo.settings["epochs"], todo.line = 1, "tries out a batch for each worker, and publishes nothing"
            few = training.HELD_OUT + todo.settings["num_processes"] * todo.settings["batch_size"]
            images, labels = images[-few:], labels[-few:]
        print(f"train: {todo.line}: {plan.as_flags(todo.settings)}", flush=True)
        warn_of_cores(todo.settings["num_processes"])
        run = training.begin(todo, images, labels, None if args.dry_run else args.model)
        try:
            run.run(Progress(args.log_interval))
        except training.Stopped as stopped:
            print(f"train: {stopped}. {training.GO_ON}", file=sys.stderr)
            return 128 + stopped.number
        if not args.dry_run:
            publish_model(run, args.model)
        return 128 + run.asked_to_stop if run.asked_to_stop else 0


def fetch_data(data):
    """Has torchvision fetch the data set, unless its files are there."""
    import net

    raw = data / net.RAW_FOLDER
    if all((raw / name).exists() for name in net.RAW_FILES):
        return
    print(f"train: fetching MNIST into {raw} (12 MB)", flush=True)
    from torchvision.datasets import MNIST  # not earlier: nothing else needs torchvision

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            MNIST(data, download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise net.Failure(
            f"no data in {raw}, and none to be fetched ({reason}). Put it there with: make data"
        ) from None


def warn_of_cores(workers):
    """Says so if there are more workers than cores to run them."""
    cores = count_cores()
    if workers > cores:
        print(
            f"train: warning: {workers} workers on {cores} core{'s' * (cores > 1)} get in each other's way", flush=True
        )


def count_cores():
    """The cores that this process may use: by its affinity, and by its cgroup's CPU quota, rounded down."""
    cores = len(os.sched_getaffinity(0))
    v2, v1 = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu")
    with contextlib.suppress(OSError, ValueError):
        if v2.exists():
            quota, period = v2.read_text().split()  # "max 100000" where there is no quota: a ValueError
        else:
            quota, period = ((v1 / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


class Progress:
    """Says how the training goes: a bar on a terminal, elsewhere a line every few seconds or batches."""

    LINE_SECONDS, BAR_SECONDS = 5, 0.2

    def __init__(self, log_interval):
        self.log_interval = log_interval
        self.bar = sys.stdout.isatty() and not log_interval
        self.first = None

    def __call__(self, run):
        """Called many times a second with the training; speaks when it is time."""
        now, steps, images, loss_sum = time.monotonic(), *run.dealer.totals()
        if self.first is None:
            self.first = self.last = now, steps, images, loss_sum
        seconds, new_steps = now - self.last[0], steps - self.last[1]
        if self.log_interval:
            due = new_steps >= self.log_interval
        else:
            due = new_steps and seconds >= (self.BAR_SECONDS if self.bar else self.LINE_SECONDS)
        if due:
            self.say(run, now, images, (loss_sum - self.last[3]) / (images - self.last[2]))
            self.last = now, steps, images, loss_sum

    def say(self, run, now, images, loss):
        """Prints the samples so far, the speed since the start, the loss since the last line, and the time left."""
        total = run.results["settings"]["epochs"] * len(run.task.images)
        speed = (images - self.first[2]) / (now - self.first[0])
        text = f"{images:,} of {total:,} images, {speed:,.0f} images/s, loss {loss:.4f}"
        text += f", {max(0, total - images) / speed:.0f} s left"
        if self.bar:
            filled = round(20 * images / total)
            print(f"\r[{'#' * filled}{'.' * (20 - filled)}] {text} ", end="", flush=True)
        else:
            print(f"train: {text}", flush=True)


def publish_model(run, folder):
    """Publishes what a finished training is for: the curves, the model, and the results that vouch for it."""
    import net
    import torch

    net.publish(folder / "training.png", draw_curves(run.results["history"]))
    buffer = io.BytesIO()
    torch.save(run.state_dict(), buffer)
    net.publish(folder / "mnist_cnn.pt", buffer.getvalue())
    run.publish_finished(hashlib.sha256(buffer.getvalue()).hexdigest())
    accuracy, seconds = run.results["history"][-1]["held_out_accuracy"], run.results["seconds"]
    print(f"train: finished in {seconds:.1f} s: {accuracy:.2f} % of the held-out images right")


def draw_curves(history):
    """The losses and the held-out accuracy by epoch, as the bytes of a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in history]
    losses.plot(epochs, [line["train_loss"] for line in history], "o-", label="training (with augmentation)")
    losses.plot(epochs, [line["held_out_loss"] for line in history], "o-", label="held-out images")
    losses.set(title="Loss", ylabel="negative log-likelihood", yscale="log")
    losses.legend()
    accuracy.plot(epochs, [line["held_out_accuracy"] for line in history], "o-", color="tab:orange")
    accuracy.set(title=f"Accuracy: {history[-1]['held_out_accuracy']:.2f} % on the held-out images", ylabel="percent")
    for axes in (losses, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
