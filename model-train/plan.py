"""Decides what a run of train has to do, from its flags and from what is in the volume, before torch is imported."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
from dataclasses import dataclass

# Of each setting: its type, its default, the smallest and the largest value that make sense.
SETTINGS = {
    "batch_size": (int, 96, 1, 55_000),
    "lr": (float, 0.1, 1e-9, 1e3),
    "momentum": (float, 0.8, 0.0, 0.9999),
    "seed": (int, 1, 0, 2**32 - 1),
    "num_processes": (int, 2, 1, 64),
    "epochs": (int, 15, 1, 10_000),
}
# The settings that make two trainings the same training. The number of epochs is no part of it: it may grow.
RECIPE = ("batch_size", "lr", "momentum", "seed", "num_processes")

LARGEST_MODEL = 1_000_000  # mnist_cnn.pt takes 90 kB
LARGEST_RESULTS = 10_000_000  # train_results.json takes a few kB, and some 200 bytes more with every epoch
WAY_OUT = "To start over, with the old model in place until the new one is finished: train --fresh"


class Refusal(Exception):
    """A request that does not fit what is in the volume, or a volume that says nothing usable: one line, a status."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


@dataclass
class Plan:
    """What to do, `action`: "nothing", "start" or "resume" (train on included); `line` tells a person so."""

    action: str
    line: str
    settings: dict


def checked(name, value):
    """The value of a setting, if it has the right type and range; raises ValueError otherwise."""
    kind, _, smallest, largest = SETTINGS[name]
    if type(value) is not kind or not smallest <= value <= largest:
        raise ValueError(f"must be {'an integer' if kind is int else 'a number'} from {smallest:,} to {largest:,}")
    return value


def parse_results(text):
    """The contents of train_results.json as a dict. Raises ValueError unless what a training goes on from is valid."""
    try:
        results = json.loads(text)
        for name in SETTINGS:
            checked(name, results["settings"][name])
        if type(results["finished"]) is not bool or (results["finished"] and not results["model_sha256"]):
            raise ValueError("finished or model_sha256")
        for name in ("run", "host", "began"):
            if not results[name].isprintable():
                raise ValueError(name)
        for name in ("history", "workers", "lost_workers"):
            if not isinstance(results[name], list):
                raise ValueError(name)
        if len(results["workers"]) != results["settings"]["num_processes"]:
            raise ValueError("workers")
        check_numbers(results, ("batches", "start"), ("seconds",))
        for worker in results["workers"]:
            check_numbers(worker, ("rank", "images", "steps"), ("loss_sum", "waited_seconds"))
        for line in results["history"]:
            check_numbers(line, ("epoch",), ("train_loss", "held_out_loss", "held_out_accuracy", "seconds"))
        if len(results["history"]) > results["settings"]["epochs"]:
            raise ValueError("history")
        return results
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def check_numbers(part, whole, fractional):
    """Raises ValueError unless the named entries of a dict are finite and not negative, the first ones whole."""
    for name in whole:
        if type(part[name]) is not int or not 0 <= part[name] < 2**62:
            raise ValueError(name)
    for name in fractional:
        if type(part[name]) is not float or not 0 <= part[name] < math.inf:
            raise ValueError(name)


def read_results(folder):
    """What train_results.json says, or None if there is none."""
    path = folder / "train_results.json"
    if not path.exists():
        return None
    try:
        return parse_results(read_start(path, LARGEST_RESULTS))
    except ValueError:
        raise Refusal(f"{path} is damaged. {WAY_OUT}", 1) from None


def read_start(path, limit):
    """The contents of a file, up to a limit of bytes. Raises Refusal if it cannot be read."""
    try:
        if not path.is_file():
            raise Refusal(f"{path} is not a file. {WAY_OUT}", 1)
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error.strerror}). {WAY_OUT}", 1) from None


def decide(asked, fresh, folder):
    """The plan for the settings asked for (those not given are absent), as the README's table has it.

    Raises Refusal with status 2 if they contradict what is in the volume, with 1 if that cannot be read.
    """
    settings = {name: default for name, (_, default, _, _) in SETTINGS.items()} | asked
    model, checkpoint = folder / "mnist_cnn.pt", folder / "checkpoint.pt"
    if fresh:
        return Plan("start", "starts over", settings)
    results = read_results(folder)
    if results is not None:
        return decide_on(results, asked, model)
    if checkpoint.exists():
        raise Refusal(f"{checkpoint} is there without its train_results.json. {WAY_OUT}", 1)
    if not model.exists():
        return Plan("start", "starts", settings)
    if asked:
        raise Refusal(f"{model} was not trained here, so there is no recipe to go on with. {WAY_OUT}", 2)
    return Plan("nothing", f"{model} was not trained here and is left as it is. {WAY_OUT}", settings)


def decide_on(results, asked, model):
    """The plan where train_results.json tells of a training, finished or not."""
    settings, epochs_done = results["settings"], len(results["history"])
    differing = [name for name in RECIPE if name in asked and asked[name] != settings[name]]
    if differing:
        has = ", ".join(f"{flag(name)} {settings[name]}" for name in differing)
        wants = ", ".join(f"{flag(name)} {asked[name]}" for name in differing)
        raise Refusal(f"the training in {model.parent} has {has}, not {wants}. {WAY_OUT}", 2)
    epochs = asked.get("epochs", settings["epochs"])
    if not (results["finished"] and model.exists()):
        if epochs < epochs_done:
            raise Refusal(f"the training in {model.parent} is past {epochs} epochs already. {WAY_OUT}", 2)
        return Plan("resume", f"goes on after {epochs_done} of {epochs} epochs", settings | {"epochs": epochs})
    if hashlib.sha256(read_start(model, LARGEST_MODEL)).hexdigest() != results["model_sha256"]:
        line = f"{model} is not the model that train_results.json describes, and is left as it is. {WAY_OUT}"
        return Plan("nothing", line, settings)
    if epochs > epochs_done:
        return Plan("resume", f"trains on from {epochs_done} to {epochs} epochs", settings | {"epochs": epochs})
    return Plan("nothing", f"{model} is finished ({epochs_done} epochs): nothing to do. {WAY_OUT}", settings)


def as_flags(settings):
    """The settings as a person would give them."""
    return " ".join(f"{flag(name)} {settings[name]}" for name in SETTINGS)


def flag(name):
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def hold(folder):
    """Holds the volume for one training at a time, by a lock on the folder that ends with this process.

    Raises Refusal with status 2, and with what is known of the holder, if another training has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = "another train container"
        with contextlib.suppress(Refusal, KeyError, TypeError):
            results = read_results(folder)
            holder = f"the training that {results['host']} began at {results['began']}"
        raise Refusal(f"{folder} is held by {holder}. Wait for its end, or stop it.", 2) from None
    try:
        yield
    finally:
        os.close(handle)
