"""Federated learning and distributed data parallel training of vision models in one PyTorch program."""

from __future__ import annotations

import importlib
from importlib.metadata import version as _version
from typing import Any

__version__ = _version("fedddp")

# Resolved on first use, so that `import fedddp` and `fedddp --help` do not import torch.
_HOMES = {
    "fedddp.federation": ("Federation", "Outcome"),
    "fedddp.config.schema": ("Run",),
    "fedddp.config.loader": ("load",),
    "fedddp.algorithms.algorithm": ("Contribution", "Method", "Server", "Total", "Visit"),
    "fedddp.algorithms.local": ("Local",),
    "fedddp.algorithms": (
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
    ),
    "fedddp.algorithms.asynchronous": ("AsynchronousMethod", "Constant", "Hinge", "Inverse", "Polynomial"),
    "fedddp.simulation.clock": ("LogNormalSpeed", "SameSpeed", "SpeedTable", "Virtual", "Wall"),
    "fedddp.data.datasets": ("Data",),
    "fedddp.data.partition": (
        "IID",
        "Dirichlet",
        "LabelQuantity",
        "LogNormal",
        "Natural",
        "Partition",
        "PowerLaw",
        "Shards",
    ),
    "fedddp.data.transforms": ("FeatureSkew",),
    "fedddp.models.registry": ("Model",),
    "fedddp.tasks.classification": ("Classification",),
    "fedddp.tasks.task": ("Task",),
    "fedddp.simulation.cohort": ("Cohort",),
    "fedddp.aggregation": (
        "Bulyan",
        "CoordinateMedian",
        "GeometricMedian",
        "Krum",
        "Mean",
        "MultiKrum",
        "TrimmedMean",
    ),
    "fedddp.simulation.attacks": (
        "Attack",
        "GaussianNoise",
        "LabelFlip",
        "ModelReplacement",
        "NoAttack",
        "SignFlip",
    ),
    "fedddp.evaluation": ("Evaluation",),
    "fedddp.storage.checkpoint": ("Checkpoint",),
    "fedddp.distributed.topology": ("Topology",),
    "fedddp.tracking.tracker": ("Track",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *_HOME_OF]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fedddp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
