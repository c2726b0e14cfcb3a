"""Tries every row of the crash contract many times: prints a table of faults, tries, survivals, and what was saved.

    make chaos
    .venv/bin/python tests/chaos.py --only kills --kills 10 --seed 7

The rows are in scenarios.py; the container tests try each once. Exit status 1 if anything was not survived.
"""

import argparse
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import corpus
import faults
import scenarios
from pipeline import Pipeline, build, docker, remove_images
from stages import STAGES, read_json

SEEDS = 5  # trainings whose accuracy is compared
MOST_ACCURACY_LOST = 0.1  # percent of the test images, in the mean of the seeds
SPAN = 8  # seconds: a random kill comes after up to this time; starting takes about 2 of them

FILES = [  # the stages with what they write
    *(("train", f".{name}.part") for name in ("checkpoint.pt", "train_results.json", "training.png", "mnist_cnn.pt")),
    ("train", "mnist_cnn.pt"),
    *(("evaluate", f".{name}.part") for name in ("confusion_matrix.png", "mistakes.png", "eval_results.json")),
    *(("infer", name) for name in (".results.new", ".results.old", ".predictions.json.part", ".predictions.png.part")),
]


@dataclass
class Row:
    """A line of the table."""

    fault: str
    tries: int
    survived: int
    saved: str


class Chaos:
    """What the rows share: a folder to work in, a volume that is complete and one with a training under way."""

    def __init__(self, options, folder):
        self.options, self.folder, self.random = options, folder, random.Random(options.seed)
        self.complete, self.begun = folder / "complete", folder / "begun"
        with Pipeline(self.complete) as project:
            for stage in STAGES:
                scenarios.succeeds(project.run(stage, *(["--epochs", "1"] if stage == "train" else [])))
        faults.begin_training(self.begun)

    def new(self):
        """A new folder."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "volume"

    def copy(self, stage):
        """A copy of a volume on which a stage has something to do, soon done; or of the "unfinished" training."""
        copy = shutil.copytree(self.begun if stage in ("train", "unfinished") else self.complete, self.new())
        if stage == "train":
            faults.shorten_training(copy)
        return copy

    def repeat(self, fault, attempts, saved):
        """The row of some attempts: functions that raise something, or return a list of what is wrong."""
        survived = 0
        for number, attempt in enumerate(attempts, 1):
            wrong = problem(attempt)
            survived += not wrong
            say(f"{fault}, {number} of {len(attempts)}: {wrong or 'survived'}")
        return Row(fault, len(attempts), survived, saved)

    def kills(self):
        yield from RandomKills(self).rows()

    def publishing(self):
        """Kills each stage at the instant in which it writes a file; .results.old is there for a very short time."""
        kill = scenarios.kill_while_publishing
        attempts = [lambda s=stage, f=file: kill(self.copy(s), s, f, f == ".results.old") for stage, file in FILES]
        yield self.repeat("SIGKILL while a file is written", attempts, "the old or the new artifacts, whole")

    def stops(self):
        stop = scenarios.stop_training
        for number in (signal.SIGTERM, signal.SIGINT):
            attempts = [lambda n=number: stop(self.copy("unfinished"), n, after=self.random.uniform(0, 5))] * 3
            saved = f"a checkpoint of that moment; exit {128 + number} within 3 s"
            yield self.repeat(f"{number.name} at a random moment", attempts, saved)

    def workers(self):
        attempts = [lambda: scenarios.lose_one_worker(self.copy("train"), faults.kill_one_worker)] * 5
        yield self.repeat("one worker killed", attempts, "everything; the loss is in train_results.json")
        attempts = [lambda: scenarios.lose_all_workers(self.copy("unfinished"))] * 3
        yield self.repeat("all workers killed", attempts, "the last checkpoint; exit 1")
        attempts = [lambda: scenarios.lose_one_worker(self.copy("train"), faults.freeze_one_worker)]
        yield self.repeat("a worker that stands still", attempts, "everything; it is killed after a minute")

    def numbers(self):
        for name, fault in (
            ("a loss that is not finite", faults.make_loss_infinite),
            ("dead neurons", faults.make_neurons_dead),
        ):
            attempts = [lambda fault=fault: scenarios.train_to_nothing(self.copy("train"), fault)] * 2
            yield self.repeat(name, attempts, "the last good checkpoint; nothing is published")

    def disks(self):
        left = [self.random.randrange(0, 240, 4) for _ in range(5)]
        attempts = [lambda kb=kb: scenarios.fill_disk(self.copy("train"), self.new(), "train", kb) for kb in left]
        yield self.repeat("the disk is full", attempts, "the old artifacts; the next run finishes")
        attempts = [lambda stage=stage: scenarios.write_protect(self.copy(stage), stage) for stage in STAGES]
        yield self.repeat("a read-only volume", attempts, "the old artifacts")

    def pairs(self):
        attempts = [lambda: scenarios.train_twice(self.copy("unfinished"))] * 3
        yield self.repeat("two trainings at once", attempts, "the first; the second exits 2")

    def limits(self):
        for name, limit in (("half of the memory", faults.half_the_memory()), ("one CPU", faults.ONE_CPU)):
            attempts = [lambda limit=limit: scenarios.run_within(self.copy("train"), limit)]
            yield self.repeat(name, attempts, "everything")

    def files(self):
        """Has the stages read every file of the corpus, two at a time."""
        cases = corpus.cases()
        with ThreadPoolExecutor(2) as pool:
            results = [*pool.map(self.run_case, cases)]
        for file in dict.fromkeys(case.file for case in cases):
            wrong = [result for case, result in zip(cases, results, strict=True) if case.file == file]
            saved = "all other files; no code was run"
            yield Row(f"{Path(file).name} broken or forged", len(wrong), wrong.count(""), saved)

    def run_case(self, case):
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        wrong = problem(partial(corpus.run_case, case, self.complete, folder))
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{case.name}: {wrong or 'survived'}")
        return wrong


class RandomKills:
    """Trainings that are killed at random moments, again and again."""

    def __init__(self, chaos):
        self.chaos, self.deaths, self.survived = chaos, [], 0

    def rows(self):
        """Kills trainings at random moments; compares those that were killed with those that never were."""
        accuracies, seed = [], 0
        while len(self.deaths) < self.chaos.options.kills or seed < min(SEEDS, self.chaos.options.kills):
            seed += 1
            killed = self.train_and_kill(seed)
            if seed <= SEEDS:
                accuracies.append((killed, self.accuracy(seed, self.chaos.new())))
        difference = sum(killed - never for killed, never in accuracies) / len(accuracies)
        say(f"accuracy, killed and never killed: {accuracies}; mean difference {difference:+.3f}")
        lost = [death.seconds_lost for death in self.deaths]
        saved = f"all artifacts whole; at worst {max(lost):.1f} s lost, {sum(lost) / len(lost):.1f} s in the mean"
        yield Row(f"SIGKILL at a random moment, over {seed} trainings", len(lost), self.survived, saved)
        right = len(accuracies) if abs(difference) <= MOST_ACCURACY_LOST else 0
        saved = f"test accuracy {difference:+.3f} points in the mean against never killed"
        yield Row("a training killed again and again", len(accuracies), right, saved)

    def train_and_kill(self, seed):
        """The accuracy of a training that is killed as often as there is time for."""
        volume, tries = self.chaos.new(), 0
        with Pipeline(volume) as project:
            while tries < -(-self.chaos.options.kills // SEEDS) and len(self.deaths) < self.chaos.options.kills:
                before, tries = faults.batches_done(volume), tries + 1
                train = project.start("train", "--seed", str(seed))
                if has_ended(train, self.chaos.random.uniform(0, SPAN)):
                    break
                train.send(signal.SIGKILL)
                death = faults.death_of(train, volume)
                if death.ended.status == 0:
                    break
                wrong = problem(partial(scenarios.check_death, death, before))
                self.deaths.append(death)
                self.survived += not wrong
                moment = f"seed {seed}, killed after {death.ended.seconds:.1f} s, {death.seconds_lost:.1f} s lost"
                say(f"{moment}: {wrong or f'whole, at batch {death.batches:,}'}")
        return self.accuracy(seed, volume)

    def accuracy(self, seed, volume):
        """Trains to the end what is in a folder, and returns the accuracy on the test images."""
        with Pipeline(volume) as project:
            scenarios.succeeds(project.run("train", "--seed", str(seed), seconds=600))
            assert [*volume.glob(".*")] == []
            scenarios.succeeds(project.run("evaluate", "--min-accuracy", "0"))
        return read_json(volume / "eval_results.json")["Accuracy"]


def problem(attempt):
    """What is wrong with an attempt, as text; empty if nothing is."""
    try:
        return "; ".join(attempt() or [])
    except AssertionError as error:
        return f"not true: {traceback.extract_tb(error.__traceback__)[-1].line} {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def has_ended(container, seconds):
    """Whether a container ends within some seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return docker("wait", container.id, timeout=seconds).returncode == 0
    return False


def say(line):
    print(f"chaos: {line}", flush=True)


def table(rows):
    """The rows as text."""
    lines = [("fault", "tries", "survived", "what was saved")]
    lines += [(row.fault, str(row.tries), str(row.survived), row.saved) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


PARTS = ["kills", "publishing", "stops", "workers", "numbers", "disks", "pairs", "limits", "files"]


def main():
    parser = argparse.ArgumentParser(description="Tries every row of the crash contract many times.")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (may be given more than once)")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="random kills (default: %(default)s)")
    text = "of the random moments (default: any)"
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help=text)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it too leaves nothing behind
    began, rows = time.monotonic(), []
    say(f"the seed of all random moments is {options.seed}")
    try:
        build()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            chaos = Chaos(options, Path(folder))
            for part in options.only or PARTS:
                rows += getattr(chaos, part)()
    finally:
        remove_images()
    print(f"\n{table(rows)}\n")
    say(f"{time.monotonic() - began:.0f} s in all")
    return any(row.survived < row.tries for row in rows)


if __name__ == "__main__":
    sys.exit(main())
