"""Coordinates: where objects are in what a model sees, and how each family of models writes that."""
