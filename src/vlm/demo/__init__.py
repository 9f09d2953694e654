"""The generated scenes, and what trains on them."""
