"""Sweep files of version 0.1 contain `from imbvlm.sweep.command import main`, which works until 1.0."""

# isort: off
from imbvlm.base import interrupts

interrupts.from_first_line()
# isort: on

from imbvlm.cli.sweep_script import run_script

main = run_script
