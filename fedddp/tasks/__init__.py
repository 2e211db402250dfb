"""Tasks: the loss and the metrics of what a model is trained for."""

from fedddp.tasks.classification import Classification
from fedddp.tasks.task import Task

__all__ = ["Classification", "Task"]
