"""Commands in this process, whose errors are raised and not printed."""

from __future__ import annotations

from typer.main import get_command

from imbvlm.cli.app import APP
from imbvlm.cli.options import spell_out


def run_command(*words: object) -> int:
    """Run `imbvlm WORDS`; returns its exit code, raises ImbvlmError and typer's errors of usage."""
    return get_command(APP).main(spell_out([str(word) for word in words]), prog_name="imbvlm", standalone_mode=False)
