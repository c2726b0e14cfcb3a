"""Tries every row of the crash contract many times: prints a table of faults, tries, survivals, and what was kept.

    make chaos
    .venv/bin/python tests/chaos.py --only kills --kills 10 --seed 7

The short version of each row is in tests/containers. Exit status 1 if anything was not survived.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import corpus
import faults
from faults import OFTEN, Pipeline

SEEDS = 5  # trainings whose accuracy is compared
MOST_SECONDS_LOST = 5
MOST_ACCURACY_LOST = 0.1  # percent of the test images, in the mean of the seeds
SPAN = 8  # seconds: a random kill comes after up to this time; starting takes about 2 of them


@dataclass
class Row:
    """A line of the table."""

    fault: str
    tries: int
    survived: int
    kept: str


class Chaos:
    """What the rows share: a folder to work in, a volume that is complete and one whose training is to go on."""

    def __init__(self, options, folder):
        self.options, self.folder, self.random = options, folder, random.Random(options.seed)
        self.complete, self.begun = folder / "complete", folder / "begun"
        with Pipeline(self.complete) as pipeline:
            for stage, *flags in (("train", "--epochs", "1"), ("evaluate",), ("infer",)):
                ended = pipeline.run(stage, *flags)
                assert ended.status == 0, ended.stderr
        with Pipeline(self.begun) as pipeline:
            train = pipeline.start("train", "--epochs", "100", "--lr", "0.02")  # mild enough to end at any epoch
            train.wait_until_or_end((self.begun / "checkpoint.pt").exists, "a checkpoint")
            faults.kill(train)
            train.end()
        faults.change_settings(self.begun, epochs=len(faults.progress_of(self.begun)["history"]) + 1)

    def copy(self, of=None):
        """A new folder, with what is in another one."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return shutil.copytree(of, folder / "volume") if of else folder / "volume"

    def repeat(self, fault, attempts, kept):
        """The row of some attempts, functions that return what is wrong afterwards as a list of sentences."""
        survived = 0
        for number, attempt in enumerate(attempts, 1):
            try:
                wrong = attempt()
            except Exception as error:
                wrong = [f"{type(error).__name__}: {error}"]
            survived += not wrong
            say(f"{fault}, {number} of {len(attempts)}: {'; '.join(wrong) or 'survived'}")
        return Row(fault, len(attempts), survived, kept)

    # SIGKILL ---------------------------------------------------------------------------------------------------------

    def kills(self):
        """Kills trainings at random moments; compares those that were killed with those that never were."""
        self.lost, accuracies, seed, rows = [], [], 0, []
        while len(self.lost) < self.options.kills or seed < min(SEEDS, self.options.kills):
            seed += 1
            killed, row = self.train_and_kill(seed)
            rows.append(row)
            if seed <= SEEDS:
                accuracies.append((killed, self.accuracy(seed, self.copy())))
        difference = sum(killed - never for killed, never in accuracies) / len(accuracies)
        say(f"accuracy, killed and never killed: {accuracies}; mean difference {difference:+.3f}")
        mean = sum(self.lost) / len(self.lost)
        kept = f"all artefacts whole; at worst {max(self.lost):.1f} s lost, {mean:.1f} s in the mean"
        tries, survived = sum(row.tries for row in rows), sum(row.survived for row in rows)
        yield Row(f"SIGKILL at a random moment, over {seed} trainings", tries, survived, kept)
        right = len(accuracies) if abs(difference) <= MOST_ACCURACY_LOST else 0
        kept = f"test accuracy {difference:+.3f} points in the mean against never killed"
        yield Row("a training killed again and again", len(accuracies), right, kept)

    def train_and_kill(self, seed):
        """A training that is killed as often as there is time for; its accuracy, and its row."""
        folder, tries, survived = self.copy(), 0, 0
        share = -(-self.options.kills // SEEDS)
        with Pipeline(folder) as pipeline:
            while tries < share and len(self.lost) < self.options.kills:
                before = self.batches(folder)
                train = pipeline.start("train", "--seed", seed)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    faults.docker("wait", train.id, timeout=self.random.uniform(0, SPAN))
                    break  # it has finished
                faults.kill(train)
                ended = train.end()
                if ended.status == 0:
                    break
                self.lost.append(faults.seconds_lost(ended, folder))
                wrong = faults.faults_in(folder)
                wrong += ["more lost than allowed"] * (self.lost[-1] > MOST_SECONDS_LOST)
                wrong += ["progress undone"] * (self.batches(folder) < before)
                wrong += [f"exit status {ended.status}"] * (ended.status != 137)
                tries, survived = tries + 1, survived + (not wrong)
                found = "; ".join(wrong) or f"whole, at batch {self.batches(folder):,}"
                say(f"seed {seed}, killed after {ended.seconds:.1f} s, {self.lost[-1]:.1f} s lost: {found}")
        return self.accuracy(seed, folder), Row("", tries, survived, "")

    def accuracy(self, seed, folder):
        """Trains to the end what is in a folder, and returns the accuracy on the test images."""
        with Pipeline(folder) as pipeline:
            ended = pipeline.run("train", "--seed", seed, seconds=600)
            assert ended.status == 0, ended.stderr
            assert [path.name for path in folder.glob(".*")] == []
            assert pipeline.run("evaluate", "--min-accuracy", "0").status == 0
        return json.loads((folder / "eval_results.json").read_text())["Accuracy"]

    @staticmethod
    def batches(folder):
        """The batches that the checkpoint has done."""
        progress = faults.progress_of(folder)
        return progress["batches"] if progress else 0

    def publishing(self):
        """Kills each stage in the instant in which it writes a file."""
        files = [
            ("train", f".{name}.part")
            for name in ("checkpoint.pt", "train_results.json", "training.png", "mnist_cnn.pt")
        ]
        files += [("train", "mnist_cnn.pt")]
        files += [
            ("evaluate", f".{name}.part") for name in ("confusion_matrix.png", "mistakes.png", "eval_results.json")
        ]
        files += [
            ("infer", f) for f in (".results.new", ".results.old", ".predictions.json.part", ".predictions.png.part")
        ]
        attempts = [partial(self.kill_publishing, stage, file) for stage, file in files]
        yield self.repeat("SIGKILL while a file is written", attempts, "the old or the new artefacts, whole")

    def kill_publishing(self, stage, file):
        folder = self.copy(of=self.begun if stage == "train" else self.complete)
        names = {path.name for path in folder.iterdir()}
        with Pipeline(folder) as pipeline:
            container = pipeline.start(stage)
            hit = faults.kill_once_there_is(container, pipeline, file)
            container.end()
            wrong = faults.faults_in(folder)
            again = pipeline.run(stage)
        wrong += [f"the next run ended with {again.status}"] * (again.status != 0)
        wrong += [f"lost: {name}" for name in names if not (folder / name).exists()]
        wrong += [f"left behind: {path.name}" for path in folder.glob(".*")]
        return wrong if hit or file == ".results.old" else [*wrong, "not hit"]  # .results.old is there for an instant

    # Signals ---------------------------------------------------------------------------------------------------------

    def stops(self):
        for name, ask, status in (("SIGTERM", faults.ask_to_stop, 143), ("SIGINT", faults.press_ctrl_c, 130)):
            attempts = [partial(self.stop, ask, status)] * 3
            yield self.repeat(
                f"{name} at a random moment", attempts, f"a checkpoint of that moment; exit {status} within 3 s"
            )

    def stop(self, ask, status):
        folder = self.copy(of=self.begun)
        faults.change_settings(folder, epochs=100)
        with Pipeline(folder) as pipeline:
            train = pipeline.start("train")
            train.wait_until_it_listens()
            with contextlib.suppress(subprocess.TimeoutExpired):
                faults.docker("wait", train.id, timeout=self.random.uniform(0, 5))
            asked = time.time()
            ask(train)
            ended = train.end()
        wrong = faults.faults_in(folder) + [f"exit status {ended.status}"] * (ended.status != status)
        return wrong + ["it took more than 3 s"] * (ended.ended - asked > 3)

    # Workers ---------------------------------------------------------------------------------------------------------

    def workers(self):
        attempts = [partial(self.hit_workers, faults.kill_one_worker, 0)] * 5
        yield self.repeat("one worker killed", attempts, "everything; the loss is in train_results.json")
        attempts = [partial(self.hit_workers, faults.kill_all_workers, 1)] * 3
        yield self.repeat("all workers killed", attempts, "the last checkpoint; exit 1")
        attempts = [partial(self.hit_workers, faults.freeze_one_worker, 0)]
        yield self.repeat("a worker that stands still", attempts, "everything; it is killed after 60 s")

    def hit_workers(self, fault, status):
        folder = self.copy(of=self.begun)
        with Pipeline(folder) as pipeline:
            train = pipeline.start("train", *OFTEN)
            train.wait_until_it_trains()
            faults.wait_for_workers(train)
            fault(train)
            ended = train.end()
        lost, wrong = faults.results_of(folder)["lost_workers"], faults.faults_in(folder)
        wrong += [f"exit status {ended.status}: {ended.stderr}"] * (ended.status != status)
        wrong += ["more or less than one line"] * bool(ended.status and not ended.is_one_line)
        return wrong + ["the loss is not recorded"] * (ended.status == 0 and len(lost) != 1)

    # Numbers, disks, company, limits ---------------------------------------------------------------------------------

    def numbers(self):
        for name, fault in (
            ("a loss that is not finite", faults.throw_off_course),
            ("dead neurons", faults.kill_the_neurons),
        ):
            yield self.repeat(name, [partial(self.spoil, fault)] * 2, "the last good checkpoint; nothing is published")

    def spoil(self, fault):
        folder = self.copy(of=self.begun)
        fault(folder)
        with Pipeline(folder) as pipeline:
            ended = pipeline.run("train")
        return faults.faults_in(folder) + refusal(ended) + ["published"] * (folder / "mnist_cnn.pt").exists()

    def disks(self):
        attempts = [partial(self.fill, self.random.randrange(0, 240, 4)) for _ in range(5)]
        yield self.repeat("the disk is full", attempts, "the old artefacts; the next run finishes")
        attempts = [partial(self.write_protect, stage) for stage in faults.STAGES]
        yield self.repeat("a read-only volume", attempts, "the old artefacts")

    def fill(self, left):
        with Pipeline(self.copy(), disk=faults.small_disk("4m")) as pipeline:
            pipeline.put(self.begun)
            faults.fill_disk(pipeline, left)
            full = pipeline.run("train")
            faults.free_disk(pipeline)
            wrong = faults.faults_in(pipeline.look()) + refusal(full)
            wrong += [f"left behind: {path.name}" for path in pipeline.folder.glob(".*")]
            return wrong + ["the next run failed"] * (pipeline.run("train").status != 0)

    def write_protect(self, stage):
        folder = self.copy(of=self.complete)
        before = faults.artefacts(folder)
        with Pipeline(folder, **faults.read_only()) as pipeline:
            ended = pipeline.run(stage, *(["--epochs", "2"] if stage == "train" else []))
        return refusal(ended) + ["changed"] * (faults.artefacts(folder) != before)

    def company(self):
        yield self.repeat("two trainings at once", [self.train_twice] * 3, "the first; the second exits 2")

    def train_twice(self):
        folder = self.copy(of=self.begun)
        with Pipeline(folder) as pipeline:
            first = pipeline.start("train", *OFTEN)
            first.wait_until_it_trains()
            second, ended = pipeline.run("train"), first.end()
        wrong = faults.faults_in(folder) + [f"the first ended with {ended.status}"] * (ended.status != 0)
        return wrong + refusal(second, 2)

    def limits(self):
        half, one = faults.half_the_memory(), faults.one_cpu()
        yield self.repeat("half of the memory", [partial(self.train_within, half)], "everything")
        yield self.repeat("one CPU", [partial(self.train_within, one)], "everything")

    def train_within(self, limit):
        folder = self.copy(of=self.begun)
        with Pipeline(folder, **limit) as pipeline:
            ended = pipeline.run("train")
        return faults.faults_in(folder) + [f"exit status {ended.status}: {ended.stderr}"] * (ended.status != 0)

    def files(self):
        """Has the stages meet the whole corpus, two at a time."""
        cases = corpus.cases()
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(self.meet, cases))
        for file in dict.fromkeys(case.file for case in cases):
            wrong = [result for case, result in zip(cases, results, strict=True) if case.file == file]
            name = file.rpartition("/")[2]
            yield Row(f"{name} broken or forged", len(wrong), wrong.count([]), "all other files; no code was run")

    def meet(self, case):
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            wrong = corpus.meet(case, self.complete, folder)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{case.name}: {'; '.join(wrong) or 'survived'}")
        return wrong


def refusal(ended, status=1):
    """What is wrong with how a stage refused or failed."""
    wrong = [f"exit status {ended.status}"] * (ended.status != status)
    return wrong + [f"more or less than one line: {ended.stderr!r}"] * (not ended.is_one_line)


def say(line):
    print(f"chaos: {line}", flush=True)


def table(rows):
    """The rows as text."""
    lines = [("fault", "tries", "survived", "what was kept")]
    lines += [(row.fault, str(row.tries), str(row.survived), row.kept) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


PARTS = ["kills", "publishing", "stops", "workers", "numbers", "disks", "company", "limits", "files"]


def main():
    parser = argparse.ArgumentParser(description="Tries every row of the crash contract many times.")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (may be given more than once)")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="random kills (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(10**6), help="of the random moments (default: any)"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it too leaves nothing behind
    began = time.monotonic()
    subprocess.run(["docker", "compose", "build", "--quiet"], cwd=faults.TREE, check=True)
    say(f"the seed of all random moments is {options.seed}")
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        chaos = Chaos(options, Path(folder))
        for part in options.only or PARTS:
            rows += getattr(chaos, part)()
    print(f"\n{table(rows)}\n")
    say(f"{time.monotonic() - began:.0f} s in all")
    return any(row.survived < row.tries for row in rows)


if __name__ == "__main__":
    sys.exit(main())
