"""The `imbvlm` command."""
