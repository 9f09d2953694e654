"""Reports of a run during training: speed, operations, profiles, plots, callbacks."""
