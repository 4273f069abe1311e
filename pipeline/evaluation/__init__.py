"""Predictions, metrics and cost of students and baselines."""
