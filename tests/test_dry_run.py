"""`fedddp plan` shows what a run then does, and refuses what a run would refuse."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedddp import (
    CohortConfig,
    Config,
    DataConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    TopologyConfig,
    TrackingConfig,
    load_config,
)
from fedddp.algorithms import SCAFFOLD, ClientContext, ClientUpdate, FedAvg, FedBuff
from fedddp.algorithms.algorithm import Algorithm
from fedddp.cli import main
from fedddp.distributed.world import World
from fedddp.reporting.dry_run import dry_run
from fedddp.testing import run_world

# Batch norm has float buffers and integer ones.
CONFIG = Config(
    data=DataConfig(dataset="shapes", clients=6, image_size=12, examples=120),
    model=ModelConfig(name="resnet8-gn", norm="batch"),
    local=LocalConfig(steps=1, batch_size=8),
    cohort=CohortConfig(size=3),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=2,
)


def test_a_plan_is_for_any_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "digits", "--ranks", "8", "--topology.ranks_per_client", "2"])
    assert ended.value.code == 0
    assert "8 ranks: 4 client groups of 2" in capsys.readouterr().out
    for ranks, words in (("0", "--ranks must be >= 1, got 0"), ("a", "--ranks: invalid int value: 'a'")):
        with pytest.raises(SystemExit) as refused:
            main(["plan", "digits", "--ranks", ranks])
        assert refused.value.code == 2
        assert words in capsys.readouterr().err


def test_print_config_prints_every_setting_and_trains_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", "digits", "--print_config", "--local.lr", "0.3"])
    assert ended.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert load_config("printed.yaml") == load_config("digits", ["--local.lr", "0.3"])
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


def rows(config: Config, world_size: int) -> dict[str, str]:
    """Return the dry run of `config`: the first column of its table to the second."""
    names, values = (list(column.cells) for column in dry_run(config, world_size).columns)
    return {str(name): str(value) for name, value in zip(names, values, strict=True)}


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


RECEIVED: list[int] = []
"""Bytes that each local training of this process started from."""
UPDATES: list[int] = []
"""Bytes of the result of each local training of this process."""


class Measured(Algorithm):
    """An algorithm that measures, with its hooks, what its clients receive and return."""

    def begin(self, context: ClientContext) -> None:
        along = [context.server_vectors[name] for name in self.sends]
        buffers = (context.start_buffers, context.start_integer_buffers)
        RECEIVED.append(nbytes(context.start, *buffers, *along))
        super().begin(context)

    def finish(self, context: ClientContext) -> ClientUpdate:
        update = super().finish(context)
        flat = context.flat
        UPDATES.append(nbytes(*update.vectors.values(), flat.buffers, flat.integer_buffers))
        return update


class MeasuredFedAvg(Measured, FedAvg):
    """FedAvg, measured."""


class MeasuredSCAFFOLD(Measured, SCAFFOLD):
    """SCAFFOLD, measured; a control variate travels both ways."""


class MeasuredFedBuff(Measured, FedBuff):
    """FedBuff, measured."""


def moved(config: Config) -> dict[str, Any]:
    """Train `config` on this rank; return its history and the bytes of what this rank sent and measured."""
    sent: dict[str, list[int]] = {"broadcast": [], "send": []}

    def record(name: str) -> None:
        method = getattr(World, name)

        def recording(world: World, *values: Any, **options: Any) -> None:
            sent[name].append(nbytes(*(value for value in values if isinstance(value, Tensor))))
            method(world, *values, **options)

        setattr(World, name, recording)  # in a process of its own

    for name in sent:
        record(name)
    history = Federation(config).run().history
    return {"history": history, "received": RECEIVED, "updates": UPDATES, **sent}


def sizes_of_the_model() -> tuple[int, int, int]:
    """Return the bytes of the model's parameters, float buffers and integer buffers."""
    module = CONFIG.model.build(classes=10, shape=(3, 12, 12), seed=0)
    buffers = list(module.buffers())
    floats = [buffer for buffer in buffers if buffer.is_floating_point()]
    integers = [buffer for buffer in buffers if not buffer.is_floating_point()]
    assert floats
    assert integers
    return nbytes(*module.parameters()), nbytes(*floats), nbytes(*integers)


def read_size(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"kB": 1e3, "MB": 1e6}[unit]


@pytest.mark.parametrize(
    ("algorithm", "vectors"),
    [(MeasuredFedAvg(), 1), (MeasuredSCAFFOLD(), 2)],
    ids=["FedAvg", "SCAFFOLD"],
)
def test_the_bytes_of_the_dry_run_and_of_the_history_are_those_that_rounds_move(
    algorithm: Algorithm, vectors: int, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, algorithm=algorithm, output=str(tmp_path))
    ranks = run_world(moved, config, size=2)
    params, floats, integers = sizes_of_the_model()
    per_client = vectors * params + floats + integers
    for measured in ("received", "updates"):
        assert [size for rank in ranks for size in rank[measured]] == [per_client] * 2 * 3
    # The initial weights, then the model of each round, and the final one.
    assert ranks[0]["broadcast"] == [params + floats + integers, *[per_client] * 3]
    for row in ranks[0]["history"]:
        assert row["bytes/down"] == row["bytes/up"] == 3 * per_client
    down, up = rows(config, 2)["bytes per round"].split(", ")
    assert (down.split()[2], up.split()[2]) == ("down", "up")
    for text in (down, up):
        assert read_size(text.rsplit(maxsplit=1)[0]) == pytest.approx(3 * per_client, rel=5e-3)


def test_the_bytes_of_the_history_are_those_that_asynchronous_training_moves(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG,
        algorithm=MeasuredFedBuff(),
        topology=TopologyConfig(coordinator="dedicated"),
        output=str(tmp_path),
    )
    coordinator, *groups = run_world(moved, config, size=3)
    per_client = sum(sizes_of_the_model())
    trainings = sum(len(rank["received"]) for rank in groups)
    assert trainings >= 2 * 3
    assert coordinator["received"] == []
    assert {size for rank in groups for size in (*rank["received"], *rank["updates"])} == {per_client}
    assert sum(coordinator["send"]) == trainings * per_client
    assert sum(sum(rank["send"]) for rank in groups) == trainings * per_client
    for row in coordinator["history"]:
        assert row["bytes/up"] == row["bytes/down"] == 3 * per_client


def test_the_dry_run_shows_groups_clients_and_memory() -> None:
    topology = TopologyConfig(coordinator="dedicated", ranks_per_client=2)
    shown = rows(dataclasses.replace(CONFIG, topology=topology), 5)
    assert shown["world"] == "5 ranks: 2 client groups of 2; coordinator: rank 0 only"
    assert shown["population"] == "6 clients of 20 to 20 examples (median 20)"
    assert shown["first round"] == "clients per group 2, 1, examples per group 40, 20"
    assert "120 training images of 3x12x12" in shown["data"]
    assert shown["memory per rank"].startswith("62.21 kB of images")  # (120 + 24) × 3 × 12 × 12


def test_memory_counts_a_gradient_only_where_one_is_held() -> None:
    megabytes, gradient = [], 0.0
    for local in (LocalConfig(), LocalConfig(clip_norm=1.0), LocalConfig(engine="eager")):
        shown = rows(dataclasses.replace(CONFIG, local=local), 1)
        state = re.search(r"([\d.]+) MB of model state", shown["memory per rank"])
        parameters = re.search(r"([\d,]+) trainable", shown["model"])
        assert state
        assert parameters
        megabytes.append(float(state[1]))
        gradient = 4 * int(parameters[1].replace(",", "")) / 1e6
    assert megabytes[1] == megabytes[2] == pytest.approx(megabytes[0] + gradient, abs=0.011)


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


def test_the_list_of_recipes_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit):
            main(["recipes"])
    names = [line.split(" ")[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names[:3] == ["compare-paradigms", "digits", "mnist-lenet"]
    assert all(names), "a description runs over its line"
