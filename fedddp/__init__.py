"""Federated learning and distributed data parallel training of vision models in one PyTorch program."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedddp import aggregation as aggregation
    from fedddp import algorithms as algorithms
    from fedddp import privacy as privacy
    from fedddp import secure as secure
    from fedddp import tasks as tasks
    from fedddp.algorithms.local import LocalConfig as LocalConfig
    from fedddp.callbacks import Callback as Callback
    from fedddp.config.loader import load_config as load_config
    from fedddp.config.schema import Config as Config
    from fedddp.data import partition as partitions  # noqa: F401
    from fedddp.data.datasets import DataConfig as DataConfig
    from fedddp.data.transforms import FeatureShift as FeatureShift
    from fedddp.distributed.topology import TopologyConfig as TopologyConfig
    from fedddp.evaluation import EvaluationConfig as EvaluationConfig
    from fedddp.federation import Federation as Federation
    from fedddp.federation import Result as Result
    from fedddp.federation import summarize as summarize
    from fedddp.inference import evaluate as evaluate
    from fedddp.inference import load_model as load_model
    from fedddp.models.registry import ModelConfig as ModelConfig
    from fedddp.section import ConfigError as ConfigError
    from fedddp.simulation import attacks as attacks
    from fedddp.simulation import clock as clocks  # noqa: F401
    from fedddp.simulation.cohort import CohortConfig as CohortConfig
    from fedddp.storage.checkpoint import CheckpointConfig as CheckpointConfig
    from fedddp.tracking.tracker import TrackingConfig as TrackingConfig
    from fedddp.transport import codecs as codecs
    from fedddp.transport.config import TransportConfig as TransportConfig

__version__ = _version("fedddp")

# torch reads it once, so before torch is imported: it then asks the system for huge pages where it allocates
# 2 MiB or more, and a large model's vectors cost a third of the time to get.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Resolved on first use, so that `import fedddp` and `fedddp --help` do not import torch.
_MODULES = {
    "algorithms": "fedddp.algorithms",
    "aggregation": "fedddp.aggregation",
    "attacks": "fedddp.simulation.attacks",
    "clocks": "fedddp.simulation.clock",
    "codecs": "fedddp.transport.codecs",
    "partitions": "fedddp.data.partition",
    "privacy": "fedddp.privacy",
    "secure": "fedddp.secure",
    "tasks": "fedddp.tasks",
}
_NAMES = {
    "Federation": "fedddp.federation",
    "Result": "fedddp.federation",
    "summarize": "fedddp.federation",
    "Callback": "fedddp.callbacks",
    "Config": "fedddp.config.schema",
    "ConfigError": "fedddp.section",
    "load_config": "fedddp.config.loader",
    "load_model": "fedddp.inference",
    "evaluate": "fedddp.inference",
    "DataConfig": "fedddp.data.datasets",
    "FeatureShift": "fedddp.data.transforms",
    "ModelConfig": "fedddp.models.registry",
    "LocalConfig": "fedddp.algorithms.local",
    "CohortConfig": "fedddp.simulation.cohort",
    "TopologyConfig": "fedddp.distributed.topology",
    "EvaluationConfig": "fedddp.evaluation",
    "CheckpointConfig": "fedddp.storage.checkpoint",
    "TrackingConfig": "fedddp.tracking.tracker",
    "TransportConfig": "fedddp.transport.config",
}
__all__ = ["__version__", *_NAMES, *_MODULES]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'fedddp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
