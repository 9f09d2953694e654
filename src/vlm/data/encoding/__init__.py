"""From a sample to ids and labels; `labels.encode` makes the labels."""
