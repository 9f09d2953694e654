"""Runs that learn vectors: their records, and what is measured of their vectors."""
