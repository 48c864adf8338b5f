"""One trial, from its settings to its last report."""
