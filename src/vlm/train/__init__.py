"""Training: one run told as a story (`run.py`), parts as parameter groups, the Trainer subclass, its callbacks."""
