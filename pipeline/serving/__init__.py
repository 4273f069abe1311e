"""Answers after training: a student from Python, over files and streams, over HTTP, and its folder for other programs."""

from pipeline.serving.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
