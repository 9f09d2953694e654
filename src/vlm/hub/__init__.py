"""Publishing checkpoints, and their import from other code bases and export to them."""
