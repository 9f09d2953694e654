"""Checkpoints of other code bases in, checkpoints for other code bases out."""
