"""The manifest, and images read by it."""
