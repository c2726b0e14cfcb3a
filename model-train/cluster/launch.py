"""Runs train on one of several nodes, under torchrun: the entry point of the train image in a cluster.

Every node starts it with the same flags. torchrun, PyTorch's launcher, lets the nodes find each other at the
rendezvous, tells each its rank, and starts them again, from the last checkpoint, when a node is lost or one joins. All
flags that --help does not list are those of train. The exit status is that of train, whatever torchrun's own would be.

    launch.py --nnodes 1:2 --rdzv-endpoint train:29400 --epochs 20
    launch.py --epochs 20       # where PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT say the rest

nodes.py is what train then does; docs/cluster.md is about running it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # where train.py is
from stage import process

if __name__ == "__main__":
    process.prepare_process()

import argparse
import contextlib
import fcntl
import logging
import os
import re
import runpy
import signal
import socket
import threading
import time
from typing import NoReturn

from cluster import environment
from stage import flags
from stage.output import print_error
from stage.process import Failure, exit_on_failure
from training import settings

TRAIN = Path(__file__).parents[1] / "train.py"
TRAIN_STOP_SECONDS = 4  # for train to end after a signal; it needs 3 at most
ELSEWHERE = "192.0.2.1"  # an address reserved for documentation (RFC 5737): the way to it is the default route
SIOCGIFADDR = 0x8915  # asks Linux for the address of a network interface: netdevice(7)
MAX_RESTARTS = 3
RESTART_HINT = "Start all nodes again with the same flags: the training resumes from its last checkpoint"


def main() -> int:
    """Run train on this node and return its exit status."""
    args, words = parse_args()
    with exit_on_failure("launch"):
        host, port = find_endpoint(args)
        check_flags_of_train(words)
        for (name, _), seconds in ((environment.TIMEOUT, args.timeout), (environment.JOIN_TIMEOUT, args.join_timeout)):
            os.environ[name] = str(seconds)
        # A file in memory, which leaves nothing behind however this process ends.
        os.environ[environment.HAS_BEGUN] = f"/proc/{os.getpid()}/fd/{os.memfd_create('begun')}"
        announce_own_address(args, host)
        end_when_stopped()
        status = launch(args, host, port)
    return status


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return the flags of this program, and the other words, which are flags of train."""
    description = "Runs train on one of several nodes under torchrun. All other flags are those of train."
    parser = flags.new_parser("launch", description)
    text = "number of nodes, or the least and the most (default: PET_NNODES, or 1:1)"
    nodes = os.environ.get("PET_NNODES")
    parser.add_argument("--nnodes", type=parse_nodes, default=nodes, metavar="MIN:MAX", help=text)
    text = "where the nodes meet, on one of them: the same on every node (default: PET_MASTER_ADDR, PET_MASTER_PORT)"
    parser.add_argument("--rdzv-endpoint", type=parse_endpoint, metavar="HOST:PORT", help=text)
    text = "name of the training, for several at one endpoint (default: %(default)s)"
    parser.add_argument("--rdzv-id", type=flags.nonempty(str), default="mnist", metavar="NAME", help=text)
    text = "address of this node for the others (default: the one on the way to the endpoint)"
    address = os.environ.get("PET_LOCAL_ADDR")
    parser.add_argument("--local-addr", default=address, metavar="HOST", help=text)
    default = f"default: {MAX_RESTARTS}; without --rdzv-endpoint PET_MAX_RESTARTS, or 0"
    text = f"how often to go on from the last checkpoint after a node was lost ({default})"
    parser.add_argument("--max-restarts", type=flags.integer(0), metavar="N", help=text)
    for name, (variable, default), text in (
        ("--timeout", environment.TIMEOUT, "seconds to wait for the rendezvous, and for another node while training"),
        ("--join-timeout", environment.JOIN_TIMEOUT, "seconds to wait for the least number of nodes, and their data"),
    ):
        seconds = os.environ.get(variable, default)
        text = f"{text} (default: {variable}, or {default})"
        parser.add_argument(name, type=flags.integer(1), default=seconds, metavar="S", help=text)
    return parser.parse_known_args()


def parse_nodes(text: str) -> str:
    """Return a number of nodes, or the least and the most, as torchrun takes it."""
    numbers = text.split(":")
    if len(numbers) <= 2 and all(map(str.isdecimal, numbers)) and 1 <= int(numbers[0]) <= int(numbers[-1]):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer, or two, such as 1:2")


def parse_endpoint(text: str) -> tuple[str, int]:
    """Return host and port; the host may be a name or an address, of IPv6 in brackets."""
    host, _, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if re.fullmatch(r"[\w.:-]+", host) and re.fullmatch(r"\d{1,5}", port, re.ASCII) and 0 < int(port) < 2**16:
        return host, int(port)
    raise argparse.ArgumentTypeError(f"{text!r} must be HOST:PORT, such as host0:29400 (a port is 1 to 65535)")


def find_endpoint(args: argparse.Namespace) -> tuple[str, int]:
    """Return host and port where the nodes meet. Raise Failure with status 2 if it is missing or invalid."""
    if args.rdzv_endpoint:
        host, port = args.rdzv_endpoint
        return host, port
    address, port = os.environ.get("PET_MASTER_ADDR"), os.environ.get("PET_MASTER_PORT", "29500")
    if not address:
        raise Failure("give --rdzv-endpoint HOST:PORT, the same on every node. See: launch --help", status=2)
    try:
        return parse_endpoint(f"{address}:{port}")
    except argparse.ArgumentTypeError as error:
        raise Failure(f"PET_MASTER_ADDR:PET_MASTER_PORT is wrong: {error}", status=2) from None


def check_flags_of_train(words: list[str]) -> None:
    """End with status 2 and one line if train does not take these flags: before torchrun would try them again."""
    sys.argv = ["train", *words]
    settings.parse_args()


def end_when_stopped() -> None:
    """Have a thread end this process after a signal, should torch, in C++ code, not let Python handle it in time."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait_for_signals() -> None:
        while number := os.read(reader, 1)[0]:
            if number in process.STOP_SIGNALS:
                time.sleep(TRAIN_STOP_SECONDS)
                os._exit(128 + number)

    threading.Thread(target=wait_for_signals, daemon=True).start()


# Addresses ------------------------------------------------------------------------------------------------------------


def announce_own_address(args: argparse.Namespace, endpoint: str) -> None:
    """Choose the address that this node tells the others, and with it gloo's network interface, unless they are given.

    torchrun and gloo would look up the host's own name, which on Debian and Ubuntu has the address 127.0.1.1.
    """
    is_local = endpoint == "localhost" or endpoint.startswith("127.") or endpoint == "::1"
    interfaces = find_interfaces()
    others = [] if is_local else [ELSEWHERE, *interfaces]
    for host in filter(None, [args.local_addr, endpoint, *others]):
        address, _ = find_way(host)
        if address and not address.startswith("127."):
            args.local_addr = args.local_addr or address
            if address in interfaces:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interfaces[address])
            return


def find_way(host: str) -> tuple[str, str]:
    """Return this machine's address on the way to a host, and the host's; both empty if there is no way or address."""
    with contextlib.suppress(OSError, UnicodeError):
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            way.connect(target)  # sends nothing
            return str(way.getsockname()[0]), str(target[0])
    return "", ""


def find_interfaces() -> dict[str, str]:
    """Return this machine's network interfaces by their IPv4 addresses."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(asking, SIOCGIFADDR, name.encode().ljust(40, b"\0"))
                found[socket.inet_ntoa(answer[20:24])] = name
    return found


# torchrun -------------------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace, host: str, port: int) -> int:
    """Run train under torchrun; return its exit status. Raise Failure if the other nodes cannot be reached."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or a node that joins later waits for a stale address
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what goes wrong is said in one line, below
    logging.disable()

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import api as rendezvous
    from torch.distributed.launcher.api import elastic_launch

    process.imports_done()
    parser = torchrun.get_args_parser()
    parser.error = refuse_variables  # type: ignore[method-assign]
    words, where = torchrun_words(args, host, port), f"{host}:{port}"
    try:
        config, _, _ = torchrun.config_from_args(parser.parse_args(words))
        if not 0 <= config.rdzv_configs.get("rank", 0) < config.max_nodes:
            refuse_variables(f"PET_NODE_RANK must be less than the number of nodes, {config.max_nodes}")
        statuses = elastic_launch(config, train_on_this_node)()
        return int(*statuses.values())
    except (ValueError, AssertionError) as error:
        refuse_variables(str(error))
    except SignalException as stopped:
        print_error(f"launch: stopped by {stopped.sigval.name}. {RESTART_HINT}")
        return 128 + stopped.sigval
    except ChildFailedError:
        raise Failure(f"gave up after {config.max_restarts} restarts. {RESTART_HINT}") from None
    except rendezvous.RendezvousClosedError:
        raise Failure(f"the training at {where} has ended. {RESTART_HINT}") from None
    except rendezvous.RendezvousTimeoutError:
        raise Failure(f"too few nodes came to {where} in {args.join_timeout} s. {RESTART_HINT}") from None
    except (rendezvous.RendezvousError, RuntimeError):
        hint = f"The node at {where} must run, and be reachable from here. {RESTART_HINT}"
        raise Failure(f"cannot reach the rendezvous at {where}. {hint}") from None


def refuse_variables(message: str) -> NoReturn:
    """End with status 2: torchrun has refused what it is told, which the flags here cannot make it do."""
    raise Failure(f"torchrun refuses a variable PET_*: {message}", status=2)


def torchrun_words(args: argparse.Namespace, host: str, port: int) -> list[str]:
    """Return the command line of torchrun. For what is not on it, torchrun looks at the variables PET_*."""
    words = ["--nproc-per-node", "1"]  # a node's cores are for the workers of one train process
    words += ["--log-dir", os.devnull]  # no folder
    if args.nnodes:
        words += ["--nnodes", args.nnodes]
    if args.local_addr:
        words += ["--local-addr", args.local_addr]
    if args.rdzv_endpoint:
        own, target = find_way(host)
        if own and own == target:
            host = "127.0.0.1"  # torchrun hosts the rendezvous here, but would not take this address for this host's
        # Once the least number of nodes is there, others have 5 seconds to come; so much a lost node delays the rest.
        limits = f"last_call_timeout=5,join_timeout={args.join_timeout},read_timeout={args.timeout}"
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-conf", limits]
        words += ["--rdzv-id", args.rdzv_id, "--max-restarts", str(MAX_RESTARTS)]
    if args.max_restarts is not None:  # the last one counts
        words += ["--max-restarts", str(args.max_restarts)]
    return [*words, "train.py"]


def train_on_this_node() -> int:
    """Run train in a process that torchrun has started, and return its exit status, for torchrun to hand over.

    A failure in the training, such as the loss of another node, ends this process: torchrun then starts it again.
    """
    process.prepare_process()
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
