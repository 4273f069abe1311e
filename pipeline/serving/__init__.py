"""A student in use: from Python, over files and streams, over HTTP, and as a folder for other programs."""

from pipeline.serving.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
