"""Tasks: the loss and the metrics of what a model is trained for."""
