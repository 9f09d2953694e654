"""What a run refuses before any weight loads, and how refusals are worded."""
