"""A training as its parent process runs it: deals out epochs, watches the workers, judges, keeps checkpoints."""

import io
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
import uuid
from datetime import UTC, datetime
from importlib.metadata import version

import net
import torch
import torch.nn.functional as F
from hogwild import PRECISION, Task, Worker
from plan import RECIPE, WAY_OUT, as_flags, parse_results, read_results

HELD_OUT = 5_000  # the last of the 60,000 training images watch the training; no worker ever sees them
CHECKPOINT_SECONDS = 3
STALL_SECONDS = 60  # no batch takes that long: workers that are at one when none has finished in this time have hung
STOP_SECONDS = 1.5  # for the batches under way when the training is asked to stop
LEAST_ACCURACY = 20  # percent; chance is 10
KEPT_ON_RESUMING = ("run", "batches", "start", "seconds", "history", "workers", "lost_workers")
LARGEST_CHECKPOINT = 16_000_000  # the parameters, a velocity for each of 64 workers, and the history


GO_ON = "The last checkpoint is kept; go on with: docker compose run --rm train"


class Stopped(Exception):
    """The training was asked to stop, by the signal `number`."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def new_results(settings):
    """What train_results.json says of a training that has not begun."""
    workers = [
        {"rank": rank, "images": 0, "steps": 0, "waited_seconds": 0.0, "loss_sum": 0.0}
        for rank in range(settings["num_processes"])
    ]
    return {
        "finished": False,
        "run": uuid.uuid4().hex,
        "host": platform.node(),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "batches": 0,
        "start": 0,
        "seconds": 0.0,
        "images_per_second": 0.0,
        "history": [],
        "workers": workers,
        "lost_workers": [],
        "precision": str(PRECISION).removeprefix("torch."),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "torchvision")},
    }


class Training:
    """A training under way. `results` is what train_results.json says of it, up to its last pause."""

    def __init__(self, results, images, labels, folder=None):
        """Prepares to train on from where the results are, given all 60,000 images; without a folder, keeps nothing."""
        self.results, self.folder = results, folder
        self.held_out = images[-HELD_OUT:], labels[-HELD_OUT:]
        self.task = Task(results["settings"], images[:-HELD_OUT], labels[:-HELD_OUT], results["start"])
        self.dealer = self.task.dealer
        self.asked_to_stop, self.stop_by = None, math.inf

    def run(self, show):
        """Trains to the end; show(training) is called many times a second.

        Raises Stopped on SIGTERM and SIGINT, and Failure if the training cannot go on; the last checkpoint is kept.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask_to_stop)
        self.fork_workers()
        try:
            for epoch in range(len(self.results["history"]), self.results["settings"]["epochs"]):
                self.train_epoch((epoch + 1) * self.task.per_epoch, show)
                self.judge()
            self.keep(self.checkpoint())
        finally:
            self.end_workers()
        if self.folder:
            self.check_accuracy()

    def ask_to_stop(self, number, frame):
        """Handles a signal: the training stops after the batches that are under way."""
        self.asked_to_stop, self.stop_by = number, time.monotonic() + STOP_SECONDS

    def train_epoch(self, limit, show):
        """Has all batches up to a number trained on, then a pause; before, one every few seconds, for a checkpoint."""
        self.dealer.deal_up_to(limit)
        while self.dealer.next.value < limit:
            time.sleep(0.01)
            self.watch_workers()
            show(self)
            if self.asked_to_stop:
                self.pause()
                self.keep(self.checkpoint())
                raise Stopped(self.asked_to_stop)
            if time.monotonic() > self.last_checkpoint + CHECKPOINT_SECONDS:
                self.pause()
                content = self.checkpoint()
                self.dealer.deal_up_to(limit)  # the workers train on while the disk takes its time
                self.keep(content)
        self.pause()

    def pause(self):
        """Has the workers finish what they are at and rest, and brings the results up to date.

        Raises Stopped if that takes too long for a stop.
        """
        self.dealer.pause()
        while not self.dealer.is_dry():
            if time.monotonic() > self.stop_by:
                raise Stopped(self.asked_to_stop)
            time.sleep(0.0005)
            self.watch_workers()
        self.results["batches"] = self.dealer.next.value
        self.results["seconds"] = time.monotonic() - self.began
        self.results["images_per_second"] = self.dealer.totals()[1] / self.results["seconds"]
        self.results["workers"] = self.dealer.sums()

    # The workers ---------------------------------------------------------------------------------------------------

    def fork_workers(self):
        """Starts the workers. A fork shares the images and torch itself with them, and takes no time.

        It is safe here since the parent has run nothing on more than one thread so far, and runs no backward pass.
        """
        self.dealer.resume(self.results["batches"], self.results["workers"])
        self.errors, write_end = os.pipe()
        os.set_blocking(self.errors, False)
        context = multiprocessing.get_context("fork")
        self.processes = []
        for rank in range(self.results["settings"]["num_processes"]):
            worker = Worker(rank, self.task, write_end)
            self.processes.append(context.Process(target=worker.run, daemon=True))
            self.processes[-1].start()
        # The workers are forked, and at rest when the parent judges: now it may use as many threads as they are.
        torch.set_num_threads(len(self.processes))
        self.began = time.monotonic() - self.results["seconds"]
        self.last_checkpoint = self.last_step = time.monotonic()
        self.steps = 0

    def end_workers(self):
        """Lets the workers end, and kills those that do not within a second."""
        self.dealer.closed.value = 1
        deadline = time.monotonic() + 1
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()

    def watch_workers(self):
        """Hands on the batch of a worker that was killed; raises Failure if one failed or all are dead."""
        for rank, process in enumerate(self.processes):
            row = self.dealer.rows[rank]
            if process.exitcode is None or row.dead:
                continue
            if process.exitcode >= 0:
                raise net.Failure(f"worker {rank} failed: {self.read_error()}; trained with {self.recipe()}. {WAY_OUT}")
            number = -process.exitcode
            cause = f"signal {number} ({signal.strsignal(number)})"
            print(f"train: worker {rank} was ended by {cause}; the others take over its work", flush=True)
            self.results["lost_workers"].append({"rank": rank, "signal": number, "batch": row.held})
            row.dead = 1
        if all(row.dead for row in self.dealer.rows):
            raise net.Failure(f"all workers are dead; is there enough memory? {GO_ON}")
        steps = sum(row.steps for row in self.dealer.rows)
        if steps != self.steps:
            self.steps, self.last_step = steps, time.monotonic()
        elif time.monotonic() > self.last_step + STALL_SECONDS:
            self.last_step = time.monotonic()
            for row, process in zip(self.dealer.rows, self.processes, strict=True):
                if row.held >= 0:
                    process.kill()  # to be found dead in the next round, and its batch handed on

    def read_error(self):
        """What a worker said before it ended."""
        try:
            return os.read(self.errors, 1000).decode().splitlines()[0]
        except BlockingIOError:
            return "it said nothing"

    def recipe(self):
        """The settings as flags."""
        return as_flags(self.results["settings"])

    # What is kept --------------------------------------------------------------------------------------------------

    def judge(self):
        """Ends an epoch: its line of the history, with loss and accuracy on the held-out images."""
        images, labels = self.held_out
        log_probabilities = net.predict(self.task.model, images)
        if not log_probabilities.isfinite().all():
            raise net.Failure(f"the model's outputs are not finite; trained with {self.recipe()}. {WAY_OUT}")
        history, trained_on = self.results["history"], len(self.task.images)
        loss_sum = sum(worker["loss_sum"] for worker in self.results["workers"])
        history.append(
            {
                "epoch": len(history) + 1,
                "train_loss": loss_sum / trained_on - sum(line["train_loss"] for line in history),
                "held_out_loss": F.nll_loss(log_probabilities, labels).item(),
                "held_out_accuracy": 100 * (log_probabilities.argmax(1) == labels).float().mean().item(),
                "seconds": self.results["seconds"] - sum(line["seconds"] for line in history),
            }
        )
        over_the_bar = "\r\033[K" if sys.stdout.isatty() else ""
        print(over_the_bar + describe(history[-1], self.results["settings"]["epochs"]), flush=True)

    def check_accuracy(self):
        """Raises Failure if the training has come to nothing."""
        accuracy = self.results["history"][-1]["held_out_accuracy"]
        if accuracy < LEAST_ACCURACY:
            raise net.Failure(
                f"after the last epoch only {accuracy:.1f} % of the held-out images are read right, so nothing is "
                f"published; trained with {self.recipe()}. {WAY_OUT}"
            )

    def checkpoint(self):
        """All that resuming needs, as the bytes of a checkpoint; the workers must be at rest."""
        if not self.task.parameters.isfinite().all():
            raise net.Failure(f"the parameters are no longer finite; trained with {self.recipe()}. {WAY_OUT}")
        buffer = io.BytesIO()
        parts = {"model": self.state_dict(), "velocities": self.task.velocities}
        torch.save(parts | {"results": json.dumps(self.results)}, buffer)
        return buffer.getvalue()

    def state_dict(self):
        """The model's, with tensors of their own instead of views of the shared vector."""
        state_dict = self.task.model.state_dict()
        return {name: tensor.clone() for name, tensor in state_dict.items()}

    def publish_finished(self, model_sha256):
        """Writes the results of a finished training whose model is published."""
        self.results |= {"finished": True, "model_sha256": model_sha256}
        self.results["data_sha256"] = {name: sha256 for name, (_, sha256) in net.RAW_FILES.items()}
        publish_results(self.folder, self.results)

    def keep(self, checkpoint):
        """Publishes a checkpoint, and then the results, which may be behind it but never ahead."""
        if self.folder:
            net.publish(self.folder / "checkpoint.pt", checkpoint)
            publish_results(self.folder, self.results)
        self.last_checkpoint = time.monotonic()


def describe(line, epochs):
    """A line of the history, for a person."""
    return (
        f"train: epoch {line['epoch']} of {epochs}: {line['seconds']:.1f} s, loss {line['train_loss']:.4f}, held-out "
        f"loss {line['held_out_loss']:.4f}, held-out accuracy {line['held_out_accuracy']:.2f} %"
    )


def publish_results(folder, results):
    """Writes train_results.json."""
    net.publish(folder / "train_results.json", json.dumps(results, indent=1).encode())


def begin(plan, images, labels, folder):
    """The training that a plan asks for, from its start or from the folder's checkpoint.

    Raises Failure if there is to be a checkpoint but it is missing, damaged, or another training's.
    """
    if plan.action == "resume":
        known, path = read_results(folder), folder / "checkpoint.pt"
        checkpoint = load_checkpoint(path) if path.exists() or known["batches"] else None
        if checkpoint and checkpoint["results"]["run"] == known["run"]:
            return resumed(checkpoint, plan.settings, images, labels, folder)
        if known["batches"]:
            raise net.Failure(f"{path} is not of the training that train_results.json describes. {WAY_OUT}")
        # Killed before its first checkpoint: what checkpoint there is, is left from an earlier training.
    results = new_results(plan.settings)
    if folder:
        publish_results(folder, results)
    return Training(results, images, labels, folder)


def resumed(checkpoint, settings, images, labels, folder):
    """The training of a checkpoint, to go on to the number of epochs in the settings."""
    results, path = checkpoint["results"], folder / "checkpoint.pt"
    if any(results["settings"][name] != settings[name] for name in RECIPE):
        raise net.Failure(f"{path} has other settings than train_results.json. {WAY_OUT}")
    longer = settings["epochs"] > results["settings"]["epochs"]
    if longer and len(results["history"]) == results["settings"]["epochs"]:
        results["start"] = results["batches"]  # the learning rate had fallen to 0: it has another rise and fall
    results |= new_results(settings) | {key: results[key] for key in KEPT_ON_RESUMING}
    training = Training(results, images, labels, folder)
    epochs_done, per_epoch = len(results["history"]), training.task.per_epoch
    if not 0 <= results["batches"] - epochs_done * per_epoch <= per_epoch or results["start"] > results["batches"]:
        raise net.Failure(f"{path} is damaged (its progress and its history contradict each other). {WAY_OUT}")
    net.fill_model(training.task.model, checkpoint["model"], path, WAY_OUT)
    net.check_tensor(checkpoint["velocities"], "velocities", training.task.velocities.shape, path, WAY_OUT)
    training.task.velocities.copy_(checkpoint["velocities"])
    return training


def load_checkpoint(path):
    """What is in checkpoint.pt: model, velocities, results. Raises Failure if it is missing or damaged."""
    checkpoint = net.load_tensors(net.read_limited(path, LARGEST_CHECKPOINT, WAY_OUT), path, WAY_OUT)
    try:
        parts = dict.items(checkpoint)  # a TypeError if it is no dict
        model, velocities, results = (dict(parts)[name] for name in ("model", "velocities", "results"))
        return {"model": model, "velocities": velocities, "results": parse_results(results)}
    except (KeyError, TypeError, ValueError):
        raise net.Failure(f"{path} is damaged. {WAY_OUT}") from None
