"""From a sample to ids and labels."""
