"""The content of a sweep's folder, and selections from it."""
