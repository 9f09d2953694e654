"""Runs that are broken on purpose, again and again: briefly in `make test`, at length in `make torture`."""
