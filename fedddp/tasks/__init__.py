"""Tasks: the loss and the metrics of what a model is trained for."""

from fedddp.tasks.classification import Classification
from fedddp.tasks.detection import Detection
from fedddp.tasks.multilabel import MultiLabel
from fedddp.tasks.segmentation import Segmentation
from fedddp.tasks.task import Task

__all__ = ["Classification", "Detection", "MultiLabel", "Segmentation", "Task"]
