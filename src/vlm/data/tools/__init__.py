"""`vlm data …`: commands that prepare data before a run, and commands that show what a run will see."""
