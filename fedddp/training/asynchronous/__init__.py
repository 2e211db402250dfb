"""Asynchronous training: a coordinator, workers, and the scheduler between them."""
