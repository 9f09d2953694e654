"""Queries with what they should find: encoded and in batches, for training embeddings."""
