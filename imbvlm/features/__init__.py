"""Stored encoder outputs, and what a trial reads."""
