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
from artifacts import DATA_SHA256, Failure, handle_stop_signals, publish, read_limited, say, signal_name
from hogwild import PRECISION, RunningClock, Task, Worker
from plan import RECIPE, VERSION, WAY_OUT, as_flags, check_epochs, parse_results, read_results

HELD_OUT = 5_000  # the last of the 60,000 training images watch the training; no worker ever sees them
CHECKPOINT_SECONDS = 3
STALL_SECONDS = 60  # no batch takes that long: workers that are at one when none has finished in this time have hung
STOP_SECONDS = 1.5  # for the batches under way when the training is asked to stop
LEAST_ACCURACY = 20  # percent; chance is 10
KEPT_ON_RESUMING = ("run", "batches", "start", "seconds", "history", "workers", "lost_workers")
LARGEST_CHECKPOINT = 16_000_000  # the parameters, a velocity for each of 64 workers, and the history


RESUME_HINT = "Resume with: docker compose run --rm train"


class Stopped(Exception):
    """The training was asked to stop, by the signal `number`; what it had done is saved, or could not be in time."""

    def __init__(self, number, saved):
        fate = "its progress is in checkpoint.pt" if saved else "a batch took too long, so the last checkpoint is kept"
        super().__init__(f"stopped by {signal.Signals(number).name}: {fate}. {RESUME_HINT}")
        self.number = number


def new_results(settings):
    """What train_results.json says of a training that has not begun."""
    workers = [
        {"rank": rank, "images": 0, "steps": 0, "waited_seconds": 0.0, "loss_sum": 0.0}
        for rank in range(settings["num_processes"])
    ]
    return {
        "version": VERSION,
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
        "data_sha256": DATA_SHA256,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "torchvision")},
    }


class Training:
    """A training under way. `results` is what train_results.json says of it, up to its last pause."""

    def __init__(self, results, images, labels, folder=None):
        """Prepares to train on from where the results are, given all 60,000 images; without a folder, keeps nothing."""
        self.results, self.folder = results, folder
        self.held_out = images[-HELD_OUT:], labels[-HELD_OUT:]
        self.task = Task(results["settings"], images[:-HELD_OUT], labels[:-HELD_OUT], results["start"])
        self.queue = self.task.queue
        self.asked_to_stop, self.processes = None, []

    def run(self, show):
        """Trains to the end; show(training) is called many times a second.

        Raises Stopped on SIGTERM and SIGINT, and Failure if the training cannot go on; the last checkpoint is kept.
        """
        handle_stop_signals(self.ask_to_stop)
        try:
            self.fork_workers()
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
        if self.asked_to_stop is None:  # a second signal does not give the batches under way more time
            self.asked_to_stop, self.since_asked = number, RunningClock()

    def train_epoch(self, limit, show):
        """Has all batches up to a number trained on, then a pause; before, one every few seconds, for a checkpoint."""
        self.queue.set_limit(limit)
        while self.queue.next.value < limit:
            time.sleep(0.01)
            self.watch_workers()
            show(self)
            if self.asked_to_stop:
                self.pause()
                self.keep(self.checkpoint())
                raise Stopped(self.asked_to_stop, saved=True)
            if time.monotonic() > self.last_checkpoint + CHECKPOINT_SECONDS:
                self.pause()
                content = self.checkpoint()
                self.queue.set_limit(limit)  # the workers train on while the disk takes its time
                self.keep(content)
        self.pause()

    def pause(self):
        """Has the workers finish what they are at and rest, and brings the results up to date.

        Raises Stopped if that takes too long for a stop.
        """
        self.queue.pause()
        while not self.queue.is_drained():
            if self.asked_to_stop and self.since_asked.seconds() > STOP_SECONDS:
                raise Stopped(self.asked_to_stop, saved=False)
            time.sleep(0.0005)
            self.watch_workers()
        self.results["batches"] = self.queue.next.value
        self.results["seconds"] = time.monotonic() - self.began
        self.results["images_per_second"] = self.queue.totals()[1] / self.results["seconds"]
        self.results["workers"] = self.queue.per_worker()

    # The workers ---------------------------------------------------------------------------------------------------

    def fork_workers(self):
        """Starts the workers. A fork shares the images and torch itself with them, and takes no time.

        It is safe here since the parent has run nothing on more than one thread so far, and runs no backward pass.
        """
        self.queue.resume(self.results["batches"], self.results["workers"])
        self.errors, write_end = os.pipe()
        os.set_blocking(self.errors, False)
        context = multiprocessing.get_context("fork")
        for rank in range(self.results["settings"]["num_processes"]):
            worker = Worker(rank, self.task, write_end)
            process = context.Process(target=worker.run, daemon=True)
            process.start()
            self.processes.append(process)
        # The workers are forked, and at rest when the parent judges: now it may use as many threads as they are.
        torch.set_num_threads(len(self.processes))
        self.began = time.monotonic() - self.results["seconds"]
        self.last_checkpoint = time.monotonic()
        self.steps, self.since_step = 0, RunningClock()

    def end_workers(self):
        """Lets the workers end, and kills those that do not within a second."""
        self.queue.closed.value = 1
        deadline = time.monotonic() + 1
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()

    def watch_workers(self):
        """Hands on the batch of a worker that was killed; raises Failure if one failed or all are dead."""
        for rank, process in enumerate(self.processes):
            state = self.queue.workers[rank]
            if process.exitcode is None or state.dead:
                continue
            if process.exitcode >= 0:
                raise Failure(f"worker {rank} failed: {self.read_error()}; trained with {self.recipe()}. {WAY_OUT}")
            number = -process.exitcode
            cause = signal_name(number)
            say(f"train: worker {rank} was killed by {cause}; the others take over its work")
            batch = state.current_batch if state.is_busy() else None
            self.results["lost_workers"].append({"rank": rank, "signal": number, "batch": batch})
            state.dead = 1
        if all(state.dead for state in self.queue.workers):
            raise Failure(
                "all workers are dead; is there enough memory (MNIST_MEMORY)? "
                f"The last checkpoint is kept. {RESUME_HINT}"
            )
        steps, _, _ = self.queue.totals()
        if steps != self.steps:
            self.steps = steps
            self.since_step.reset()
        elif self.since_step.seconds() > STALL_SECONDS:
            self.since_step.reset()
            for state, process in zip(self.queue.workers, self.processes, strict=True):
                if state.is_busy():
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
            raise Failure(f"the model's outputs are not finite; trained with {self.recipe()}. {WAY_OUT}")
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
        say(over_the_bar + describe(history[-1], self.results["settings"]["epochs"]))

    def check_accuracy(self):
        """Raises Failure if the training has come to nothing."""
        accuracy = self.results["history"][-1]["held_out_accuracy"]
        if accuracy < LEAST_ACCURACY:
            raise Failure(
                f"after the last epoch only {accuracy:.1f} % of the held-out images are read right, so nothing is "
                f"published; trained with {self.recipe()}. {WAY_OUT}"
            )

    def checkpoint(self):
        """All that resuming needs, as the bytes of a checkpoint; the workers must be at rest."""
        if not self.task.parameters.isfinite().all():
            raise Failure(f"the parameters are no longer finite; trained with {self.recipe()}. {WAY_OUT}")
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
        publish_results(self.folder, self.results)

    def keep(self, checkpoint):
        """Publishes a checkpoint, and then the results, which may be behind it but never ahead."""
        if self.folder:
            publish(self.folder / "checkpoint.pt", checkpoint)
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
    publish(folder / "train_results.json", json.dumps(results, indent=1).encode())


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
            raise Failure(f"{path} is not of the training that train_results.json describes. {WAY_OUT}")
        # Killed before its first checkpoint: what checkpoint there is, is left from an earlier training.
    results = new_results(plan.settings)
    if folder:
        publish_results(folder, results)
    return Training(results, images, labels, folder)


def resumed(checkpoint, settings, images, labels, folder):
    """The training of a checkpoint, to go on to the number of epochs in the settings."""
    results, path = checkpoint["results"], folder / "checkpoint.pt"
    if any(results["settings"][name] != settings[name] for name in RECIPE):
        raise Failure(f"{path} has other settings than train_results.json. {WAY_OUT}")
    per_epoch = math.ceil(len(images[:-HELD_OUT]) / settings["batch_size"])
    check_epochs(settings["epochs"], results["settings"]["epochs"], results["batches"] / per_epoch, folder)
    longer = settings["epochs"] > results["settings"]["epochs"]
    if longer and len(results["history"]) == results["settings"]["epochs"]:
        results["start"] = results["batches"]  # the learning rate had fallen to 0: it has another rise and fall
    results |= new_results(settings) | {key: results[key] for key in KEPT_ON_RESUMING}
    training = Training(results, images, labels, folder)
    epochs_done = len(results["history"])
    if not 0 <= results["batches"] - epochs_done * per_epoch <= per_epoch or results["start"] > results["batches"]:
        raise Failure(f"{path} is damaged (its progress and its history contradict each other). {WAY_OUT}")
    net.fill_model(training.task.model, checkpoint["model"], path, WAY_OUT)
    net.check_tensor(checkpoint["velocities"], "velocities", training.task.velocities.shape, path, WAY_OUT)
    training.task.velocities.copy_(checkpoint["velocities"])
    return training


def load_checkpoint(path):
    """What is in checkpoint.pt: model, velocities, results. Raises Failure if it is missing or damaged."""
    checkpoint = net.load_tensors(read_limited(path, LARGEST_CHECKPOINT, WAY_OUT), path, WAY_OUT)
    try:
        parts = dict.items(checkpoint)  # a TypeError if it is no dict
        model, velocities, results = (dict(parts)[name] for name in ("model", "velocities", "results"))
        return {"model": model, "velocities": velocities, "results": parse_results(results)}
    except (KeyError, TypeError, ValueError):
        raise Failure(f"{path} is damaged. {WAY_OUT}") from None
