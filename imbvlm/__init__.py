"""Finds the best long-tailed image classifier that a vision-language model can give on your images."""

__version__ = "0.1.0"
