"""Runs that learn preferences: log-probabilities of both sides, those of a reference, losses and metrics."""
