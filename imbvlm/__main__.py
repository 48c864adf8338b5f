"""`python -m imbvlm` is the `imbvlm` command."""

from imbvlm.cli.app import main

main()
