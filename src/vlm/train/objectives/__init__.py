"""What runs learn: one file an objective."""
