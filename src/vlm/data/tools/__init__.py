"""`vlm data …`: what is done to data before a run, and what shows what a run will see."""
