"""Rounds that do not wait for all clients: over-sampling, deadlines, drop-outs."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path

import pytest
import torch
from simulation import BASE, train

from fedddp import CohortConfig, ConfigError
from fedddp.aggregation import Krum
from fedddp.simulation.clock import SameSpeed, SpeedTable, Virtual
from fedddp.testing import run_world


def test_a_round_ends_without_stragglers(tmp_path: Path) -> None:
    clock = Virtual(speed=SpeedTable(factors=[50.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    config = dataclasses.replace(BASE, clock=clock, cohort=CohortConfig(size=5, extra=1), rounds=2)
    rows = [run_world(train, config, str(tmp_path), size=size)[0] for size in (1, 2)]
    assert torch.equal(rows[0]["params"], rows[1]["params"])
    for row in rows[0]["history"]:
        assert row["cohort"] == [1, 2, 3, 4, 5]
        assert row["time/virtual"] < 1
        assert row["clients/missing"] == 0
        assert row["bytes/down"] * 5 == row["bytes/up"] * 6
    late = dataclasses.replace(
        config, clock=dataclasses.replace(clock, deadline_s=1.0), cohort=CohortConfig(size=6)
    )
    row = train(late, str(tmp_path))["history"][-1]
    assert (row["cohort"], row["time/virtual"], row["clients/missing"]) == ([1, 2, 3, 4, 5], 1.0, 1)


def test_a_round_with_too_few_clients_for_the_rule_is_abandoned_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Virtual(speed=SameSpeed(dropout=0.1))
    config = dataclasses.replace(
        BASE, cohort=CohortConfig(size=5), aggregation=Krum(attackers=1), clock=clock, rounds=8
    )
    history = train(config, str(tmp_path))["history"]
    abandoned = [row["round"] for row in history if row["clients/aggregated"] < 5]
    assert 0 < len(abandoned) < 8
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [int(line.split()[1].rstrip(":")) for line in warnings] == abandoned
    reason = "Krum needs 5 updates, but got 4 (1 clients late or lost, 0 invalid); the model is unchanged"
    assert reason in warnings[0]
    for before, row in itertools.pairwise(history):
        assert (row["eval/loss"] == before["eval/loss"]) == (row["round"] in abandoned)


def test_a_deadline_that_too_few_clients_for_the_rule_can_meet_is_refused(tmp_path: Path) -> None:
    clock = Virtual(speed=SpeedTable(factors=[1, 1, 1, 1, 9, 9], example_s=0), deadline_s=0.5)
    config = dataclasses.replace(
        BASE, cohort=CohortConfig(size=5), aggregation=Krum(attackers=1), clock=clock
    )
    with pytest.raises(ConfigError, match="met by 4 of 6 clients with examples, but 5 must arrive; raise"):
        train(config, str(tmp_path))
