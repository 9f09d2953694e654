"""Run directories read back: what was trained, how it went and what came out, for lists, reports and comparisons."""
