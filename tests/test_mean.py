"""The mean: exact sums, and what becomes of updates that are not finite."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import references as ref
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from fedddp import (
    CohortConfig,
    Config,
    DataConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    Result,
    TrackingConfig,
)
from fedddp.aggregation import Accumulator, Aggregation, InvalidUpdateError, Krum, Mean
from fedddp.algorithms import ClientContext, ClientUpdate, FedAvg
from fedddp.data.partition import IID
from fedddp.tasks import Classification

GOOD = {"update": torch.tensor([1.0, -2.0]), "buffers": torch.tensor([4.0])}
BAD = [math.nan, math.inf, -math.inf, 3e38]


def accumulator(clients: int = 4, **settings: Any) -> Accumulator:
    lengths = {"update": 2, "buffers": 1}
    return Mean(**settings).accumulator(lengths, clients, torch.zeros(1), torch.zeros(0).long())


def add(sums: Accumulator, vectors: dict[str, Tensor], weight: float = 0.5, loss: float = 1.0) -> bool:
    update = ClientUpdate({"update": vectors["update"]}, weight)
    return sums.add(7, update, vectors["buffers"], weight, torch.zeros(0).long(), loss)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["update", "buffers"])
@pytest.mark.parametrize("kind", ["exact", "float32"])
def test_an_update_that_is_not_finite_ends_the_run_is_left_out_or_is_clipped(
    where: str, value: float, kind: str
) -> None:
    vectors = {name: vector.clone() for name, vector in GOOD.items()}
    vectors[where][-1] = value
    with pytest.raises(InvalidUpdateError, match=r"client 7: its (update has NaN|weighted update reaches)"):
        add(accumulator(sums=kind), vectors)

    skipping = accumulator(sums=kind, on_invalid_update="skip")
    assert add(skipping, GOOD)
    assert not add(skipping, vectors)
    assert skipping.counts.tolist() == [1, 1, 0]
    mean = skipping.result()
    assert torch.equal(mean["update"], GOOD["update"])
    assert torch.equal(mean["buffers"], GOOD["buffers"])

    clipping = accumulator(sums=kind, on_invalid_update="clip")
    assert not add(clipping, vectors)
    assert clipping.counts.tolist() == [1, 1, 0]
    clipped = clipping.result()
    assert all(torch.isfinite(vector).all() for vector in clipped.vectors.values())
    assert clipped["update"][0] == GOOD["update"][0]
    assert math.isfinite(value) or clipped[where][-1] == 0


@pytest.mark.parametrize(("kind", "limit"), [("exact", 2.0**20), ("float32", 2.0**124)])
@pytest.mark.parametrize("where", ["update", "buffers"])
def test_clipping_an_invalid_update_leaves_half_of_what_the_sums_hold_for_a_client(
    where: str, kind: str, limit: float
) -> None:
    """The limit is that of four clients: the sums hold 2^22, or 2^126, in all."""
    vectors = {name: vector.clone() for name, vector in GOOD.items()}
    vectors[where][-1] = -3e38
    clipping = accumulator(clients=4, sums=kind, on_invalid_update="clip")
    assert not add(clipping, vectors, weight=0.25)
    clipped = clipping.result()
    assert 0.25 * float(clipped[where][-1]) == -limit / 2
    assert clipped["update"][0] == 1.0


@pytest.mark.parametrize("value", BAD[:3])
def test_a_loss_that_is_not_finite_makes_the_update_invalid(value: float) -> None:
    with pytest.raises(InvalidUpdateError, match="its training loss became"):
        add(accumulator(), GOOD, loss=value)
    skipping = accumulator(on_invalid_update="skip")
    assert not add(skipping, GOOD, loss=value)
    assert skipping.counts.tolist() == [0, 1, 0]


def test_the_largest_values_of_a_cohort_add_up_without_overflow() -> None:
    sums = accumulator(clients=4)
    large = {"update": torch.full((2,), 0.999 * 2.0**20), "buffers": torch.full((1,), -0.999 * 2.0**20)}
    for _ in range(4):
        assert add(sums, large, weight=1.0)
    assert torch.allclose(sums.result()["update"], large["update"])
    with pytest.raises(InvalidUpdateError, match="reaches"):
        add(sums, {name: vector * 1.01 for name, vector in large.items()}, weight=1.0)


def test_a_long_but_finite_update_is_clipped_before_it_is_checked() -> None:
    sums = accumulator(clip_norm=1.0)
    assert add(sums, {"update": torch.tensor([3e9, 4e9]), "buffers": torch.zeros(1)})
    assert sums.counts.tolist() == [1, 0, 1]
    assert torch.allclose(sums.result()["update"], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("magnitude", [1.0, 1e15, 1e19, 1e30, 8e37])
@pytest.mark.parametrize(
    "rule", [Mean(clip_norm=2.5), Mean(clip_norm=2.5, sums="float32"), Krum(clip_norm=2.5)]
)
def test_an_update_of_any_finite_length_is_clipped_to_the_norm(rule: Aggregation, magnitude: float) -> None:
    """From about 1e19 an element on the sum of the squares is beyond float32."""
    update = ClientUpdate({"update": torch.tensor([3 * magnitude, -4 * magnitude])}, 0.5)
    admitted = rule.admit(7, update, torch.zeros(1), limit=1e6)
    assert admitted.clipped
    assert admitted.vectors is not None
    torch.testing.assert_close(admitted.vectors["update"], torch.tensor([1.5, -2.0]))
    short = rule.admit(7, ClientUpdate({"update": torch.tensor([1.5, 2.0])}, 0.5), torch.zeros(1))
    assert (short.valid, short.clipped) == (True, False)


class Steep(Classification):
    """A loss whose gradients are so large that their norm is beyond float32."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) * 1e25


def test_a_gradient_of_any_finite_length_is_clipped_to_the_norm() -> None:
    config = Config(
        data=DataConfig(clients=1),
        task=Steep(),
        local=LocalConfig(steps=1, batch_size=36, lr=0.5, clip_norm=0.3),
        cohort=CohortConfig(size=1),
        rounds=1,
        tracking=TrackingConfig(trackers=[], progress=False),
    )
    before = parameters_to_vector(ref.net().parameters()).detach()
    result = Federation(config, module=ref.net(), train=ref.Pixels()).run()
    moved = parameters_to_vector(result.model.parameters()).detach() - before
    assert float(moved.norm()) == pytest.approx(0.5 * 0.3, rel=1e-5)


def test_the_error_of_a_value_beyond_the_exact_sums_names_their_range_and_the_fixes() -> None:
    with pytest.raises(InvalidUpdateError) as refused:
        add(accumulator(clients=8), {"update": torch.tensor([1.0, -1.5e6]), "buffers": torch.zeros(1)})
    assert str(refused.value) == (
        "client 7: its weighted update reaches 7.5e+05, beyond the 5.24e+05 that sums hold; lower local.lr, "
        "set local.clip_norm, or choose aggregation.on_invalid_update=skip, or aggregation.sums=float32"
    )
    wide = accumulator(clients=8, sums="float32")
    assert add(wide, {"update": torch.tensor([1.0, -1.5e6]), "buffers": torch.zeros(1)})
    assert wide.result()["update"].tolist() == [1.0, -1.5e6]


def test_exact_sums_round_to_units_of_2_to_the_minus_40() -> None:
    sums = accumulator(clients=1)
    unit = 2.0**-40
    add(sums, {"update": torch.tensor([0.4 * unit, 2.6 * unit]), "buffers": torch.tensor([-0.6 * unit])}, 1.0)
    assert sums.result()["update"].tolist() == [0.0, 3 * unit]
    assert sums.result()["buffers"].tolist() == [-unit]


class SendsNaN(FedAvg):
    """FedAvg whose client 2 sends NaN in every round; every client counts its local trainings."""

    stateful = True

    def finish(self, context: ClientContext) -> ClientUpdate:
        context.store("trainings", context.load("trainings") + 1)
        if context.client == 2:
            context.params[3] = math.nan
        return super().finish(context)


def train(output: Path, rule: Literal["stop", "skip", "clip"]) -> Result:
    config = Config(
        data=DataConfig(clients=4, partition=IID()),
        model=ModelConfig(name="2nn"),
        local=LocalConfig(batch_size=200),
        cohort=CohortConfig(size=3),
        algorithm=SendsNaN(),
        aggregation=Mean(on_invalid_update=rule),
        rounds=4,
        output=str(output),
        tracking=TrackingConfig(trackers=[], progress=False),
    )
    return Federation(config).run()


@pytest.mark.parametrize("rule", ["skip", "clip"])
def test_invalid_updates_are_counted_and_logged_and_their_client_state_is_not_kept(
    tmp_path: Path, rule: Literal["skip", "clip"], caplog: pytest.LogCaptureFixture
) -> None:
    result = train(tmp_path, rule)
    with_invalid = [row["round"] for row in result.history if 2 in row["cohort"]]
    assert with_invalid
    assert len(with_invalid) < 4
    for row in result.history:
        bad = int(row["round"] in with_invalid)
        assert (row["clients/invalid"], row["clients/aggregated"]) == (bad, 3 - bad * (rule == "skip"))
        assert math.isfinite(row["train/loss"])
    assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    action = {"skip": "left out", "clip": "clipped"}[rule]
    assert warnings == [
        f"round {r}: NaN, infinity or overflow in the update of client 2; {action}" for r in with_invalid
    ]
    (checkpoint,) = sorted((result.folder / "checkpoints").iterdir())
    states = load_file(checkpoint / "clients-00000.safetensors")
    assert "2.trainings" not in states
    assert any(name.endswith(".trainings") for name in states)


def test_an_invalid_update_ends_the_run_by_default(tmp_path: Path) -> None:
    with pytest.raises(InvalidUpdateError, match=r"client 2: its update has NaN .*on_invalid_update=skip"):
        train(tmp_path, "stop")


@pytest.mark.parametrize("kind", ["exact", "float32"])
def test_an_accumulator_that_is_reset_is_like_a_new_one(kind: Literal["exact", "float32"]) -> None:
    used, fresh = accumulator(4, sums=kind), accumulator(2, sums=kind)
    large = {name: 1e4 * vector for name, vector in GOOD.items()}  # takes the way of large values, too
    add(used, GOOD)
    add(used, large, weight=0.9)
    used.result()
    add(used, GOOD)
    used.reset(2)
    for sums in (used, fresh):
        add(sums, GOOD, weight=0.25)
        add(sums, large, weight=0.75)
    assert used.limit == fresh.limit
    one, two = used.state(), fresh.state()
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    expected = 0.25 * GOOD["update"] + 0.75 * large["update"]
    torch.testing.assert_close(used.result()["update"], expected)
