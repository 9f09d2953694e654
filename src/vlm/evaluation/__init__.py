"""Measuring answers, losses and heads."""
