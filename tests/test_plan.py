"""`fedddp plan` says what a run then does, and refuses what a run would refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedddp import SCAFFOLD as Scaffold
from fedddp import Cohort, Data, FedAvg, FedBuff, Federation, Local, Method, Model, Run, Topology, Track
from fedddp.aggregation.mean import Accumulator
from fedddp.cli import main
from fedddp.distributed.world import World
from fedddp.reporting.dry_run import plan
from fedddp.testing import run_world
from fedddp.training.asynchronous.worker import Crew
from fedddp.training.session import Session

# Batch norm has float buffers and integer ones.
RUN = Run(
    data=Data(dataset="shapes", clients=6, image_size=12, examples=120),
    model=Model(name="resnet8-gn", norm="batch"),
    local=Local(steps=1, batch_size=8),
    cohort=Cohort(size=3),
    track=Track(with_=[], progress=False),
    rounds=2,
)


def rows(run: Run, world_size: int) -> dict[str, str]:
    """Return the plan of `run`: the first column to the second."""
    table = plan(run, world_size)
    names, facts = (list(column.cells) for column in table.columns)
    return {str(name): str(fact) for name, fact in zip(names, facts, strict=True)}


def spied(owner: type, name: str, note: Any) -> None:
    """Let `note` see each call of a method of `owner`, which works as before; in a process of its own."""
    method = getattr(owner, name)

    def spy(*args: Any, **options: Any) -> Any:
        note(*args, **options)
        return method(*args, **options)

    setattr(owner, name, spy)


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moved(run: Run) -> dict[str, Any]:
    """Train `run`; return what history says of each round, and what this rank was seen to send."""
    seen: dict[str, Any] = {"dispatches": [], "contributions": [], "sent": 0, "visits": 0}

    def sending(world: World, *tensors: Tensor) -> None:
        if seen.pop("sends", False):
            seen["dispatches"].append(size(*tensors))

    def contributing(_: object, __: int, contribution: Any, buffers: Tensor, ___: float, *more: Any) -> None:
        seen["contributions"].append(size(*contribution.vectors.values(), buffers, more[0]))

    spied(Session, "send", lambda s: seen.update(sends=s.server.version != s._sent))
    spied(World, "broadcast", sending)
    spied(Accumulator, "add", contributing)
    spied(World, "send", lambda _, tensor, *__, **___: seen.update(sent=seen["sent"] + size(tensor)))
    spied(Crew, "train", lambda *_, **__: seen.update(visits=seen["visits"] + 1))
    seen["history"] = Federation(run).run().history
    return seen


@pytest.mark.parametrize("method", [FedAvg(), Scaffold()], ids=lambda method: type(method).__name__)
def test_bytes_are_those_that_rounds_move(method: Method, tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, algorithm=method, output=str(tmp_path))
    ranks = run_world(moved, run, size=2)
    contributions = [size for rank in ranks for size in rank["contributions"]]
    assert len(contributions) == 2 * 3
    for row, dispatch in zip(ranks[0]["history"], ranks[0]["dispatches"][:2], strict=True):
        assert row["bytes/down"] == 3 * dispatch
        assert row["bytes/up"] == 3 * contributions[0] == sum(contributions) // 2
    told = rows(run, 2)["bytes a round"].split()
    units = {"kB": 1e3, "MB": 1e6}
    assert float(told[0]) * units[told[1]] == pytest.approx(row["bytes/down"], rel=5e-3)
    assert float(told[3]) * units[told[4]] == pytest.approx(row["bytes/up"], rel=5e-3)


def test_bytes_are_those_that_asynchronous_training_moves(tmp_path: Path) -> None:
    run = dataclasses.replace(
        RUN, algorithm=FedBuff(), topology=Topology(coordinator="dedicated"), output=str(tmp_path)
    )
    coordinator, *groups = run_world(moved, run, size=3)
    visits = sum(rank["visits"] for rank in groups)
    row = coordinator["history"][-1]
    assert sum(rank["sent"] for rank in groups) == visits * row["bytes/up"] / 3
    assert coordinator["sent"] == visits * row["bytes/down"] / 3


def test_it_names_groups_visits_and_memory() -> None:
    told = rows(dataclasses.replace(RUN, topology=Topology(coordinator="dedicated", ranks_per_client=2)), 5)
    assert told["world"] == "5 ranks: 2 client groups of 2; coordinator: rank 0 only"
    assert told["population"] == "6 clients of 20 to 20 examples (median 20)"
    assert told["first round"] == "visits per group 2, 1, examples per group 40, 20"
    assert "120 training images of 3x12x12" in told["data"]
    assert told["memory a rank"].startswith("62.2 kB of images")  # (120 + 24) × 3 × 12 × 12


@pytest.mark.parametrize("command", ["plan", "run", "partition"])
def test_a_backend_without_its_gpus_is_refused_by_all_commands(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        main([command, "digits", "--topology.backend", "nccl"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "topology.backend=nccl needs a GPU for each" in line
    assert "use backend=gloo" in line


@pytest.mark.parametrize("command", ["plan digits", "partition digits", "recipes", "runs ."])
def test_tables_are_printed_by_one_rank(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for rank in "01":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            patch.setenv("RANK", rank)
            with pytest.raises(SystemExit) as stop:
                main(command.split())
        assert stop.value.code == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].strip()
    assert printed[1] == ""


def test_recipes_fit_an_ordinary_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit):
            main(["recipes"])
    names = [line.split(" ")[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names[:3] == ["compare-paradigms", "digits", "mnist-lenet"]
    assert all(names), "a description runs over its line"
