"""Drift of inputs and answers against a reference, thresholds, and whether retraining is due."""
