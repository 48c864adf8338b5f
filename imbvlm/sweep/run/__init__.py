"""The phases of a sweep."""
