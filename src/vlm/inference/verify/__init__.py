"""What is served is what was trained: the same questions through training's own path and through another engine."""
