"""Errors, files, YAML, sections, formatting and the console."""
