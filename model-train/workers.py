"""The worker processes: started, watched, paused and stopped by the parent."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType, TracebackType

import torch
from artifacts import FRESH_HINT
from batch_queue import RunningClock
from hogwild import SharedState, Trainer
from process import STOP_SIGNALS, Failure, command, say, signal_name
from record import LostWorker, Record

HANG_SECONDS = 30  # between two checks while no batch is finished; a busy worker that used no CPU in between is killed
STOP_SECONDS = 1.5  # for the current batches when the training is asked to stop
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
RESUME_HINT = f"Resume with: {command('train')}"


class Stopped(Exception):
    """A signal has ended the training; its progress is saved, or could not be saved in time."""

    def __init__(self, number: int, saved: bool) -> None:
        progress = "progress saved" if saved else "a batch took too long, so progress since the last checkpoint is lost"
        super().__init__(f"stopped by {signal_name(number)}; {progress}. {RESUME_HINT}")
        self.number = number


class StopRequest:
    """Whether a signal has asked the training to stop: its number, or 0."""

    def __init__(self) -> None:
        self.number, self.clock = 0, RunningClock()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second signal does not extend the time for the current batches."""
        if not self.number:
            self.number, self.clock = number, RunningClock()

    def is_overdue(self) -> bool:
        """Return whether the current batches have used up their time."""
        return bool(self.number) and self.clock.seconds() > STOP_SECONDS

    def raise_if_requested(self) -> None:
        """Raise Stopped if the training was asked to stop. Save the progress first."""
        if self.number:
            raise Stopped(self.number, saved=True)


class Workers:
    """The worker processes of a training. A context manager: it forks them on entry and ends them on exit."""

    def __init__(self, shared: SharedState, record: Record, stop: StopRequest) -> None:
        self.shared, self.queue, self.record, self.stop = shared, shared.queue, record, stop
        self.error_reader, self.error_writer = os.pipe()
        os.set_blocking(self.error_reader, False)
        self.started_at = time.monotonic() - record.seconds
        self.steps, self.since_last_step = 0, RunningClock()
        self.processes: list[ForkProcess] = []
        self.cpu_times: list[str] = []

    def __enter__(self) -> "Workers":
        """Fork the workers. A fork is fast, and shares the images and torch with them.

        It is safe because the parent has used a single thread so far.
        """
        context, parent = multiprocessing.get_context("fork"), os.getpid()
        for rank in range(self.record.settings.num_processes):
            arguments = (rank, self.shared, self.error_writer, parent)
            process = context.Process(target=run_worker, args=arguments, daemon=True)
            try:
                process.start()
            except OSError:
                self.end()
                raise
            self.processes.append(process)
        # The parent validates while the workers are idle, so it may use one thread per worker.
        torch.set_num_threads(len(self.processes))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """Let the workers end, and kill those that do not within a second."""
        self.queue.closed.value = 1
        deadline = time.monotonic() + 1
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()

    def drain(self) -> None:
        """Hand out no more batches, wait until all workers are idle, and bring the record up to date."""
        self.queue.stop_handing_out()
        self.wait_until_idle()
        self.record.update(self.queue.next.value, self.queue.worker_records(), self.seconds())

    def wait_until_idle(self) -> None:
        """Wait until all batches below the queue's limit are finished."""
        while not self.queue.is_drained():
            self.watch_unless_overdue()
            time.sleep(0.0005 if self.queue.all_handed_out() else 0.005)

    def watch_unless_overdue(self) -> None:
        """Do watch(), or raise Stopped if a request to stop has taken too long."""
        if self.stop.is_overdue():
            raise Stopped(self.stop.number, saved=False)
        self.watch()

    def seconds(self) -> float:
        """Return the seconds of the training so far, earlier runs included."""
        return time.monotonic() - self.started_at

    def watch(self) -> None:
        """Notice workers that were killed, so that others redo their batches, and kill workers that hang.

        Raise Failure if a worker failed or if all are dead.
        """
        for rank, process in enumerate(self.processes):
            if process.exitcode is not None and not self.queue.workers[rank].dead:
                self.note_death(rank, process.exitcode)
        if all(state.dead for state in self.queue.workers):
            hint = "The last checkpoint is intact. If memory ran out, raise MNIST_MEMORY"
            raise Failure(f"all workers were killed. {hint}. {RESUME_HINT}")
        steps, _, _ = self.queue.totals()
        if steps != self.steps:
            self.steps = steps
            self.since_last_step.reset()
        elif self.since_last_step.seconds() > HANG_SECONDS:
            self.since_last_step.reset()
            self.kill_hanging()

    def note_death(self, rank: int, exit_code: int) -> None:
        """Mark a worker as dead if a signal killed it; raise Failure if it ended by itself."""
        settings, state = self.record.settings, self.queue.workers[rank]
        if exit_code >= 0:
            raise Failure(f"worker {rank} failed: {self.read_error()}. Settings: {settings.as_flags()}. {FRESH_HINT}")
        batch = state.current_batch if state.is_busy() else None
        say(f"train: {death_message(rank, -exit_code, batch)}")
        self.record.lost_workers.append(LostWorker(rank, -exit_code, batch))
        state.dead = 1

    def kill_hanging(self) -> None:
        """Kill busy workers that have not used the CPU since the last call; watch() then notices their death."""
        before, self.cpu_times = self.cpu_times, [cpu_time(process.pid) for process in self.processes]
        for rank, process in enumerate(self.processes):
            if before and before[rank] == self.cpu_times[rank] and self.queue.workers[rank].is_busy():
                process.kill()

    def read_error(self) -> str:
        """Return the error message of a failed worker."""
        with contextlib.suppress(BlockingIOError):
            return os.read(self.error_reader, 1000).decode().splitlines()[0]
        return "no error message"


def death_message(rank: int, number: int, batch: int | None) -> str:
    """Return the message that a signal killed a worker, idle or busy with a batch."""
    death = f"worker {rank} was killed by {signal_name(number)}"
    return f"{death} while idle" if batch is None else f"{death}; another worker redoes its batch {batch}"


def cpu_time(pid: int | None) -> str:
    """Return the CPU time of a process in user and system mode, in clock ticks; empty if it has ended (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return " ".join(fields[11:13])


def run_worker(rank: int, shared: SharedState, error_writer: int, parent: int) -> None:
    """Train on one batch after another until there are no more: the main function of a worker process."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)  # the parent gets it too and stops its workers cleanly
    # A worker must not outlive its parent, or it would keep the lock of the volume.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    state = shared.queue.workers[rank]
    try:
        trainer = Trainer(rank, shared)
        while (number := wait_for_batch(rank, shared, parent)) is not None:
            images, loss_sum = trainer.train_batch(number)
            state.finish(images, loss_sum)
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        os.write(error_writer, f"{message}\n".encode())
        os._exit(1)


def wait_for_batch(rank: int, shared: SharedState, parent: int) -> int | None:
    """Wait for a batch and return its number, or None when the training is over."""
    began = time.monotonic()
    # The parent may have died before prctl() was called.
    while not shared.queue.closed.value and os.getppid() == parent:
        number = shared.queue.take(rank)
        if number is not None:
            shared.queue.workers[rank].waited_seconds += time.monotonic() - began
            return number
        time.sleep(0.001)
    return None
