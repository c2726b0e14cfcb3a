"""Command lines: what the parsers of all programs have in common."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from stage import VERSION, files
from stage.output import print_error


def new_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser that refuses a wrong command line in one line."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{program} {VERSION}")
    parser.error = partial(refuse_flags, program)  # type: ignore[method-assign]
    return parser


def refuse_flags(program: str, message: str) -> NoReturn:
    """End a program whose command line is wrong: used as ArgumentParser.error."""
    print_error(f"{program}: {message}. See: {program} --help")
    sys.exit(2)


def add_folder_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all stages and serve have."""
    text = "folder of the data (default: %(default)s)"
    parser.add_argument("--data", type=nonempty(Path), default=files.DATA, help=text)
    text = "folder of the volume's files (default: %(default)s)"
    parser.add_argument("--model", type=nonempty(Path), default=files.MODEL, help=text)


def nonempty(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser of texts that are not empty: as a path, `--data "$UNSET"` would be the current folder."""

    def parse(text: str) -> Any:
        if not text:
            raise argparse.ArgumentTypeError("must not be empty")
        return kind(text)

    return parse


def integer(smallest: int, largest: int = 999_999_999) -> Callable[[str], int]:
    """Return a parser of integers in a range."""

    def parse(text: str) -> int:
        # Python refuses to convert thousands of digits, and takes those of other scripts.
        if text.isascii() and text.isdecimal() and len(text) < 20 and smallest <= int(text) <= largest:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text} is not an integer from {smallest} to {largest}")

    return parse
