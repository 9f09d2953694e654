"""Makes a model with its processor from a configuration or a checkpoint."""
