"""Reads run directories for lists, reports and comparisons: what was trained, its course, and its results."""
