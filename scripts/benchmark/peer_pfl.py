#!/usr/bin/env python3
"""Train a workload with Apple's pfl-research, as its documentation shows; `speed.py --peers pfl` starts it.

    python scripts/benchmark/peer_pfl.py OUT WORKLOAD ROUNDS [--root DIR]

The interpreter needs `pip install 'pfl[pytorch]'` (Python 3.10 to 3.12). fedddp is not used. Of several
processes, which torchrun starts, `import pfl` makes a process group.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import MODELS, clients
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from workloads import LR, WORKLOADS

NEVER = 10**6
"""Rounds between evaluations."""


class Clock(TrainingProcessCallback):  # type: ignore[misc] # it is installed nowhere but for this
    """Notes when each central iteration ended: in seconds of a steady clock, and of CPU time."""

    def __init__(self) -> None:
        """Start without a round."""
        self.noted: dict[str, list[float]] = {"ended": [], "cpu": []}

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Note the time; training is not to stop."""
        self.noted["ended"].append(time.perf_counter())
        self.noted["cpu"].append(time.process_time())
        return False, Metrics()


def module(name: str) -> nn.Module:
    """Return a workload's model with the two methods that pfl-research calls."""

    def loss(self: nn.Module, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        return cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self: nn.Module, x: Tensor, y: Tensor, eval: bool = False) -> dict[str, Any]:
        return {"loss": Weighted(cross_entropy(self(x), y, reduction="sum").item(), len(y))}

    made: Any = MODELS[name]()
    made.loss, made.metrics = types.MethodType(loss, made), types.MethodType(metrics, made)
    return made  # type: ignore[no-any-return]


def train(name: str, root: str, rounds: int) -> dict[str, list[float]]:
    """Train a workload; return what `Clock` noted."""
    w, clock, net = WORKLOADS[name], Clock(), module(name)
    x, y = clients(name, root)
    data = FederatedDataset(
        make_dataset_fn=lambda client: Dataset(raw_data=(x[client], y[client]), user_id=str(client)),
        user_sampler=get_user_sampler("minimize_reuse", list(range(w.clients))),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=NEVER,
            train_cohort_size=w.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model=PyTorchModel(
            model=net,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=LR, local_num_epochs=1, local_batch_size=w.batch
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=w.examples),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    return clock.noted


def main() -> None:
    """Train, and write when each round ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for rank-0.json")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("rounds", type=int)
    parser.add_argument("--root", default="", help="folder with torchvision's MNIST")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    noted = train(given.workload, given.root, given.rounds)
    if os.environ.get("RANK", "0") == "0":
        (given.out / "rank-0.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    main()
