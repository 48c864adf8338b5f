"""Numbers that a change of structure must not change: `python -m tests.golden compare BASE`."""
