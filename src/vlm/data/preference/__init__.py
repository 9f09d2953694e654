"""Preferences as training samples: both sides of a record, encoded, and in batches."""
