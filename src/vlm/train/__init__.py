"""Training: one run from start to end (`run.py`), its objectives, the trainer, the step, what is monitored."""
