"""Use a trained model: load it from its run directory, evaluate it, predict with it, export it."""

from fedddp.inference.loading import load_model
from fedddp.inference.metrics import evaluate
from fedddp.inference.model import TrainedModel

__all__ = ["TrainedModel", "evaluate", "load_model"]
