"""Encodes samples as ids and labels; `labels.encode` makes the labels."""
