"""Joining Ray, and Ray Data."""
