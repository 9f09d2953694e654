"""Going on with a run: what it is, what changed since it was saved, who trains in its directory, and how it starts."""
