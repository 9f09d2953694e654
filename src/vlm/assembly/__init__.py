"""Everything between a configuration or a checkpoint and a model with its processor."""
