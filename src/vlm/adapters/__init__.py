"""Checkpoints that are complete together with the base that they name: writing, loading and merging them."""
