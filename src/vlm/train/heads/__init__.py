"""Training of prediction heads."""
