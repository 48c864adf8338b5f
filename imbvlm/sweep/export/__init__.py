"""Exported models and their cards."""
