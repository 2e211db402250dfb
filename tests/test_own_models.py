"""Runs without a global model: what is evaluated, what is logged, and what travels."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedddp import (
    CheckpointConfig,
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    TrackingConfig,
    load_model,
)
from fedddp.algorithms import Ditto, FedAvg, FedBN, FedPer
from fedddp.config.baselines import compared_on_clients, in_effect
from fedddp.federation import Result
from fedddp.inference.own_models import number_of
from fedddp.models.flat import FlatModel
from fedddp.models.norms import convert_norm
from fedddp.models.zoo import SMALL_MODELS
from fedddp.privacy import CentralDP
from fedddp.secure import SecAgg
from fedddp.storage.history import read_rows
from fedddp.transport.shared import Shared

BASE = Config(
    data=DataConfig(clients=4, examples=160, holdout=0.25),
    model=ModelConfig(name="2nn"),
    local=LocalConfig(steps=1, batch_size=16, lr=0.1),
    cohort=CohortConfig(size=2),
    algorithm=FedPer(),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=1,
)


def run(folder: Path, **changes: Any) -> Result:
    return Federation(dataclasses.replace(BASE, output=str(folder), **changes)).run()


# ---- what is evaluated ----


def test_clients_are_evaluated_by_themselves_and_nothing_else_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedddp"):
        result = run(tmp_path)
    (row,) = result.history
    assert not any(key.startswith("eval/") for key in row)
    rows = read_rows(result.folder / "clients.jsonl")
    # Two of four have trained: rounds are judged by the same clients.
    assert [one["client"] for one in rows] == [0, 1, 2, 3]
    assert len(row["cohort"]) == 2
    assert row["clients/accuracy_mean"] == pytest.approx(sum(one["accuracy"] for one in rows) / 4)
    # The head of the 2nn has 200 * 10 + 10 of its 64 * 200 + 200 + 200 * 200 + 200 + 2010 parameters.
    assert "2,010 of 55,210 parameters stay at each client" in caplog.text
    assert "no global model, so no eval/*; 4 of 4 clients are evaluated" in caplog.text
    other = next(client for client in range(4) if client not in row["cohort"])
    with pytest.raises(ConfigError, match=f"client {other} was never trained, and has no model"):
        load_model(result.folder, client=other)


def test_of_many_clients_fifty_are_evaluated_unless_their_number_is_set() -> None:
    def evaluated(**changes: Any) -> int:
        return in_effect(dataclasses.replace(BASE, **changes)).evaluation.clients

    many = dataclasses.replace(BASE.data, clients=1000)
    assert (evaluated(), evaluated(data=many), evaluated(data=many, baseline="local")) == (4, 50, 50)
    assert evaluated(data=many, evaluation=EvaluationConfig(clients=70)) == 70
    assert evaluated(algorithm=FedAvg()) == evaluated(algorithm=Ditto()) == 0
    private = CentralDP(noise_multiplier=1.0, delta=1e-3, clip=1.0)
    assert evaluated(privacy=private) == 0, "no numbers of single clients unless asked for"
    masked: dict[str, Any] = {"secure_aggregation": SecAgg(), "cohort": CohortConfig(size=4)}
    assert evaluated(**masked) == 0, "no metrics of single clients"
    assert evaluated(data=dataclasses.replace(BASE.data, holdout=0.0)) == 0, "they have no data for it"
    avg = dataclasses.replace(BASE, algorithm=FedAvg())
    assert [c.evaluation.clients for c in compared_on_clients({"a": avg, "b": BASE}).values()] == [4, 4]
    assert compared_on_clients({"a": avg})["a"].evaluation.clients == 0


def test_without_data_of_the_clients_nothing_is_evaluated_and_a_warning_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = dataclasses.replace(BASE.data, holdout=0.0)
    (row,) = run(tmp_path, data=data).history
    assert not any(key.startswith(("eval/", "clients/accuracy")) for key in row)
    assert "no global model, and nothing is evaluated: " in caplog.text
    assert "set data.holdout" in caplog.text
    with pytest.raises(ConfigError, match="do not have clients/accuracy_mean; .*data.holdout"):
        run(tmp_path, data=data, checkpoint=CheckpointConfig(best="clients/accuracy_mean"))


def test_names_that_are_numbers_are_names() -> None:
    """Owners 1, 2 and 10 are the clients 0, 1 and 2."""
    names = ["1", "2", "10"]
    assert [number_of(name, names, 3) for name in ("1", 2, "10")] == [0, 1, 2]
    with pytest.raises(ConfigError, match="client=0 is none of the run's; choose one: 1, 2, 10$"):
        number_of("0", names, 3)
    assert [number_of(client, ["east", "west"], 2) for client in ("west", "0", 1)] == [1, 0, 1]


@pytest.mark.parametrize("changes", [{}, {"algorithm": Ditto()}, {"baseline": "local"}], ids=str)
def test_the_best_model_is_kept_with_what_clients_had_then(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A tiny lr leaves the accuracy as it is: round 1 stays the best, and the weights change."""
    checkpoint = CheckpointConfig(best="clients/accuracy_mean")
    local = dataclasses.replace(BASE.local, lr=1e-4)
    cohort, evaluation = CohortConfig(size=4), EvaluationConfig(clients=4)
    more: dict[str, Any] = {"checkpoint": checkpoint, "local": local, "cohort": cohort, **changes}
    folder = run(tmp_path, evaluation=evaluation, **more, rounds=2, name="two").folder
    short = run(tmp_path, evaluation=evaluation, **more, name="one").folder
    assert load_file(folder / "best.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    name = "2.layers" if not changes else "2.params"
    for best, of in ((True, short), (False, folder)):
        (file,) = (of / "checkpoints").glob("*/clients-*")
        expected = load_file(file)[name]
        model = load_model(folder, best=best, client=2)
        params = torch.cat([p.detach().flatten() for p in model.module.parameters()])
        assert torch.equal(params[-len(expected) :], expected)
        server = load_file(folder / ("best.safetensors" if best else "model.safetensors"))
        name_of_first, first = next(iter(model.module.named_parameters()))
        assert torch.equal(first, server[name_of_first]) is (not changes)


# ---- what travels ----


@pytest.mark.parametrize("algorithm", [FedPer(), FedBN()])
def test_only_shared_parameters_travel(tmp_path: Path, algorithm: Any) -> None:
    model = ModelConfig(name="resnet8-gn", norm="batch")
    (row,) = run(tmp_path, algorithm=algorithm, model=model).history
    module = model.build(classes=10, shape=(1, 8, 8), seed=0)
    own = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    kept = sum(p.numel() for layer in own for p in layer.parameters())
    if isinstance(algorithm, FedPer):
        kept = sum(p.numel() for p in list(module.modules())[-1].parameters())
    shared = 4 * (sum(p.numel() for p in module.parameters()) - kept)
    shared += buffers if isinstance(algorithm, FedPer) else 0
    assert kept > 0
    assert (row["bytes/up"], row["bytes/down"]) == (2 * shared, 2 * shared)


@pytest.mark.parametrize("silent", [[0, 1], [6], [0, 3, 4, 6], [2, 3], []])
def test_pieces_are_the_elements_that_are_not_silent(silent: list[int]) -> None:
    class Quiet(FedPer):
        def silent(self, flat: FlatModel) -> torch.Tensor:
            mask = torch.zeros(7, dtype=torch.bool)
            mask[silent] = True
            return mask

    shared = Shared.of(Quiet(), FlatModel(nn.Linear(7, 1, bias=False)))
    vector, others = torch.arange(7.0), [k for k in range(7) if k not in silent]
    assert shared.pack(vector).tolist() == others
    assert shared.length(7) == len(others)
    expected = [float(k in others) * (k + 10) for k in range(7)]
    assert shared.put(shared.pack(vector) + 10, torch.zeros(7)).tolist() == expected


# ---- FedBN without batch norm ----


def test_fedbn_names_what_stays_and_doubts_a_model_without_batch_norm() -> None:
    module = SMALL_MODELS["unet"](2, (1, 16, 16))
    assert "the model has GroupNorm alone" in FedBN().doubt(module)
    assert "model.norm=batch" in FedBN().doubt(module)
    assert "statistics" not in FedBN().staying(FlatModel(module))
    convert_norm(module, "batch")
    assert FedBN().doubt(module) == ""
    assert FedBN().staying(FlatModel(module)).endswith("and all running statistics")
