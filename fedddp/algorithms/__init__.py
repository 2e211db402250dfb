"""Federated methods, one file per family; each method is one small class."""

from fedddp.algorithms.adaptive import FedAdagrad, FedAdam, FedYogi, ServerOptimizer
from fedddp.algorithms.asynchronous import AsyncSGD, FedAsync, FedBuff
from fedddp.algorithms.control import SCAFFOLD, FedDyn
from fedddp.algorithms.fedavg import FedAvg, FedAvgM
from fedddp.algorithms.fednova import FedNova
from fedddp.algorithms.localsgd import DiLoCo, LocalSGD, SyncSGD
from fedddp.algorithms.moon import MOON
from fedddp.algorithms.personal import Ditto, FedBN, FedPer
from fedddp.algorithms.proximal import FedProx
from fedddp.algorithms.qfedavg import QFedAvg

__all__ = [
    "MOON",
    "SCAFFOLD",
    "AsyncSGD",
    "DiLoCo",
    "Ditto",
    "FedAdagrad",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedBuff",
    "FedDyn",
    "FedNova",
    "FedPer",
    "FedProx",
    "FedYogi",
    "LocalSGD",
    "QFedAvg",
    "ServerOptimizer",
    "SyncSGD",
]
