"""Filling and reading the cache of image features."""
