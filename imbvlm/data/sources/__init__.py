"""Readers that make manifests."""
