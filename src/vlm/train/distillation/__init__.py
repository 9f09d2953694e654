"""Distillation: the teacher, what it gives at supervised positions, and how far a student is from it."""
