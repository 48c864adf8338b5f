"""What the commands share: parsers with an example, and messages on standard error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from imbvlm.base.errors import LINE_BREAKS, printable

Command = Callable[[argparse.Namespace], int]


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=what,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _say_on_stderr(text: str) -> None:
    print(f"imbvlm: {printable(text, keep=LINE_BREAKS)}", file=sys.stderr, flush=True)
