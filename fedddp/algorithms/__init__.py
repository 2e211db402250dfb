"""Federated methods, one file per family; each method is one small class."""

from fedddp.algorithms.fedavg import FedAvg

__all__ = ["FedAvg"]
