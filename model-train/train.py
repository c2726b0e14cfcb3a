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

import artifacts

if __name__ == "__main__":
    artifacts.prepare_process()

import argparse
import contextlib
import hashlib
import io
import socket
import sys
import time
from functools import partial
from pathlib import Path

import plan
from artifacts import Failure, exit_on_failure, publish, report, say

# What a training takes, in bytes: torch and the images, then each worker with torch's buffers, and with what a step
# keeps of each image of its batch (float32; measured with 1 to 4 workers and batches of 96 to 10,000).
PARENT_MEMORY, WORKER_MEMORY, IMAGE_MEMORY = 215_000_000, 30_000_000, 120_000
DOWNLOAD_TIMEOUT = 60  # seconds without an answer from a mirror


def main():
    """Runs the stage and returns its exit status."""
    args = parse_args()
    asked = {name: getattr(args, name) for name in plan.SETTINGS if getattr(args, name) is not None}
    decide = partial(plan.decide, asked, args.fresh or args.dry_run, args.model)
    with exit_on_failure("train"):
        args.model.mkdir(parents=True, exist_ok=True)
        todo = decide()
        if args.dry_run:
            return train(todo, args)
        if todo.action != "nothing":
            with plan.hold(args.model):
                todo = decide()  # anew: another training may have ended between the first look and the lock
                if todo.action != "nothing":
                    return train(todo, args)
        try:
            read_data(args.data)  # the next stages need it, and may not write to its folder
        except Failure as failure:
            report(f"train: warning: {failure}")
        say(f"train: {todo.line}")
        return 0


def parse_args():
    """The command line. Settings that are not given are None: the volume decides about them."""
    parser = argparse.ArgumentParser(
        prog="train",
        description="Trains the digit classifier. What is not given is as the model in the volume was trained, or if "
        "there is none, as said below.",
    )
    parser.error = partial(artifacts.refuse_flags, "train")  # type: ignore[method-assign]
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
    parser.add_argument("--data", type=Path, default=artifacts.DATA, help="folder of the data (default: %(default)s)")
    parser.add_argument(
        "--model", type=Path, default=artifacts.MODEL, help="folder of the volume's files (default: %(default)s)"
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
    workers, batch_size = todo.settings["num_processes"], todo.settings["batch_size"]
    needed = PARENT_MEMORY + workers * (WORKER_MEMORY + batch_size * IMAGE_MEMORY)
    artifacts.check_memory(needed, f"a training with {workers} workers and batches of {batch_size:,}")
    artifacts.check_threads(2 * workers + 2)
    raw = read_data(args.data)

    import net  # only now, since it imports torch, which takes longer than all that came before
    import training

    images, labels = net.parse_split(raw["train-images-idx3-ubyte"], raw["train-labels-idx1-ubyte"])
    if args.dry_run:
        todo.settings["epochs"], todo.line = 1, "tries out a batch for each worker, and publishes nothing"
        few = training.HELD_OUT + workers * batch_size
        images, labels = images[-few:], labels[-few:]
    say(f"train: {todo.line}: {plan.as_flags(todo.settings)}")
    warn_of_cores(workers)
    run = training.begin(todo, images, labels, None if args.dry_run else args.model)
    try:
        run.run(Progress(args.log_interval))
    except training.Stopped as stopped:
        report(f"train: {stopped}")
        return 128 + stopped.number
    if not args.dry_run:
        publish_model(run, args.model)
    return 128 + run.asked_to_stop if run.asked_to_stop else 0


def read_data(data):
    """The verified contents of the data set's raw files by name; downloads them first if they are not in order."""
    try:
        return {name: artifacts.read_raw(data, name) for name in artifacts.RAW_FILES}
    except Failure as problem:
        download_data(data, problem)
    return {name: artifacts.read_raw(data, name) for name in artifacts.RAW_FILES}


def download_data(data, problem):
    """Has torchvision download the data set, and publishes the files that are missing or wrong.

    Raises Failure, with the problem that made it necessary, if that does not succeed.
    """
    part = data / ".download"
    try:
        raw = data / artifacts.RAW_FOLDER
        raw.mkdir(parents=True, exist_ok=True)
        with artifacts.locked_folder(raw, wait=True):  # two first trainings may share the folder
            wrong = [name for name in artifacts.RAW_FILES if not is_sound(data, name)]
            if not wrong:
                return
            say(f"train: downloading MNIST into {raw} (12 MB)")
            artifacts.remove(part)  # what a killed download left
            try:
                fetch_with_torchvision(part)
                for name in wrong:
                    place_raw(data, name, artifacts.read_raw(part, name))
            finally:
                artifacts.remove(part)
    except (OSError, RuntimeError, Failure) as error:
        reason = str(error).splitlines()[0].rstrip(":.")
        raise Failure(f"{problem} (It could not be downloaded: {reason}.)") from None


def is_sound(data, name):
    """Whether a raw file is there and is, to the byte, the data set's."""
    try:
        return bool(artifacts.read_raw(data, name))
    except Failure:
        return False


def fetch_with_torchvision(folder):
    """Downloads MNIST into a folder, from the mirrors that torchvision names."""
    from torchvision.datasets import MNIST  # not earlier: nothing else needs torchvision

    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        MNIST(folder, download=True)


def place_raw(data, name, content):
    """Publishes a raw file. What had its size, and so may be somebody's own data, is kept beside it."""
    path = data / artifacts.RAW_FOLDER / name
    if path.is_file() and path.stat().st_size == len(content):
        path.rename(path.with_name(f"{name}.replaced"))
    publish(path, bytes(content))


def warn_of_cores(workers):
    """Says so if there are more workers than cores to run them."""
    cores = artifacts.count_cores()
    if workers > cores:
        say(f"train: warning: {workers} workers on {cores} core{'s' * (cores > 1)} get in each other's way")


class Progress:
    """Says how the training goes: a bar on a terminal, elsewhere a line every few seconds or batches."""

    LINE_SECONDS, BAR_SECONDS = 5, 0.2

    def __init__(self, log_interval):
        self.log_interval = log_interval
        self.bar = sys.stdout.isatty() and not log_interval
        self.first = None

    def __call__(self, run):
        """Called many times a second with the training; speaks when it is time."""
        now, steps, images, loss_sum = time.monotonic(), *run.queue.totals()
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
            say(f"\r[{'#' * filled}{'.' * (20 - filled)}] {text} ", end="")
        else:
            say(f"train: {text}")


def publish_model(run, folder):
    """Publishes what a finished training is for: the curves, the model, and the results that vouch for it."""
    import torch

    publish(folder / "training.png", draw_curves(run.results["history"]))
    buffer = io.BytesIO()
    torch.save(run.state_dict(), buffer)
    publish(folder / "mnist_cnn.pt", buffer.getvalue())
    run.publish_finished(hashlib.sha256(buffer.getvalue()).hexdigest())
    accuracy, seconds = run.results["history"][-1]["held_out_accuracy"], run.results["seconds"]
    say(f"train: finished in {seconds:.1f} s: {accuracy:.2f} % of the held-out images right")


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
