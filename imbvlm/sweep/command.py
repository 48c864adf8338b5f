"""`from imbvlm.sweep.command import main`, which users' sweep files contain; kept until 1.0."""

# isort: off
from imbvlm.base import interrupts

interrupts.from_first_line()
# isort: on

from imbvlm.cli.sweep_script import main as main
