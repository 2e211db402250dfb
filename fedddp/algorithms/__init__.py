"""Federated algorithms, one file per family; each algorithm is one small class."""

from fedddp.algorithms.adaptive import FedAdagrad, FedAdam, FedYogi, ServerOptimizer
from fedddp.algorithms.algorithm import (
    AggregatedUpdate,
    Algorithm,
    AsynchronousAlgorithm,
    ClientContext,
    ClientUpdate,
    ServerState,
    SynchronousAlgorithm,
)
from fedddp.algorithms.asynchronous import (
    AsyncSGD,
    Constant,
    FedAsync,
    FedBuff,
    Hinge,
    Inverse,
    Polynomial,
    Staleness,
)
from fedddp.algorithms.control import SCAFFOLD, FedDyn
from fedddp.algorithms.fedavg import FedAvg, FedAvgM
from fedddp.algorithms.fednova import FedNova
from fedddp.algorithms.localsgd import DiLoCo, LocalSGD, SyncSGD
from fedddp.algorithms.moon import MOON
from fedddp.algorithms.personal import Ditto, FedBN, FedPer, LocalLayers, LocalOnly
from fedddp.algorithms.proximal import FedProx
from fedddp.algorithms.qfedavg import QFedAvg

__all__ = [
    "MOON",
    "SCAFFOLD",
    "AggregatedUpdate",
    "Algorithm",
    "AsyncSGD",
    "AsynchronousAlgorithm",
    "ClientContext",
    "ClientUpdate",
    "Constant",
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
    "Hinge",
    "Inverse",
    "LocalLayers",
    "LocalOnly",
    "LocalSGD",
    "Polynomial",
    "QFedAvg",
    "ServerOptimizer",
    "ServerState",
    "Staleness",
    "SyncSGD",
    "SynchronousAlgorithm",
]
