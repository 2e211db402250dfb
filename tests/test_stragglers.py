"""Rounds that do not wait for everybody: over-sampling, deadlines, drop-outs."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from simulation import BASE, train

from fedddp import Cohort, Krum, SameSpeed, SpeedTable, Virtual
from fedddp.config.schema import ConfigError
from fedddp.testing import run_world


def test_stragglers_in_rounds_are_not_waited_for(tmp_path: Path) -> None:
    clock = Virtual(speed=SpeedTable(factors=[50.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    run = dataclasses.replace(BASE, clock=clock, cohort=Cohort(size=5, extra=1), rounds=2)
    rows = [run_world(train, run, str(tmp_path), size=size)[0] for size in (1, 2)]
    assert torch.equal(rows[0]["params"], rows[1]["params"])
    for row in rows[0]["history"]:
        assert row["cohort"] == [1, 2, 3, 4, 5]
        assert row["time/virtual"] < 1
        assert row["clients/missing"] == 0
        assert row["bytes/down"] * 5 == row["bytes/up"] * 6
    late = dataclasses.replace(run, clock=dataclasses.replace(clock, deadline_s=1.0), cohort=Cohort(size=6))
    row = train(late, str(tmp_path))["history"][-1]
    assert (row["cohort"], row["time/virtual"], row["clients/missing"]) == ([1, 2, 3, 4, 5], 1.0, 1)


def test_a_round_with_too_few_clients_for_the_rule_is_abandoned_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Virtual(speed=SameSpeed(dropout=0.1))
    run = dataclasses.replace(
        BASE, cohort=Cohort(size=5), aggregation=Krum(attackers=1), clock=clock, rounds=8
    )
    history = train(run, str(tmp_path))["history"]
    abandoned = [row["round"] for row in history if row["clients/contributed"] < 5]
    assert 0 < len(abandoned) < 8
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [int(line.split()[2].rstrip(":")) for line in warned] == abandoned
    assert "Krum needs 5 updates, but got 4 (1 clients late or lost, 0 invalid); the model stays" in warned[0]
    for before, row in itertools.pairwise(history):
        assert (row["eval/loss"] == before["eval/loss"]) == (row["round"] in abandoned)


def test_a_rule_that_can_never_have_its_clients_in_time_is_refused(tmp_path: Path) -> None:
    clock = Virtual(speed=SpeedTable(factors=[1, 1, 1, 1, 9, 9], example_s=0), deadline_s=0.5)
    run = dataclasses.replace(BASE, cohort=Cohort(size=5), aggregation=Krum(attackers=1), clock=clock)
    with pytest.raises(ConfigError, match="met by 4 of 6 clients with examples, but 5 must arrive; raise"):
        train(run, str(tmp_path))
