"""The checkpoints of a run: how they are written, found and read."""
