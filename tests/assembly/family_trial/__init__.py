"""Tests of the trial of a family."""
