"""Commands in this process."""

from __future__ import annotations

import pytest
from typer.main import get_command

from imbvlm.cli.app import APP, main
from imbvlm.cli.options import spell_out


def run_command(*words: object) -> int:
    """Run `imbvlm WORDS`; returns its exit code, raises ImbvlmError and typer's errors of usage."""
    return get_command(APP).main(spell_out([str(word) for word in words]), prog_name="imbvlm", standalone_mode=False)


def exit_code(*words: object) -> object:
    """Run `imbvlm WORDS` to its end, errors on stderr, and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return caught.value.code
