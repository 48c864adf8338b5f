"""Decisions by a classifier's probabilities: what to accept, sets of classes, labels that look wrong."""
