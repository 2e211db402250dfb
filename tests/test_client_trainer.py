"""Local training is plain SGD on any number of ranks: checked against a ten-line loop."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedddp.algorithms import FedAvg, ServerState
from fedddp.algorithms.local import LocalConfig
from fedddp.data.datasets import DataConfig, Images
from fedddp.data.loader import ClientLoader
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.distributed.world import World
from fedddp.evaluation import NoMemoryError
from fedddp.models.flat import FlatModel
from fedddp.models.norms import convert_norm, synchronized
from fedddp.rng import DROPOUT, stream, stream_seed
from fedddp.tasks.classification import Classification
from fedddp.testing import run_world
from fedddp.training.client_trainer import ClientJob, ClientResult, ClientTrainer, Parts

SEED, CLIENT, ROUND = 7, 3, 2
MEAN, STD = 0.4, 0.3


def images() -> Images:
    """Return 40 gray images of 6 x 6 in 4 classes."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (40, 1, 6, 6), dtype=np.uint8))
    labels = rng.integers(0, 4, 40)
    return Images(labels, 4, (1, 6, 6), pixels, None, None, (MEAN,), (STD,))


class Net(nn.Module):
    """A convolution, batch norm if asked, two linear layers; frozen, tied or unused layers if asked."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm: nn.Module = nn.BatchNorm2d(4) if "norm" in kind else nn.Identity()
        self.hidden = nn.Linear(64, 8)
        self.head = nn.Linear(8, 4)
        if kind == "frozen":
            self.conv.requires_grad_(False)
        if kind == "tied":
            self.again = nn.Linear(8, 8, bias=False)
            self.more = nn.Linear(8, 8, bias=False)
            self.more.weight = self.again.weight
        if kind == "unused":
            self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden(self.norm(self.conv(x)).tanh().flatten(1)))
        if hasattr(self, "again"):
            x = self.more(torch.tanh(self.again(x)))
        logits: Tensor = self.head(x)
        return logits


def net(kind: str) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(kind)


@dataclasses.dataclass(frozen=True)
class Case:
    """A client's examples, its local training, its model."""

    name: str
    examples: int = 23  # batches of 8: the last has 7
    local: LocalConfig = dataclasses.field(
        default_factory=lambda: LocalConfig(epochs=2, batch_size=8, lr=0.1)
    )
    kind: str = "plain"
    smoothing: float = 0.0
    trainings: int = 1
    tolerance: float = 1e-5


def case(name: str, *, local: dict[str, Any] | None = None, **rest: Any) -> Case:
    settings = {"epochs": 2, "batch_size": 8, "lr": 0.1, **(local or {})}
    return Case(name, local=LocalConfig(**settings), **rest)


CASES = [
    case("sgd"),
    case("momentum and weight decay", local={"momentum": 0.9, "weight_decay": 0.01}),
    case("adam", local={"optimizer": "adam", "lr": 0.01, "weight_decay": 0.01}),
    case("adamw", local={"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}),
    case("steps over epochs", local={"steps": 5}),
    case("clipped", local={"clip_norm": 0.05}),
    case("one full batch", local={"batch_size": 64, "epochs": 3}),
    case("batches of one", local={"batch_size": 1, "epochs": 1}, examples=5),
    case("one example", examples=1),
    case("last batch of one", examples=17),
    case("no example", examples=0),
    case("micro-batches", local={"accumulate": 3}),
    case("more micro-batches than examples", local={"accumulate": 9}, examples=10),
    case("channels last", local={"channels_last": True}),
    case("label smoothing", smoothing=0.1),
    case("frozen", kind="frozen", local={"weight_decay": 0.01}),
    case("tied", kind="tied"),
    case("unused", kind="unused"),
    case("synced norm", kind="synced norm"),
    case("synced norm, last batch of two", kind="synced norm", examples=18),
    case("optimizer kept", local={"momentum": 0.9, "optimizer_state": "keep"}, trainings=2),
    case("optimizer reset", local={"momentum": 0.9}, trainings=2),
    case("adam kept", local={"optimizer": "adam", "optimizer_state": "keep", "lr": 0.01}, trainings=2),
    case("bf16", local={"precision": "bf16"}, tolerance=0.02),
    case("fp16", local={"precision": "fp16"}, tolerance=0.005),
]


def start_training(
    world: World, case: Case, *, data: DataConfig | None = None
) -> tuple[ClientTrainer, ServerState]:
    module: nn.Module = net(case.kind)
    if case.kind == "synced norm":
        convert_norm(module, "sync")
        synchronized(module, world.group_sum)
    if case.local.channels_last is True:
        module = module.to(memory_format=torch.channels_last)
    flat = FlatModel(module)
    loader = ClientLoader(images(), data or DataConfig(), world.device, seed=SEED)
    task = Classification(label_smoothing=case.smoothing)
    trainer = ClientTrainer(Parts(world, flat, task, loader, case.local, FedAvg(), SEED))
    return trainer, ServerState.of(flat, population=10)


def train(trainer: ClientTrainer, server: ServerState, case: Case, state: dict[str, Tensor]) -> ClientResult:
    """Collective over the group. Train the client of the case, which holds half of its cohort's examples."""
    indices = np.arange(case.examples, dtype=np.int64)
    job = ClientJob(client=CLIENT, round=ROUND, indices=indices, weight=0.5, share=0.5, lr=case.local.lr)
    return trainer.train(server, job, state)


def ours(case: Case, world: World) -> dict[str, Any]:
    """Return the state after the case's local trainings, each from where the last one ended."""
    trainer, server = start_training(world, case)
    state: dict[str, Tensor] = {}
    result = None
    for _ in range(case.trainings):
        result = train(trainer, server, case, state)
        server.params += result.update.vectors["update"]
        server.buffers.copy_(result.buffers)
        server.integer_buffers.copy_(result.integer_buffers)
    assert result is not None
    trainer.flat.params.copy_(server.params)
    weights = {name: t.clone().contiguous() for name, t in trainer.flat.module.state_dict().items()}
    loss_sum, count = result.loss
    loss = loss_sum / count if case.examples else None
    return {"weights": weights, "loss": loss, "steps": result.steps, "count": count}


def all_cases(ranks: int) -> list[dict[str, Any]]:
    with contextlib.closing(connect(TopologyConfig(ranks_per_client=ranks, device="cpu"))) as world:
        return [ours(case, world) for case in CASES]


def plain_loop(case: Case) -> dict[str, Any]:
    """Return the reference: what anyone would write for one process."""
    model, data, local = net(case.kind), images(), case.local
    assert data.pixels is not None
    x, y = (data.pixels.float() / 255 - MEAN) / STD, torch.from_numpy(data.labels)
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    options = {"lr": local.lr, "weight_decay": local.weight_decay}
    if local.optimizer == "sgd":
        options["momentum"] = local.momentum
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer | None = None
    steps = 0
    losses: list[tuple[float, int]] = []
    for _ in range(case.trainings):
        if optimizer is None or local.optimizer_state == "reset":
            optimizer = kinds[local.optimizer](trained, **options)
        steps, losses = 0, []
        for epoch in range(local.epochs if local.steps is None else 99):
            permuted = stream("batches", SEED, ROUND, CLIENT, epoch).permutation(np.arange(case.examples))
            for batch in torch.split(torch.from_numpy(permuted), local.batch_size) if case.examples else []:
                if local.steps is not None and steps == local.steps:
                    break
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[batch]), y[batch], label_smoothing=case.smoothing)
                loss.backward()  # type: ignore[no-untyped-call]
                if local.clip_norm is not None:
                    nn.utils.clip_grad_norm_(trained, local.clip_norm)
                optimizer.step()
                steps += 1
                losses.append((float(loss.detach()) * len(batch), len(batch)))
    total, count = (sum(column) for column in zip(*losses, strict=True)) if losses else (0.0, 0)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"weights": weights, "loss": total / count if count else None, "steps": steps, "count": count}


@pytest.fixture(scope="module")
def references() -> list[dict[str, Any]]:
    return [plain_loop(case) for case in CASES]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_local_training_on_any_number_of_ranks_is_plain_sgd(
    ranks: int, references: list[dict[str, Any]]
) -> None:
    for rank, results in enumerate(run_world(all_cases, ranks, size=ranks)):
        for case, result, expected in zip(CASES, results, references, strict=True):
            where = f"{case.name}, rank {rank} of {ranks}"
            assert result["steps"] == expected["steps"], where
            assert result["count"] == expected["count"], where
            assert result["loss"] == pytest.approx(expected["loss"], abs=case.tolerance), where
            for name, tensor in expected["weights"].items():
                difference = (result["weights"][name].double() - tensor.double()).abs().max()
                assert difference <= case.tolerance, (where, name, float(difference))


def test_each_setting_moves_the_weights_by_far_more_than_the_tolerance(
    references: list[dict[str, Any]],
) -> None:
    weights = {
        case.name: torch.cat([t.flatten().double() for t in result["weights"].values()])
        for case, result in zip(CASES, references, strict=True)
        if case.kind == "plain"
    }
    for one, other in [
        ("sgd", "momentum and weight decay"),
        ("sgd", "clipped"),
        ("sgd", "steps over epochs"),
        ("sgd", "label smoothing"),
        ("adam", "adamw"),
        ("optimizer kept", "optimizer reset"),
    ]:
        assert (weights[one] - weights[other]).abs().max() > 1e-3, (one, other)


# ---- statistics of batch norm that is not synchronised ----


def norm_statistics(examples: int) -> tuple[Tensor, Tensor]:
    with contextlib.closing(connect(TopologyConfig(ranks_per_client=2, device="cpu"))) as world:
        norm = case("norm", kind="norm", examples=examples, local={"epochs": 1, "lr": 1e-9})
        trainer, server = start_training(world, norm)
        result = train(trainer, server, norm, {})
        return result.buffers.clone(), result.integer_buffers.clone()


@pytest.mark.parametrize("examples", [8, 7, 1, 9])
def test_norm_statistics_of_ranks_are_averaged_by_examples(examples: int) -> None:
    permuted = stream("batches", SEED, ROUND, CLIENT, 0).permutation(np.arange(examples))
    pixels = images().pixels
    assert pixels is not None
    expected = torch.zeros(8)
    for rank in range(2):
        model, seen = net("norm"), 0
        for start in range(0, examples, 8):
            share = permuted[start : start + 8][rank::2]
            if len(share):
                model((pixels[share].float() / 255 - MEAN) / STD)
                seen += len(share)
        assert isinstance(model.norm, nn.BatchNorm2d)
        statistics = torch.cat([model.norm.running_mean, model.norm.running_var])  # type: ignore[list-item]
        expected += statistics * seen / examples
    for buffers, integer_buffers in run_world(norm_statistics, examples, size=2):
        torch.testing.assert_close(buffers, expected)
        assert integer_buffers.tolist() == [-(-examples // 8)]


# ---- the same bits ----


def bits_after(earlier: int, ranks: int) -> list[float]:
    """Return the client's update after so many `earlier` local trainings in this process."""
    with contextlib.closing(connect(TopologyConfig(ranks_per_client=ranks, device="cpu"))) as world:
        plain = case("sgd", local={"momentum": 0.5})
        trainer, server = start_training(world, plain, data=DataConfig(augment="crop-flip"))
        for _ in range(earlier):
            train(trainer, server, dataclasses.replace(plain, examples=9), {})
        values: list[float] = train(trainer, server, plain, {}).update.vectors["update"].tolist()
        return values


@pytest.mark.parametrize("ranks", [1, 3])
def test_bits_of_a_local_training_do_not_depend_on_earlier_ones(ranks: int) -> None:
    fresh, after = run_world(bits_after, 0, ranks, size=ranks), run_world(bits_after, 2, ranks, size=ranks)
    assert fresh[0] == after[0]
    assert all(update == fresh[0] for update in fresh)


def test_augmentation_does_not_depend_on_the_number_of_ranks() -> None:
    (alone,) = run_world(bits_after, 0, 1, size=1)
    together, _ = run_world(bits_after, 0, 2, size=2)
    assert together == pytest.approx(alone, abs=1e-5)


# ---- layers that are skipped at random ----


class Skipping(nn.Module):
    """Two blocks, each skipped in half of the training passes."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw
        self.first = nn.Linear(36, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).tanh()
        for block in self.blocks:
            if not self.training or self.draw() < 0.5:
                x = block(x).tanh()
        logits: Tensor = self.head(x)
        return logits


def skipping(kind: str = "torch") -> Skipping:
    """Return a model whose layers draw from a global generator of this kind."""
    draws: dict[str, Callable[[], float]] = {
        "torch": lambda: float(torch.rand(())),
        "python": random.random,
        "numpy": np.random.rand,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Skipping(draws[kind])


def drawing(kind: str, seed: int) -> Callable[[], float]:
    """Return the draws of a generator of this kind, of its own."""
    generator = torch.Generator().manual_seed(seed)
    draws: dict[str, Callable[[], float]] = {
        "torch": lambda: float(torch.rand((), generator=generator)),
        "python": random.Random(seed).random,
        "numpy": np.random.RandomState(seed % 2**32).rand,
    }
    return draws[kind]


def trainer_of(world: World, module: nn.Module, local: LocalConfig) -> tuple[ClientTrainer, ServerState]:
    flat = FlatModel(module)
    loader = ClientLoader(images(), DataConfig(), world.device, seed=SEED)
    trainer = ClientTrainer(Parts(world, flat, Classification(), loader, local, FedAvg(), SEED))
    return trainer, ServerState.of(flat, population=10)


SKIPPED = case("skipped", local={"epochs": 3, "batch_size": 4}, examples=10)


def update_of_skipping(ranks: int, kind: str) -> Tensor:
    with contextlib.closing(connect(TopologyConfig(ranks_per_client=ranks, device="cpu"))) as world:
        trainer, server = trainer_of(world, skipping(kind), SKIPPED.local)
        return train(trainer, server, SKIPPED, {}).update.vectors["update"].clone()


def reference_of_skipping(ranks: int, kind: str) -> tuple[Tensor, set[int]]:
    """Return the update of a loop that plays every rank in turn, and how many blocks the passes used."""
    model, data, local = skipping(), images(), SKIPPED.local
    assert data.pixels is not None
    x, y = (data.pixels.float() / 255 - MEAN) / STD, torch.from_numpy(data.labels)
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    draws = [drawing(kind, stream_seed(DROPOUT, SEED, ROUND, CLIENT, rank)) for rank in range(ranks)]
    used: set[int] = set()
    optimizer = torch.optim.SGD(model.parameters(), lr=local.lr)
    for epoch in range(local.epochs):
        permuted = stream("batches", SEED, ROUND, CLIENT, epoch).permutation(np.arange(SKIPPED.examples))
        for first in range(0, len(permuted), local.batch_size):
            batch = permuted[first : first + local.batch_size]
            optimizer.zero_grad()
            for rank in range(ranks):
                hidden = model.first(x[batch[rank::ranks]].flatten(1)).tanh()
                blocks = [b for b in model.blocks if draws[rank]() < 0.5]
                for block in blocks:
                    hidden = block(hidden).tanh()
                loss = F.cross_entropy(model.head(hidden), y[batch[rank::ranks]], reduction="sum")
                (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
                used.add(len(blocks))
            optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - start, used


@pytest.mark.parametrize("kind", ["torch", "python", "numpy"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_that_are_skipped_at_random_train_on_any_number_of_ranks(ranks: int, kind: str) -> None:
    expected, used = reference_of_skipping(ranks, kind)
    assert len(used) > 1
    for update in run_world(update_of_skipping, ranks, kind, size=ranks):
        torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-4)


def state_around_the_trainer(kinds: list[str]) -> list[tuple[bool, bool, bool]]:
    """Return whether making a trainer of two ranks leaves buffers, generator and gradients alone."""
    found = []
    with contextlib.closing(connect(TopologyConfig(ranks_per_client=2, device="cpu"))) as world:
        for kind in kinds:
            first: list[nn.Module] = [skipping()] if kind == "skips" else [nn.Flatten(), nn.Linear(36, 4)]
            module = nn.Sequential(*first, nn.BatchNorm1d(4), nn.Dropout())
            before = {name: buffer.clone() for name, buffer in module.named_buffers()}
            generator = torch.random.get_rng_state()
            trainer, _ = trainer_of(world, module, LocalConfig())
            same = all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
            kept = torch.equal(torch.random.get_rng_state(), generator)
            found.append((same, kept, not trainer.flat.grad.any()))
    return found


def test_looking_for_skipped_layers_leaves_the_model_as_it_was() -> None:
    for found in run_world(state_around_the_trainer, ["skips", "does not skip"], size=2):
        assert found == [(True, True, True)] * 2


# ---- buffers of all types ----


class Noting(nn.Linear):
    """A layer whose output depends on buffers that training changes."""

    def __init__(self, dtype: torch.dtype, persistent: bool) -> None:
        super().__init__(36, 4)
        self.register_buffer("seen", torch.zeros(1, dtype=dtype), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.get_buffer("seen")
        if self.training:
            seen += 1
        return super().forward(x.flatten(1)) * (1 + seen.abs().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
def test_a_client_does_not_see_what_another_left_in_a_cache(dtype: torch.dtype) -> None:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        torch.manual_seed(0)
        trainer, server = trainer_of(world, Noting(dtype, persistent=False), LocalConfig())
        updates = [train(trainer, server, case("sgd"), {}).update.vectors["update"].clone() for _ in range(2)]
        assert torch.equal(*updates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32])
def test_a_buffer_that_training_changes_starts_at_the_servers_value(dtype: torch.dtype) -> None:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        trainer, server = trainer_of(world, Noting(dtype, persistent=True), LocalConfig(steps=3))
        for start in (0, 5):
            (server.buffers if dtype.is_floating_point else server.integer_buffers).fill_(start)
            for _ in range(2):
                result = train(trainer, server, case("sgd"), {})
                seen = torch.cat([result.buffers, result.integer_buffers])
                assert seen.tolist() == [start + 3]


def test_a_complex_buffer_that_training_changes_is_refused() -> None:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        trainer, server = trainer_of(world, Noting(torch.complex64, persistent=True), LocalConfig())
        with pytest.raises(ValueError, match="^the model's buffer 'seen', of type torch.complex64, changes"):
            train(trainer, server, case("sgd"), {})


class Masked(nn.Linear):
    """A layer with a constant mask."""

    def __init__(self) -> None:
        super().__init__(36, 4)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def masks_after(examples: list[int]) -> list[list[float]]:
    with contextlib.closing(connect(TopologyConfig(ranks_per_client=2, device="cpu"))) as world:
        trainer, server = trainer_of(world, Masked(), LocalConfig())
        cases = [case("masked", examples=count) for count in examples]
        return [train(trainer, server, one, {}).buffers.tolist() for one in cases]


@pytest.mark.parametrize("examples", [[0, 5], [1]])
def test_the_mean_over_ranks_keeps_constant_masks(examples: list[int]) -> None:
    for masks in run_world(masks_after, examples, size=2):
        assert masks == [[0.0, float("-inf")]] * len(examples)


# ---- batch norm and micro-batches ----


@pytest.mark.parametrize(
    ("kind", "accumulate", "warned"),
    [("norm", 2, True), ("synced norm", 2, True), ("norm", 1, False), ("plain", 2, False)],
)
def test_micro_batches_of_a_model_with_batch_norm_are_warned_of(
    kind: str, accumulate: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        start_training(world, case("micro", kind=kind, local={"accumulate": accumulate}))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.startswith(f"local.accumulate={accumulate}: batch norm normalises") for line in lines] == [
        True
    ] * warned


@pytest.mark.parametrize(("kind", "same"), [("plain", " (the result stays the same)"), ("norm", "")])
def test_running_out_of_memory_names_the_settings(
    kind: str, same: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        trainer, server = start_training(world, case("sgd", kind=kind))

        def fail(*_: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(Classification, "loss", fail)
        with pytest.raises(NoMemoryError) as caught:
            train(trainer, server, case("sgd"), {})
    assert str(caught.value) == (
        "client 3: out of CPU memory in round 3 with local.batch_size=8, topology.ranks_per_client=1 and "
        f"local.accumulate=1; raise local.accumulate{same}, choose local.precision=bf16, "
        "raise topology.ranks_per_client, or lower local.batch_size"
    )
