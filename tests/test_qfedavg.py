"""q-FedAvg's server step on paper: three parabolas, one parameter, one gradient step per client.

F_k = (w − m_k)²/2 at w = 0 with m = (2, −1, 4): the losses are F = (2, 1/2, 8), the gradients
g = (−2, 1, −4). With η = 1/2, so L = 2, and one step L(x − y_k) = g_k. Hence at q = 1 the terms of the two
sums are D = F g = (−4, 1/2, −32) and h = g² + L F = (8, 2, 32).
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedddp import CohortConfig, Config, DataConfig, Federation, LocalConfig, TrackingConfig
from fedddp.aggregation import Mean
from fedddp.algorithms import QFedAvg
from fedddp.data.partition import Partition, Split
from fedddp.tasks import Classification

MINIMA = (2.0, -1.0, 4.0)


class Point(nn.Module):
    """The one parameter w, as an output (b, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.w.expand(len(images), len(MINIMA))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabolas(Classification):
    """(w − m_k)²/2 for the target k, and a constant on top of client 2's."""

    extra: str = "0"
    """A number; settings that are numbers must be finite."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = 0.5 * (outputs[:, 0] - torch.tensor(MINIMA)[targets]).square()
        return torch.where(targets == 2, losses + float(self.extra), losses).sum()


class Examples(Dataset[tuple[Tensor, int]]):
    """An example of each of the first `count` targets."""

    def __init__(self, count: int) -> None:
        self.targets, self.classes = list(range(count)), ["a", "b", "c"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), 10 * index, dtype=torch.uint8), index


class FirstClients(Partition):
    """Client k holds example k; clients beyond the examples are empty."""

    def min_examples_for(self, clients: int) -> int:
        return 0

    def assign(self, labels: Any, clients: int, rng: Any, ids: Any) -> Split:
        return Split.from_owners(np.arange(len(labels)), clients)


def step(q: float, *, examples: int, empty: int = 0, extra: str = "0") -> tuple[float, dict[str, Any]]:
    """Return w after one round of all clients, and the round's metrics."""
    clients = examples + empty
    config = Config(
        data=DataConfig(clients=clients, partition=FirstClients()),
        task=Parabolas(extra=extra),
        local=LocalConfig(steps=1, batch_size=1, lr=0.5),
        cohort=CohortConfig(size=clients),
        algorithm=QFedAvg(q=q),
        aggregation=Mean(on_invalid_update="skip"),
        rounds=1,
        tracking=TrackingConfig(trackers=[], progress=False),
    )
    result = Federation(config, module=Point(), train=Examples(examples)).run()
    return float(next(result.model.parameters()).detach()), result.history[0]


def test_one_round_of_three_clients_is_the_papers_quotient() -> None:
    w, _ = step(1.0, examples=3)
    assert w == pytest.approx(-(-4 + 1 / 2 - 32) / (8 + 2 + 32), rel=1e-6)


def test_at_q_2_the_weights_are_the_squares_of_the_losses() -> None:
    """D = F² g = (−8, 1/4), h = 2 F g² + 2 F² = (24, 3/2)."""
    w, _ = step(2.0, examples=2)
    assert w == pytest.approx((8 - 1 / 4) / (24 + 3 / 2), rel=1e-6)


@pytest.mark.parametrize("extra", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("q", "expected"),
    [
        (1.0, (4 - 1 / 2) / (8 + 2)),  # of clients 0 and 1 alone
        (2.0, (8 - 1 / 4) / (24 + 3 / 2)),
        (0.0, (1 - 1 / 2) / 2),  # the uniform mean of the updates 1 and −1/2
    ],
)
def test_a_loss_that_is_not_finite_leaves_its_own_client_out_and_the_others_as_they_are(
    q: float, expected: float, extra: str, caplog: pytest.LogCaptureFixture
) -> None:
    w, row = step(q, examples=3, extra=extra)
    assert w == pytest.approx(expected, rel=1e-6)
    assert (row["clients/aggregated"], row["clients/invalid"]) == (2, 1)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["round 1: NaN, infinity or overflow in the update of client 2; left out"]


@pytest.mark.parametrize("empty", [0, 1, 3])
def test_clients_without_examples_do_not_shorten_the_step_at_a_small_q(empty: int) -> None:
    """One client's quotient is g / (q g²/F + L), here −2 / (2 q + 2), whatever the scale of F^q."""
    w, _ = step(0.01, examples=1, empty=empty)
    assert w == pytest.approx(2 / 2.02, rel=1e-6)


@pytest.mark.parametrize("empty", [0, 1, 3])
def test_clients_without_examples_count_in_the_uniform_average_of_q_0(empty: int) -> None:
    w, _ = step(0.0, examples=1, empty=empty)
    assert w == pytest.approx(1 / (1 + empty), rel=1e-6)


def test_two_clients_and_two_empty_ones_at_a_small_q_step_as_two_clients() -> None:
    """With F = (2, 1/2), at q = 1/10: F^q g and q F^(q−1) g² + 2 F^q of each, summed by hand."""
    two = 2**0.1
    half = 1 / two
    above, below = two * -2 + half * 1, (0.1 * 4 / 2 + 2) * two + (0.1 * 1 / 0.5 + 2) * half
    for empty in (0, 2):
        w, _ = step(0.1, examples=2, empty=empty)
        assert w == pytest.approx(-above / below, rel=1e-6)
