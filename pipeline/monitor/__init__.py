"""Drift of inputs and answers against a reference, thresholds, and when retraining is due."""
