"""Decides what a run of train has to do, from its flags and from what is in the volume, before torch is imported."""

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass

from artifacts import DATA_SHA256, Failure, check_destinations, locked_folder, read_limited

VERSION = "2.0"  # of the pipeline; train_results.json names the one that wrote it
TRAINING_IMAGES = 55_000  # the first of the 60,000; the others watch the training
# Of each setting: its type, its default, the smallest and the largest value that make sense.
SETTINGS = {
    "batch_size": (int, 96, 1, TRAINING_IMAGES),
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
    """The contents of train_results.json as a dict. Raises ValueError unless what a training goes on from is valid.

    A setting that is not in it is of a newer version than the one that wrote it, and has its default.
    """
    try:
        results = json.loads(text)
        unknown = [repr(name) for name in results["settings"] if name not in SETTINGS]
        if unknown:
            version = results.get("version", "an unknown version")
            raise ValueError(f"this version does not know the settings {', '.join(unknown)} of {version!r}")
        results["settings"] = default_settings() | results["settings"]
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
        if not isinstance(results.setdefault("data_sha256", DATA_SHA256), dict):
            raise ValueError("data_sha256")
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
        return parse_results(read_limited(path, LARGEST_RESULTS, WAY_OUT))
    except ValueError as error:
        raise Failure(f"{path} is damaged, or of another version ({error}). {WAY_OUT}") from None


def default_settings():
    """Every setting's default."""
    return {name: default for name, (_, default, _, _) in SETTINGS.items()}


def decide(asked, fresh, folder):
    """The plan for the settings asked for (those not given are absent), as the README's table has it.

    Raises Failure, with status 2 if they contradict what is in the volume, with 1 if that cannot be read.
    """
    check_destinations(folder, "mnist_cnn.pt", "checkpoint.pt", "train_results.json", "training.png")
    settings = default_settings() | asked
    model, checkpoint = folder / "mnist_cnn.pt", folder / "checkpoint.pt"
    if fresh:
        return Plan("start", "starts over", settings)
    results = read_results(folder)
    if results is not None:
        return decide_on(results, asked, model)
    if checkpoint.exists():
        raise Failure(f"{checkpoint} is there without its train_results.json. {WAY_OUT}")
    if not model.exists():
        return Plan("start", "starts", settings)
    if asked:
        raise Failure(f"{model} was not trained here, so there is no recipe to go on with. {WAY_OUT}", 2)
    return Plan("nothing", f"{model} was not trained here and is left as it is. {WAY_OUT}", settings)


def decide_on(results, asked, model):
    """The plan where train_results.json tells of a training, finished or not."""
    settings, epochs_done = results["settings"], len(results["history"])
    check_data(results, model.parent)
    differing = [name for name in RECIPE if name in asked and asked[name] != settings[name]]
    if differing:
        has = ", ".join(f"{flag(name)} {settings[name]}" for name in differing)
        wants = ", ".join(f"{flag(name)} {asked[name]}" for name in differing)
        raise Failure(f"the training in {model.parent} has {has}, not {wants}. {WAY_OUT}", 2)
    epochs = asked.get("epochs", settings["epochs"])
    if not (results["finished"] and model.exists()):
        done = results["batches"] / math.ceil(TRAINING_IMAGES / settings["batch_size"])
        check_epochs(epochs, settings["epochs"], done, model.parent)
        return Plan("resume", f"goes on after {epochs_done} of {epochs} epochs", settings | {"epochs": epochs})
    if hashlib.sha256(read_limited(model, LARGEST_MODEL, WAY_OUT)).hexdigest() != results["model_sha256"]:
        line = f"{model} is not the model that train_results.json describes, and is left as it is. {WAY_OUT}"
        return Plan("nothing", line, settings)
    if epochs > epochs_done:
        return Plan("resume", f"trains on from {epochs_done} to {epochs} epochs", settings | {"epochs": epochs})
    return Plan("nothing", f"{model} is finished ({epochs_done} epochs): nothing to do. {WAY_OUT}", settings)


def check_epochs(requested, wanted, done, folder):
    """Raises Failure if an unfinished training, of which `wanted` epochs were asked for, is past those asked for now.

    Its weights are then not those of a training of that many epochs, whose learning rate has fallen to 0 by the end.
    """
    if requested != wanted and requested <= done:
        raise Failure(
            f"the training in {folder} has done {done:.1f} of its {wanted} epochs, so --epochs {requested} does not "
            f"fit. Leave it out, or give more. {WAY_OUT}",
            status=2,
        )


def check_data(results, folder):
    """Raises Failure if a training was on other data than this version's."""
    if results["data_sha256"] != DATA_SHA256:
        raise Failure(f"the training in {folder} was on other data (its sha256 sums differ). {WAY_OUT}", status=2)


def as_flags(settings):
    """The settings as a person would give them."""
    return " ".join(f"{flag(name)} {settings[name]}" for name in SETTINGS)


def flag(name):
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def hold(folder):
    """Holds the volume for one training at a time, by a lock on the folder that ends with this process.

    Raises Failure with status 2, and with what is known of the holder, if another training has it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder, wait=False))
        except BlockingIOError:
            holder = "another train container"
            with contextlib.suppress(Failure, KeyError, TypeError):
                results = read_results(folder)
                holder = f"the training that {results['host']} began at {results['began']}"
            raise Failure(f"{folder} is held by {holder}. Wait for its end, or stop it.", status=2) from None
        yield
