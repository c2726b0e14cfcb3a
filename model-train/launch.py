"""Runs train on one of several nodes, under torchrun: the entry point of the train image in a cluster.

Every node starts it with the same flags. torchrun, PyTorch's launcher, lets the nodes find each other at the
rendezvous, tells each its rank, and starts them again, from the last checkpoint, when a node is lost or one joins. All
flags that --help does not list are those of train. The exit status is that of train, whatever torchrun's own would be.

    launch.py --nnodes 1:2 --rdzv-endpoint train:29400 --epochs 20
    launch.py --epochs 20       # where PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT say the rest

cluster.py is what train then does; docs/cluster.md is about running it.
"""

import process

if __name__ == "__main__":
    process.prepare_process("launch")

import argparse
import logging
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import environment
import settings
from process import Failure, exit_on_failure, print_error

TRAIN = Path(__file__).with_name("train.py")
STOP_SECONDS = 4  # for train to end after a signal; it needs 3 at most
RESUME_HINT = "Start all nodes again with the same flags: the training resumes from its last checkpoint"


def main() -> int:
    """Run train on this node and return its exit status."""
    args, flags = parse_args()
    with exit_on_failure("launch"):
        if not args.rdzv_endpoint and "PET_MASTER_ADDR" not in os.environ:
            raise Failure("give --rdzv-endpoint HOST:PORT, the same on every node. See: launch --help", status=2)
        check_flags_of_train(flags)
        for (name, _), seconds in ((environment.TIMEOUT, args.timeout), (environment.JOIN_TIMEOUT, args.join_timeout)):
            os.environ[name] = str(seconds)
        os.environ[environment.HAS_BEGUN] = str(Path(tempfile.mkdtemp()) / "begun")
        end_when_stopped()
        return launch(args)
    return 1


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return the flags of this program, and the other words, which are flags of train."""
    parser = argparse.ArgumentParser(
        prog="launch",
        description="Runs train on one of several nodes under torchrun. All other flags are those of train.",
        allow_abbrev=False,
    )
    parser.error = partial(process.refuse_flags, "launch")  # type: ignore[method-assign]
    text = "number of nodes, or the least and the most (default: PET_NNODES, or 1:1)"
    parser.add_argument("--nnodes", type=parse_nodes, metavar="MIN:MAX", help=text)
    text = "address of the node that starts the others' training, the same on every node (default: PET_MASTER_ADDR)"
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help=text)
    text = "name of the training, for several at one endpoint (default: %(default)s)"
    parser.add_argument("--rdzv-id", default="mnist", metavar="NAME", help=text)
    text = "address of this node for the others (default: that of its host name)"
    parser.add_argument("--local-addr", metavar="HOST", help=text)
    text = "how often to go on from the last checkpoint after a node was lost (default: %(default)s)"
    parser.add_argument("--max-restarts", type=parse_restarts, default=3, metavar="N", help=text)
    for name, (variable, default), text in (
        ("--timeout", environment.TIMEOUT, "seconds to wait for the rendezvous, and for another node while training"),
        ("--join-timeout", environment.JOIN_TIMEOUT, "seconds to wait for the least number of nodes, and their data"),
    ):
        seconds = os.environ.get(variable, default)
        text = f"{text} (default: {variable}, or {default})"
        parser.add_argument(name, type=settings.parse_count, default=seconds, metavar="S", help=text)
    return parser.parse_known_args()


def parse_nodes(text: str) -> str:
    """Return a number of nodes, or the least and the most, as torchrun takes it."""
    numbers = text.split(":")
    if len(numbers) <= 2 and all(map(str.isdecimal, numbers)) and 1 <= int(numbers[0]) <= int(numbers[-1]):
        return text
    raise argparse.ArgumentTypeError(f"{text} must be a positive integer, or two, such as 1:2")


def parse_restarts(text: str) -> int:
    """Return an integer that is not negative."""
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} must be 0 or a positive integer")


def check_flags_of_train(flags: list[str]) -> None:
    """End with status 2 and one line if train does not take these flags: before torchrun would try them again."""
    sys.argv = ["train", *flags]
    settings.parse_args()


def end_when_stopped() -> None:
    """Have a thread end this process after a signal, should torch, in C++ code, not let Python handle it in time."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait_for_signals() -> None:
        while number := os.read(reader, 1)[0]:
            if number in process.STOP_SIGNALS:
                time.sleep(STOP_SECONDS)
                os._exit(128 + number)

    threading.Thread(target=wait_for_signals, daemon=True).start()


def launch(args: argparse.Namespace) -> int:
    """Run train under torchrun; return its exit status. Raise Failure if the other nodes cannot be reached."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or a node that joins later waits for a stale address
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what goes wrong is said in one line, below
    logging.disable()

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import api as rendezvous
    from torch.distributed.launcher.api import elastic_launch

    config, _, _ = torchrun.config_from_args(torchrun.parse_args(torchrun_words(args)))  # type: ignore[no-untyped-call]
    where = config.rdzv_endpoint
    try:
        statuses = elastic_launch(config, train_on_this_node)()
        return int(*statuses.values())
    except SignalException as stopped:
        print_error(f"launch: stopped by {stopped.sigval.name}. {RESUME_HINT}")
        return 128 + stopped.sigval
    except ChildFailedError:
        raise Failure(f"gave up after {args.max_restarts} restarts. {RESUME_HINT}") from None
    except rendezvous.RendezvousClosedError:
        raise Failure(f"the training at {where} has ended. {RESUME_HINT}") from None
    except rendezvous.RendezvousTimeoutError:
        raise Failure(f"too few nodes came to {where} in {args.join_timeout} s. {RESUME_HINT}") from None
    except (rendezvous.RendezvousError, RuntimeError):
        hint = f"The node at {where} must run, and be reachable from here. {RESUME_HINT}"
        raise Failure(f"cannot reach the rendezvous at {where}. {hint}") from None


def torchrun_words(args: argparse.Namespace) -> list[str]:
    """Return the command line of torchrun. For what is not on it, torchrun looks at the variables PET_*."""
    words = ["--nproc-per-node", "1"]  # a node's cores are for the workers of one train process
    if args.nnodes:
        words += ["--nnodes", args.nnodes]
    if args.local_addr:
        words += ["--local-addr", args.local_addr]
    if args.rdzv_endpoint:
        # Once the least number of nodes is there, others have 5 seconds to come; so much a lost node delays the rest.
        limits = f"last_call_timeout=5,join_timeout={args.join_timeout},read_timeout={args.timeout}"
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", args.rdzv_endpoint, "--rdzv-conf", limits]
        words += ["--rdzv-id", args.rdzv_id, "--max-restarts", str(args.max_restarts)]
    return [*words, "train.py"]


def train_on_this_node() -> int:
    """Run train in a process that torchrun has started, and return its exit status, for torchrun to hand over.

    A failure in the training, such as the loss of another node, ends this process: torchrun then starts it again.
    """
    process.prepare_process("train")
    _, sys.argv[1:] = parse_args()
    try:
        status: int = runpy.run_path(str(TRAIN))["main"]()
    except SystemExit:
        process.end_process(1)  # at once: gloo's threads, which still run, abort a process that ends as usual
    except Exception as error:  # torch would write it to a file
        process.report_crash(type(error), error, error.__traceback__)
        process.end_process(1)
    if status > 128:  # torchrun has sent the signal, and does not wait for a result
        process.end_process(status)
    return status


if __name__ == "__main__":
    process.end_process(main())
