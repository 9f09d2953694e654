"""Writes, finds and reads the checkpoints of a run."""
