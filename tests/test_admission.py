"""Updates as they enter the aggregation: refused, left out or clipped; and what ranks bring together."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fedddp.aggregation import Accumulator, Aggregation, InvalidUpdateError, Krum, Mean, TrimmedMean
from fedddp.algorithms import ClientUpdate
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.testing import run_world

RULES: list[Aggregation] = [Mean(), Mean(sums="float32"), Krum(), TrimmedMean()]
CLIPPING: dict[str, Aggregation] = {
    "exact": Mean(on_invalid_update="clip"),
    "float32": Mean(on_invalid_update="clip", sums="float32"),
    "robust": Krum(on_invalid_update="clip"),
}
WEIGHTS = (1.0, 0.5, 0.2, 1e-3, 1e-30, 0.0)


def accumulator(rule: Aggregation, clients: int = 4, integers: int = 2) -> Accumulator:
    lengths = {"update": 2, "buffers": 1}
    return rule.accumulator(lengths, clients, torch.zeros(1), torch.zeros(integers, dtype=torch.int64))


def add(
    updates: Accumulator,
    values: tuple[float, float],
    weight: float = 0.25,
    client: int = 7,
    integers: tuple[int, int] = (0, 0),
) -> bool:
    update = ClientUpdate({"update": torch.tensor(values)}, weight)
    return updates.add(client, update, torch.zeros(1), weight, torch.tensor(integers))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_refuses_an_update_that_is_not_finite_whatever_it_weighs(
    rule: Aggregation, weight: float, value: float
) -> None:
    with pytest.raises(InvalidUpdateError) as refused:
        add(accumulator(rule), (1.0, value), weight)
    assert str(refused.value) == (
        "client 7: its update has NaN or infinite values; lower local.lr, set local.clip_norm, or choose "
        "aggregation.on_invalid_update=skip"
    )


def test_the_largest_value_that_sums_hold_is_refused_and_the_one_below_it_is_not() -> None:
    """Four clients share 2^22."""
    below = 2.0**20 - 2.0**-4  # the next float32
    assert add(accumulator(Mean()), (below, -below), weight=1.0)
    for value in (2.0**20, -(2.0**20)):
        with pytest.raises(
            InvalidUpdateError, match=r"reaches 1.05e\+06, beyond the 1.05e\+06 that sums hold"
        ):
            add(accumulator(Mean()), (0.0, value), weight=1.0)


def test_the_error_of_a_value_beyond_float32_sums_does_not_propose_them() -> None:
    with pytest.raises(InvalidUpdateError) as refused:
        add(accumulator(Mean(sums="float32")), (0.0, 3e38))
    assert str(refused.value) == (
        "client 7: its weighted update reaches 7.5e+37, beyond the 2.13e+37 that sums hold; lower local.lr, "
        "set local.clip_norm, or choose aggregation.on_invalid_update=skip"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("kind", "weight"),
    [(kind, weight) for kind in CLIPPING for weight in WEIGHTS],
)
def test_values_that_are_not_finite_become_0_whatever_the_client_weighs(
    kind: str, weight: float, value: float
) -> None:
    rule = CLIPPING[kind]
    update = ClientUpdate({"update": torch.tensor([1.0, value, -2.0])}, weight)
    limit = accumulator(rule).limit
    admitted = rule.admit(7, update, torch.tensor([3.0]), example_weight=weight, limit=limit)
    assert admitted.vectors is not None
    assert not admitted.valid
    assert admitted.vectors["update"].tolist() == [1.0, 0.0, -2.0]
    assert admitted.vectors["buffers"].tolist() == [3.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite_values_within_the_norm_stay_beside_one_that_is_not_finite(value: float) -> None:
    updates = accumulator(Mean(on_invalid_update="clip", clip_norm=2.0))
    assert not add(updates, (1.0, value))
    assert updates.counts.tolist() == [1, 1, 0]
    assert updates.result()["update"].tolist() == [1.0, 0.0]


def test_an_update_without_elements_is_valid() -> None:
    nothing = torch.empty(0)
    admitted = Mean().admit(7, ClientUpdate({"update": nothing}, 0.5), nothing, limit=1.0)
    assert (admitted.valid, admitted.clipped) == (True, False)


def test_a_rank_holds_an_int64_or_a_float32_per_parameter() -> None:
    assert [rule.bytes_per_element for rule in RULES] == [8, 4, 4, 4]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_integer_buffers_are_the_largest_of_the_clients(rule: Aggregation) -> None:
    updates = accumulator(rule)
    for client, integers in enumerate([(-5, 3), (-2, 1), (-9, 2)]):
        assert add(updates, (1.0, 2.0), client=client, integers=integers)
    assert updates.integer_buffers.tolist() == [-2, 3]


def test_a_client_that_is_left_out_leaves_its_integer_buffers_out_too() -> None:
    updates = accumulator(Mean(on_invalid_update="skip"))
    assert add(updates, (1.0, 2.0), integers=(4, 5))
    assert not add(updates, (1.0, math.nan), integers=(6, 7))
    assert updates.integer_buffers.tolist() == [4, 5]
    assert updates.counts.tolist() == [1, 1, 0]


def reduced(kind: Literal["mean", "robust"]) -> tuple[list[int], list[int], list[float]]:
    """Add clients on two ranks; return counts, integer buffers and the coordinator's aggregated update."""
    settings: dict[str, Any] = {"on_invalid_update": "skip", "clip_norm": 5.0}
    rule = Mean(**settings) if kind == "mean" else TrimmedMean(beta=0.0, **settings)
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        updates = accumulator(rule)
        if world.rank == 0:
            add(updates, (3.0, 4.0), client=0, integers=(-7, 2))
            add(updates, (60.0, 80.0), client=1, integers=(-8, 1))  # clipped to (3, 4)
        else:
            add(updates, (0.0, math.inf), client=2, integers=(9, 9))
            add(updates, (-3.0, 1.0), client=3, integers=(-6, 0))
        updates.reduce(world)
        world.sum(*updates.numbers())  # as the round loop does, in one message with others
        mean = updates.result()["update"].tolist() if world.is_coordinator else []
        return updates.counts.tolist(), updates.integer_buffers.tolist(), mean


@pytest.mark.parametrize("kind", ["mean", "robust"])
def test_counts_integer_buffers_and_updates_of_all_ranks_are_brought_together(
    kind: Literal["mean", "robust"],
) -> None:
    coordinator, other = run_world(reduced, kind, size=2)
    assert coordinator[0] == other[0] == [3, 1, 1]
    assert coordinator[1] == other[1] == [-6, 2]
    assert coordinator[2] == pytest.approx([1.0, 3.0])


@pytest.mark.parametrize("rule", [Mean(clip_norm=5.0), Krum(clip_norm=5.0)], ids=repr)
def test_a_round_resumed_from_its_state_equals_one_that_was_not_stopped(rule: Aggregation) -> None:
    first: list[tuple[tuple[float, float], tuple[int, int]]] = [
        ((3.0, 4.0), (4, -2)),
        ((60.0, 80.0), (1, -3)),
    ]
    rest: list[tuple[tuple[float, float], tuple[int, int]]] = [((-3.0, 1.0), (2, -1)), ((0.5, 0.5), (3, -4))]

    def take(updates: Accumulator, clients: list[tuple[tuple[float, float], tuple[int, int]]]) -> None:
        for number, (values, integers) in enumerate(clients, start=int(updates.counts[0])):
            assert add(updates, values, client=number, integers=integers)

    stopped, resumed, uninterrupted = (accumulator(rule) for _ in range(3))
    take(stopped, first)
    saved = {name: tensor.clone() for name, tensor in stopped.state().items()}
    resumed.load(saved)
    take(resumed, rest)
    take(uninterrupted, first + rest)
    assert resumed.counts.tolist() == uninterrupted.counts.tolist() == [4, 0, 1]
    assert resumed.integer_buffers.tolist() == uninterrupted.integer_buffers.tolist() == [4, -1]
    both: list[Tensor] = [updates.result()["update"] for updates in (resumed, uninterrupted)]
    assert torch.equal(*both)


@pytest.mark.parametrize("kind", CLIPPING)
def test_what_is_left_of_an_infinite_update_is_clipped_to_the_norm(kind: str) -> None:
    rule = dataclasses.replace(CLIPPING[kind], clip_norm=5.0)
    update = ClientUpdate({"update": torch.tensor([math.inf, 30.0, -40.0])}, 0.5)
    admitted = rule.admit(1, update, torch.zeros(1), example_weight=0.5, loss=1.0, limit=2.0**20)
    assert (admitted.valid, admitted.clipped) == (False, True)
    assert admitted.vectors is not None
    torch.testing.assert_close(admitted.vectors["update"], torch.tensor([0.0, 3.0, -4.0]))


def test_a_negative_weight_subtracts_even_large_updates() -> None:
    sums = accumulator(Mean(), integers=0)
    for value, weight in ((10000.0, -1.0), (1.0, 2.0)):
        update = ClientUpdate({"update": torch.full((2,), value)}, weight)
        sums.add(1, update, torch.zeros(1), 0.5, torch.zeros(0, dtype=torch.int64))
    assert sums.result()["update"].tolist() == [-9998.0] * 2
