"""Checks that reject a run before any weights load, and the wording of their messages."""
