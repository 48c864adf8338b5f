"""`python -m imbvlm` is the `imbvlm` command."""

from imbvlm.cli import main

main()
