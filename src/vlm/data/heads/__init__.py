"""Labels and data sets of prediction heads."""
