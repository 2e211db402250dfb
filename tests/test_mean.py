"""What gets into the mean: exact sums, and no value that is not a number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedddp import IID, Cohort, Data, FedAvg, Federation, Local, Mean, Model, Run, Track
from fedddp.aggregation import Accumulator
from fedddp.aggregation.mean import InvalidUpdateError
from fedddp.algorithms.algorithm import Contribution, Visit

GOOD = {"update": torch.tensor([1.0, -2.0]), "buffers": torch.tensor([4.0])}
BAD = [math.nan, math.inf, -math.inf, 3e38]


def accumulator(clients: int = 4, **settings: Any) -> Accumulator:
    lengths = {"update": 2, "buffers": 1}
    return Mean(**settings).accumulator(lengths, clients, torch.zeros(1), torch.zeros(0).long())


def add(total: Accumulator, vectors: dict[str, Tensor], weight: float = 0.5, loss: float = 1.0) -> bool:
    contribution = Contribution({"update": vectors["update"]}, weight)
    return total.add(7, contribution, vectors["buffers"], weight, torch.zeros(0).long(), loss)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["update", "buffers"])
@pytest.mark.parametrize("kind", ["exact", "float32"])
def test_what_is_no_number_stops_is_left_out_or_is_cut(where: str, value: float, kind: str) -> None:
    vectors = {name: vector.clone() for name, vector in GOOD.items()}
    vectors[where][-1] = value
    with pytest.raises(InvalidUpdateError, match=r"client 7: its update (has NaN|reaches)"):
        add(accumulator(sums=kind), vectors)

    skipping = accumulator(sums=kind, on_invalid_update="skip")
    assert add(skipping, GOOD)
    assert not add(skipping, vectors)
    assert skipping.counts.tolist() == [1, 1, 0]
    total = skipping.total()
    assert torch.equal(total["update"], GOOD["update"])
    assert torch.equal(total["buffers"], GOOD["buffers"])

    cutting = accumulator(sums=kind, on_invalid_update="clip")
    assert not add(cutting, vectors)
    assert cutting.counts.tolist() == [1, 1, 0]
    cut = cutting.total()
    assert all(torch.isfinite(vector).all() for vector in cut.vectors.values())
    assert cut["update"][0] == GOOD["update"][0]
    assert math.isfinite(value) or cut[where][-1] == 0


@pytest.mark.parametrize("value", BAD[:3])
def test_a_loss_that_is_no_number_counts_as_an_invalid_update(value: float) -> None:
    with pytest.raises(InvalidUpdateError, match="its training loss became"):
        add(accumulator(), GOOD, loss=value)
    skipping = accumulator(on_invalid_update="skip")
    assert not add(skipping, GOOD, loss=value)
    assert skipping.counts.tolist() == [0, 1, 0]


def test_largest_values_of_a_whole_cohort_add_up_without_a_wrap() -> None:
    total = accumulator(clients=4)
    large = {"update": torch.full((2,), 0.999 * 2.0**20), "buffers": torch.full((1,), -0.999 * 2.0**20)}
    for _ in range(4):
        assert add(total, large, weight=1.0)
    assert torch.allclose(total.total()["update"], large["update"])
    with pytest.raises(InvalidUpdateError, match="reaches"):
        add(total, {name: vector * 1.01 for name, vector in large.items()}, weight=1.0)


def test_an_update_that_is_long_but_finite_is_clipped_before_it_is_checked() -> None:
    total = accumulator(clip_norm=1.0)
    assert add(total, {"update": torch.tensor([3e9, 4e9]), "buffers": torch.zeros(1)})
    assert total.counts.tolist() == [1, 0, 1]
    assert torch.allclose(total.total()["update"], torch.tensor([0.6, 0.8]))


class Breaks(FedAvg):
    """Client 2 sends NaN in every round, and every client counts its visits."""

    stateful = True

    def finish(self, visit: Visit) -> Contribution:
        visit.remember("visits", visit.remembered("visits") + 1)
        if visit.client == 2:
            visit.params[3] = math.nan
        return super().finish(visit)


def run(output: Path, rule: str) -> Any:
    run = Run(
        data=Data(clients=4, partition=IID()),
        model=Model(name="2nn"),
        local=Local(batch_size=200),
        cohort=Cohort(size=3),
        algorithm=Breaks(),
        aggregation=Mean(on_invalid_update=rule),  # type: ignore[arg-type]
        rounds=4,
        output=str(output),
        track=Track(with_=[], progress=False),
    )
    return Federation(run).run()


@pytest.mark.parametrize("rule", ["skip", "clip"])
def test_invalid_updates_are_counted_named_and_leave_no_trace(
    tmp_path: Path, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(tmp_path, rule)
    spoilt = [row["round"] for row in outcome.history if 2 in row["cohort"]]
    assert spoilt
    assert len(spoilt) < 4
    for row in outcome.history:
        bad = int(row["round"] in spoilt)
        assert (row["clients/invalid"], row["clients/contributed"]) == (bad, 3 - bad * (rule == "skip"))
        assert math.isfinite(row["train/loss"])
    assert all(torch.isfinite(tensor).all() for tensor in outcome.model.state_dict().values())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    what = {"skip": "left out", "clip": "cut"}[rule]
    assert lines == [
        f"warning: round {r}: NaN, infinity or overflow in the update of client 2; {what}" for r in spoilt
    ]
    (checkpoint,) = sorted((outcome.folder / "checkpoints").iterdir())
    from safetensors.torch import load_file

    states = load_file(checkpoint / "clients-00000.safetensors")
    assert "2.visits" not in states
    assert states


def test_an_invalid_update_stops_the_run_where_that_is_the_rule(tmp_path: Path) -> None:
    with pytest.raises(InvalidUpdateError, match=r"client 2: its update has NaN .*on_invalid_update=skip"):
        run(tmp_path, "stop")
