"""The worker processes: started, given batches, watched and ended by the parent.

The parent alone knows who has which batch. It has a socket pair with each worker, on which it sends the numbers of
batches, and the worker answers each when it has trained on it. A batch counts when its answer arrives. When a worker is
killed, its socket closes, and the batches that it has not answered go to the others; no other is started in its place.
If it was killed while it changed the parameters, or between that and its answer, all or part of that batch is applied
twice.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import torch

from hogwild import SharedState, Trainer
from stage.output import say
from stage.process import MORE_MEMORY, STOP_SIGNALS, Failure, signal_name
from training.plan import fresh_hint_for
from training.record import LostWorker, Record, WorkerRecord
from training.stopping import LOST, RunningClock, Stopped, StopRequest

LOOK_SECONDS = 0.004  # between two looks at the answers
DRAIN_SECONDS = 0.0005  # the same, once all batches are sent
# Batches that a worker has ahead, at least 2, to last until the next look. With more, more are redone if it is killed.
AHEAD_BATCHES, AHEAD_IMAGES = 6, 600
# After so long without an answer CPU times are noted; after as long again, busy workers with the same time are killed.
HANG_SECONDS = 30
MAX_MESSAGE_BYTES = 10_000  # an error's 500 characters are up to 12 bytes each in JSON
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class Worker:
    """A worker process, as the parent sees it: it owes an answer for each of the batches in `sent`, in this order."""

    def __init__(self, shared: SharedState, counts: WorkerRecord) -> None:
        self.rank, self.counts = counts.rank, counts
        self.sent: list[int] = []
        self.error = "no error message"
        self.socket, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        other_end.settimeout(None)  # whatever a library has made the default: a worker waits as long as it takes
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=run_worker, args=(self.rank, shared, other_end), daemon=True)
        with other_end:  # must be open in the worker only: so this end is closed when the worker ends
            self.process.start()

    def send(self, number: int) -> bool:
        """Send a batch; return whether that was possible: its socket may be full, or the worker dead."""
        try:
            self.socket.send(str(number).encode())
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            return False
        self.sent.append(number)
        return True

    def take_answers(self) -> bool:
        """Count the batches that it has answered since the last call; return whether it has ended."""
        while True:
            try:
                message = self.socket.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                continue  # it had not read all batches; what it has sent before can still be read
            if not message:
                return True
            answer = json.loads(message)
            if isinstance(answer, str):
                self.error = answer
            else:
                number, images, loss_sum, waited_seconds = answer
                self.sent.remove(number)
                self.counts.add(images, 1, loss_sum, waited_seconds)

    def end(self, deadline: float) -> None:
        """Let the process end, and kill it if it has not ended at the deadline, of time.monotonic()."""
        with contextlib.suppress(OSError):  # it has ended already
            self.socket.shutdown(socket.SHUT_RDWR)  # closing would not do: workers forked later have a copy of this end
        self.process.join(max(0.0, deadline - time.monotonic()))
        self.process.kill()  # which does nothing to a process that has ended
        self.process.join()
        self.socket.close()


class Workers:
    """The workers of a training. A context manager: it forks them on entry and ends them on exit.

    On node `node` of `nodes`, they train on the batches whose number is node modulo nodes: poll() hands them out.
    """

    def __init__(self, shared: SharedState, record: Record, stop: StopRequest, node: int, nodes: int) -> None:
        self.shared, self.record, self.stop = shared, record, stop
        # The node's first batch that has not been sent: now, the first of its batches that is not done.
        self.next_to_send, self.nodes = record.batches + (node - record.batches) % nodes, nodes
        self.returned: list[int] = []  # batches of killed workers
        self.ahead = max(2, min(AHEAD_BATCHES, AHEAD_IMAGES // record.settings.batch_size))
        self.living: list[Worker] = []
        self.since_last_answer = RunningClock()
        self.cpu_times: dict[int, str] = {}  # by rank

    def __enter__(self) -> "Workers":
        """Fork the workers. A fork is fast, and shares the images and torch with them.

        It is safe because the parent has no other thread at this point.
        """
        try:
            for counts in self.record.workers:
                self.living.append(Worker(self.shared, counts))
        except OSError:
            self.__exit__()
            raise
        # The parent validates while the workers are idle, so it may use one thread per worker.
        torch.set_num_threads(len(self.living))
        return self

    def __exit__(self, *error: object) -> None:
        """Let the workers end, and kill those that do not within a second."""
        deadline = time.monotonic() + 1
        for worker in self.living:
            worker.end(deadline)

    def poll(self, limit: int) -> bool:
        """Hand out batches below `limit`, count answers, look after the workers; return whether there is more to do.

        Call it until it returns False: then all batches below the limit are done, and the workers are idle. Raise
        Failure if a worker has failed or all were killed, Stopped if a request to stop has waited too long for them.
        """
        self.hand_out(limit)
        time.sleep(DRAIN_SECONDS if self.next_to_send >= limit else LOOK_SECONDS)
        self.watch()
        return bool(self.next_to_send < limit or self.returned or any(worker.sent for worker in self.living))

    def hand_out(self, limit: int) -> None:
        """Send batches, those of killed workers first, to the worker that has the fewest, until all have enough."""
        while self.returned or self.next_to_send < limit:
            worker = min(self.living, key=lambda worker: len(worker.sent))
            number = min(self.returned, default=self.next_to_send)
            if len(worker.sent) >= self.ahead or not worker.send(number):
                return
            if self.returned:
                self.returned.remove(number)
            else:
                self.next_to_send += self.nodes

    def watch(self) -> None:
        """Count answers; notice workers that were killed; kill those that hang. Raise what poll() raises."""
        before = self.record.totals()
        for worker in [*self.living]:
            if worker.take_answers():
                self.handle_end(worker)
        if not self.living:
            raise Failure(f"all workers were killed, perhaps because memory ran out. {MORE_MEMORY}")
        if self.stop.is_overdue():
            raise Stopped(self.stop.number, LOST)
        if self.record.totals() != before:
            self.since_last_answer = RunningClock()
        elif self.since_last_answer.seconds() > HANG_SECONDS:
            self.since_last_answer = RunningClock()
            self.kill_hanging()

    def handle_end(self, worker: Worker) -> None:
        """Take back the batches of a worker that was killed. Raise Failure if it has ended by itself."""
        worker.end(time.monotonic() + 1)
        exit_code = worker.process.exitcode or 0
        if exit_code >= 0:
            hint = "Fix the cause, then run it again."
            if worker.error.startswith("ArithmeticError"):  # hogwild.py: the loss is not finite
                hint = f"Try a smaller --lr. {fresh_hint_for(self.record.settings)}"
            raise Failure(f"worker {worker.rank} failed: {worker.error}. {hint}")
        say(f"train: {killed_message(worker.rank, -exit_code, worker.sent)}")
        self.record.lost_workers.append(LostWorker(worker.rank, -exit_code, worker.sent[0] if worker.sent else None))
        self.living.remove(worker)
        self.returned += worker.sent

    def kill_hanging(self) -> None:
        """Kill busy workers that have not used the CPU since the last call; watch() then finds that they have ended."""
        before, self.cpu_times = self.cpu_times, {worker.rank: cpu_time(worker.process.pid) for worker in self.living}
        for worker in self.living:
            if worker.sent and before.get(worker.rank) == self.cpu_times[worker.rank]:
                worker.process.kill()


def killed_message(rank: int, number: int, batches: list[int]) -> str:
    """Return the message that a signal killed a worker, idle or with batches to do."""
    text = f"worker {rank} was killed by {signal_name(number)}"
    if not batches:
        return f"{text} while idle"
    return f"{text}; its batch{'es' * (len(batches) > 1)} {', '.join(map(str, batches))} will be redone"


def cpu_time(pid: int | None) -> str:
    """Return the CPU time of a process in user and system mode, in clock ticks; empty if it has ended (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return " ".join(fields[11:13])


def run_worker(rank: int, shared: SharedState, parent: socket.socket) -> None:
    """Train on each batch that the parent sends, and answer; end when it shuts the socket down.

    An answer is a list: batch, images, sum of their losses, seconds waited for the batch. An error is a text.
    """
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)  # the parent gets it too and stops its workers cleanly
    # A worker must not outlive its parent, or it would keep the lock of the volume.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    forked_by = multiprocessing.parent_process()
    if forked_by is None or os.getppid() != forked_by.pid:  # it ended before that
        os._exit(1)
    try:
        trainer = Trainer(rank, shared)
        began = time.monotonic()
        while message := parent.recv(MAX_MESSAGE_BYTES):
            number, waited_seconds = int(message), time.monotonic() - began
            answer = [number, *trainer.train_batch(number), waited_seconds]
            parent.send(json.dumps(answer).encode())
            began = time.monotonic()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        with contextlib.suppress(OSError):  # the training has ended
            parent.send(json.dumps(text[:500]).encode())
        os._exit(1)
