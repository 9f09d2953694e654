"""Coordinates: where objects are in the images that a model sees, and how each family of models writes this."""
