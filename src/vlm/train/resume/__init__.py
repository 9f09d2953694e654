"""Resumes a run: its record, what changed since it was saved, the lock on its directory, and how it starts."""
