"""Training on one GPU: NCCL, ranks that share it, memory that runs out, precisions, resuming elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import references as ref
import rig
import torch
import torch.distributed as dist
from launching import type_on_this_rank
from torch import Tensor, nn

from fedddp import (
    CheckpointConfig,
    CohortConfig,
    Config,
    DataConfig,
    LocalConfig,
    ModelConfig,
    TopologyConfig,
)
from fedddp.algorithms import SCAFFOLD, Algorithm, FedAvg
from fedddp.distributed.launch import connect
from fedddp.rng import seed_global
from fedddp.testing import run_world
from fedddp.training.graph_trainer import record
from fedddp.training.objects import Objects
from fedddp.training.synchronous import run_rounds

Device = Literal["cuda", "cpu"]
GPU: Device = "cuda"
CPU: Device = "cpu"
TIMEOUT_S = 150.0
"""A rank's first use of a GPU takes seconds, and its first convolution more."""

MEMORY_BYTES = 384 * 2**20
"""What a rank may take of the GPU where memory is to run out."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(3 * TIMEOUT_S),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

ALGORITHMS = {"FedAvg": FedAvg(), "SCAFFOLD": SCAFFOLD()}
each_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def small(algorithm: Algorithm, norm: bool = False, local: LocalConfig = rig.LOCAL) -> Config:
    """Return a run of the references' network, with batch norm or without."""
    return rig.config_of(algorithm, rig.NORM if norm else local, norm)


def lenet() -> Config:
    """Return a run with convolutions."""
    return dataclasses.replace(
        small(FedAvg(), local=LocalConfig(batch_size=20, lr=0.05)),
        data=DataConfig(dataset="digits", examples=200, clients=5),
        cohort=CohortConfig(size=3),
        model=ModelConfig(name="lenet"),
    )


def see_one_gpu() -> None:
    """Hide all GPUs but the first from this rank, before it uses CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def trained(
    config: Config, topology: TopologyConfig, folder: str, resumed_from: int = 0, dropout: bool = False
) -> tuple[str, Tensor]:
    """Train on the first GPU or on the CPU; return the kind of device, and parameters and buffers."""
    see_one_gpu()
    torch.backends.cudnn.allow_tf32 = False  # which rounds products to 10 bits
    name = "dropout" if dropout else "norm" if config.model.norm == "sync" else "plain"
    objects = Objects() if config.data.examples else rig.objects_of(name, config)
    with contextlib.closing(connect(topology)) as world:
        session = rig.session_of(config, world, Path(folder), objects)
        assert session.rounds_done == resumed_from
        run_rounds(session)
        assert session.flat.params.device.type == world.device.type
        return world.device.type, torch.cat([session.server.params, session.server.buffers]).cpu()


def train(
    config: Config,
    device: Device,
    folder: Path,
    *,
    ranks: int = 1,
    ranks_per_client: int = 1,
    resumed_from: int = 0,
    dropout: bool = False,
) -> Tensor:
    """Train in a world of its own; return the coordinator's parameters and buffers."""
    topology = TopologyConfig(device=device, ranks_per_client=ranks_per_client)
    given = (config, topology, str(folder), resumed_from, dropout)
    results = run_world(trained, *given, size=ranks, timeout_s=TIMEOUT_S)
    assert [kind for kind, _ in results] == [device] * ranks
    return results[0][1]


def assert_close(one: Tensor, two: Tensor) -> None:
    assert torch.isfinite(one).all()
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


# ---- the same numbers as on the CPU ----


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@each_algorithm
def test_a_gpu_trains_what_the_cpu_trains(tmp_path: Path, name: str, norm: bool) -> None:
    config = small(ALGORITHMS[name], norm)
    assert_close(train(config, GPU, tmp_path / "gpu"), train(config, CPU, tmp_path / "cpu"))


def test_a_gpu_trains_convolutions_as_the_cpu_does(tmp_path: Path) -> None:
    assert_close(train(lenet(), GPU, tmp_path / "gpu"), train(lenet(), CPU, tmp_path / "cpu"))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_optimizers_with_state_train_what_they_train_on_the_cpu(tmp_path: Path, optimizer: str) -> None:
    kept = LocalConfig(epochs=2, batch_size=4, lr=0.01, optimizer="adam", optimizer_state="keep")
    config = small(FedAvg(), local=rig.MOMENTUM if optimizer == "momentum" else kept)
    assert_close(train(config, GPU, tmp_path / "gpu"), train(config, CPU, tmp_path / "cpu"))


# ---- graphs ----


@pytest.mark.parametrize("kind", ["plain", "norm", "dropout", "momentum", "lenet", "bf16"])
@each_algorithm
def test_graphs_train_what_eager_passes_train(tmp_path: Path, name: str, kind: str) -> None:
    local = {"momentum": rig.MOMENTUM, "bf16": dataclasses.replace(rig.LOCAL, precision="bf16")}
    config = small(ALGORITHMS[name], kind == "norm", local.get(kind, rig.LOCAL))
    if kind == "lenet":
        config = dataclasses.replace(lenet(), algorithm=ALGORITHMS[name])

    def trained_by(engine: Literal["graph", "eager"]) -> Tensor:
        changed = dataclasses.replace(config, local=dataclasses.replace(config.local, engine=engine))
        return train(changed, GPU, tmp_path / engine, dropout=kind == "dropout")

    assert_close(trained_by("graph"), trained_by("eager"))


def passes_of_a_graph() -> tuple[list[float], list[float]]:
    """Return what recorded passes with dropout add up in three replays, and in as many eager passes."""
    see_one_gpu()
    layers = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 1)).cuda()
    images, total = torch.ones(8, 64, device="cuda"), torch.zeros(1, device="cuda")

    def passes() -> None:
        total.add_(layers(images).detach().sum())

    def sums(call: Callable[[], None]) -> list[float]:
        seed_global(3)
        total.zero_()
        found = []
        for _ in range(3):
            call()
            found.append(float(total))
        return found

    replay = record(passes)
    return sums(replay), sums(passes)


def test_replays_draw_what_passes_draw() -> None:
    ((replayed, passed),) = run_world(passes_of_a_graph, size=1, timeout_s=TIMEOUT_S)
    assert replayed == pytest.approx(passed, rel=1e-5)
    assert len({round(b - a, 3) for a, b in pairwise([0.0, *replayed])}) == 3


# ---- worlds ----


def sum_over_nccl() -> tuple[str, list[float]]:
    """Return the backend that a rank alone with its GPU uses there, and a sum by it."""
    see_one_gpu()
    with contextlib.closing(connect(TopologyConfig(device="cuda", backend="nccl"))) as world:
        numbers = torch.arange(3.0, device=world.device)
        dist.all_reduce(numbers)
        group = dist.group.WORLD
        assert group is not None
        return group._get_backend(world.device).name(), numbers.tolist()


def test_one_rank_communicates_by_nccl() -> None:
    ((backend, numbers),) = run_world(sum_over_nccl, size=1, timeout_s=TIMEOUT_S)
    assert backend.lower() == "nccl"
    assert numbers == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(("ranks", "ranks_per_client"), [(2, 1), (2, 2), (4, 1), (4, 2)])
@each_algorithm
def test_ranks_share_a_gpu_over_gloo(tmp_path: Path, name: str, ranks: int, ranks_per_client: int) -> None:
    config = small(ALGORITHMS[name])
    shared = train(config, GPU, tmp_path / "shared", ranks=ranks, ranks_per_client=ranks_per_client)
    alone = train(config, GPU, tmp_path / "alone")
    assert_close(shared, alone)
    if ranks_per_client == 1:
        assert torch.equal(shared, alone), "exact sums do not depend on the groups"


def test_two_ranks_that_share_a_gpu_train_batch_norm_over_both(tmp_path: Path) -> None:
    config = small(FedAvg(), norm=True)
    shared = train(config, GPU, tmp_path / "shared", ranks=2, ranks_per_client=2)
    assert_close(shared, train(config, CPU, tmp_path / "cpu"))


# ---- precisions ----


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_comes_near_to_fp32(tmp_path: Path, precision: Literal["bf16", "fp16"]) -> None:
    config = small(FedAvg())
    local = dataclasses.replace(config.local, precision=precision)
    low = train(dataclasses.replace(config, local=local), GPU, tmp_path / precision)
    full = train(config, GPU, tmp_path / "fp32")
    assert torch.isfinite(low).all()
    assert not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0.0, atol=0.05)


# ---- memory ----


def run_out_of_memory(command: str) -> tuple[object, list[str], int]:
    """Return the exit code and output of `fedddp COMMAND` with little memory, and what it took."""
    see_one_gpu()
    torch.cuda.set_per_process_memory_fraction(
        MEMORY_BYTES / torch.cuda.get_device_properties(0).total_memory, 0
    )
    code, printed = type_on_this_rank(command)
    return code, printed, torch.cuda.max_memory_reserved(0)


@pytest.mark.parametrize(
    ("settings", "begins", "names"),
    [
        (
            "--local.batch_size 4000",
            "error: client 0: out of GPU memory in round 1 with local.batch_size=4000",
            "raise local.accumulate",
        ),
        (
            "--local.steps 1 --local.batch_size 2 --evaluation.batch_size 4000",
            "error: out of GPU memory while evaluating with evaluation.batch_size=4000",
            "lower it",
        ),
    ],
    ids=["training", "evaluation"],
)
def test_memory_that_runs_out_is_one_line_with_the_setting(settings: str, begins: str, names: str) -> None:
    # 24,000 images of 3 x 32 x 32 bytes fit; two outputs of a layer, 4,000 x 16 x 32 x 32 floats, do not.
    data = "--data.dataset shapes --data.image_size 32 --data.examples 20000 --data.clients 1 --cohort.size 1"
    quiet = "--topology.device cuda --tracking.trackers [] --tracking.progress false --rounds 1"
    command = f"run digits {data} --model.name resnet20-gn {quiet} {settings}"
    ((code, printed, taken),) = run_world(run_out_of_memory, command, size=1, timeout_s=TIMEOUT_S)
    assert code == 1, printed
    (line,) = [line for line in printed if line.startswith("error: ")]
    assert line.startswith(begins)
    assert names in line
    assert not any("Traceback" in line for line in printed)
    assert taken <= MEMORY_BYTES


# ---- a checkpoint of one device, resumed on the other ----


@pytest.mark.parametrize(("first", "second"), [(CPU, GPU), (GPU, CPU)], ids=["cpu to gpu", "gpu to cpu"])
@each_algorithm
def test_a_run_resumes_on_another_device(tmp_path: Path, name: str, first: Device, second: Device) -> None:
    config = dataclasses.replace(small(ALGORITHMS[name]), checkpoint=CheckpointConfig(every=1))
    train(dataclasses.replace(config, rounds=ref.ROUNDS - 1), first, tmp_path / "moved")
    resumed = dataclasses.replace(config, resume="auto")
    moved = train(resumed, second, tmp_path / "moved", resumed_from=ref.ROUNDS - 1)
    assert_close(moved, train(config, CPU, tmp_path / "cpu"))
