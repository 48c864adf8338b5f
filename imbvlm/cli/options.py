"""Shared parts of the commands: parsers with an example, types of options, and messages on standard error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from imbvlm.base.errors import LINE_BREAKS, printable

Command = Callable[[argparse.Namespace], int]


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, example: str
) -> argparse.ArgumentParser:
    """Add a command whose help has a summary and an example."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def print_to_stderr(text: str) -> None:
    """Print a message of the command on standard error."""
    print(f"imbvlm: {printable(text, keep=LINE_BREAKS)}", file=sys.stderr, flush=True)
