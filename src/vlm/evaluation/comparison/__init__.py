"""Two models on the same records: what moved from the one to the other, with intervals, and the records behind it."""
