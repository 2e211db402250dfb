"""Which engine trains a run, and how much work a step and a round cost: counted, not timed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fedddp import (
    CohortConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    TrackingConfig,
)
from fedddp.aggregation import mean
from fedddp.algorithms import MOON, ClientContext, FedAvg, FedBuff
from fedddp.models.flat import FlatModel
from fedddp.models.traced import TracedModel
from fedddp.reporting.dry_run import dry_run
from fedddp.section import ConfigError
from fedddp.tasks import Classification, Detection
from fedddp.testing import run_world
from fedddp.training.engine import channels_last, engine_of

MLP = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
PARAMETERS = 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10
"""Of `2nn` for digits."""
GRAPH = LocalConfig(engine="graph")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def federation(output: Path | str, **changes: Any) -> Federation:
    settings: dict[str, Any] = {
        "data": DataConfig(dataset="digits", clients=8, examples=320),
        "cohort": CohortConfig(size=4),
        "model": ModelConfig(name="2nn"),
        "local": LocalConfig(batch_size=16, epochs=2),
        "rounds": 2,
        "tracking": TrackingConfig(trackers=[], progress=False),
        "output": str(output),
    }
    return Federation(**{**settings, **changes})


def test_a_run_imports_neither_sympy_nor_the_compiler(tmp_path: Path) -> None:
    code = f"""
import sys
from fedddp import *
model, quiet = ModelConfig(name="lenet"), TrackingConfig(trackers=[], progress=False)
data, cohort = DataConfig(dataset="digits", clients=8, examples=320), CohortConfig(size=4)
Federation(data=data, cohort=cohort, model=model, tracking=quiet, rounds=1, output={str(tmp_path)!r}).run()
print([name for name in ("sympy", "torch._dynamo", "torch._inductor") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.splitlines()[-1:], done.returncode) == (["[]"], 0), done.stderr


class Own(FedAvg):
    """An algorithm of a user."""

    def correct(self, context: ClientContext) -> None:
        context.grad.add_(torch.randn_like(context.grad))


class OwnLoss(Classification):
    """A task of a user."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().loss(outputs + torch.rand_like(outputs), targets)


@pytest.mark.parametrize(
    ("changes", "place", "reason"),
    [
        ({}, {}, None),
        ({"local": LocalConfig(engine="eager")}, {}, "local.engine is eager"),
        ({}, {"ranks": 2}, "a client has several ranks"),
        ({}, {"device": GPU}, "the clients train on a GPU"),
        ({"local": LocalConfig(precision="bf16")}, {}, "local.precision is bf16"),
        ({"local": LocalConfig(accumulate=2)}, {}, "local.accumulate is 2"),
        ({"algorithm": FedBuff()}, {}, None),
        ({"algorithm": MOON()}, {}, "MOON adds a penalty to the loss"),
        ({"algorithm": Own()}, {}, "Own is not one of fedddp's own classes"),
        ({"task": OwnLoss()}, {}, "OwnLoss is not one of fedddp's own classes"),
        ({"cohort": CohortConfig(size=1)}, {}, None),
        ({"local": GRAPH}, {"device": GPU}, None),
        ({"local": dataclasses.replace(GRAPH, precision="bf16")}, {"device": GPU}, None),
        ({"local": dataclasses.replace(GRAPH, precision="fp16")}, {"device": GPU}, "local.precision is fp16"),
        ({"local": GRAPH}, {}, "the clients do not train on a GPU"),
        ({"local": GRAPH}, {"device": GPU, "ranks": 2}, "a client has several ranks"),
        ({"local": GRAPH, "algorithm": MOON()}, {"device": GPU}, "MOON adds a penalty to the loss"),
        ({"local": GRAPH, "task": Detection()}, {"device": GPU}, "images differ in how many boxes they have"),
    ],
)
def test_which_engine_trains_and_why_it_is_the_eager_one(
    changes: dict[str, Any], place: dict[str, Any], reason: str | None
) -> None:
    given = {"device": CPU, "ranks": 1, **place}
    config = Config(**changes)
    found = engine_of(config, FlatModel(copy.deepcopy(MLP)), (1, 2, 2), **given)
    other = "graph" if config.local.engine == "graph" else "traced"
    assert (found.name, found.reason or None) == ("eager" if reason else other, reason)
    assert (found.traced is not None) == (found.name == "traced")


def test_the_plan_says_which_engine_trains() -> None:
    for local, words in [
        (LocalConfig(), "traced"),
        (LocalConfig(accumulate=2), "eager, because local.accumulate is 2"),
        (GRAPH, "local.engine=graph cannot train this: the clients do not train on a GPU; leave it out"),
    ]:
        config = Config(data=DataConfig(dataset="digits"), model=ModelConfig(name="2nn"), local=local)
        console = Console(width=200, file=io.StringIO())
        console.print(dry_run(config, 2))
        assert words in console.file.getvalue()  # type: ignore[attr-defined]


CONVOLUTION = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
LARGE = nn.Sequential(nn.Conv2d(3, 2000, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2000, 2000))


class Viewed(nn.Module):
    """A network whose view channels-last images do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 26 * 26, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).view(-1, 8 * 26 * 26))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("setting", "module", "side", "device", "expected"),
    [
        ("auto", CONVOLUTION, 28, CPU, True),
        ("auto", CONVOLUTION, 28, GPU, False),
        ("auto", nn.Linear(2, 2), 28, CPU, False),
        ("auto", LARGE, 63, CPU, False),
        ("auto", LARGE, 64, CPU, True),
        ("auto", LARGE, (63, 64), CPU, False),
        (True, LARGE, 32, CPU, True),
        (False, CONVOLUTION, 28, CPU, False),
        ("auto", Viewed(), 28, CPU, False),
    ],
)
def test_channels_last_follows_from_model_image_and_device(
    setting: Any, module: nn.Module, side: int | tuple[int, int], device: torch.device, expected: bool
) -> None:
    height, width = side if isinstance(side, tuple) else (side, side)
    assert channels_last(LocalConfig(channels_last=setting), module, (3, height, width), device) is expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm": MOON()}, "MOON adds a penalty to the loss"),
        ({"model": ModelConfig(name="shufflenet_v2_x0_5")}, "its forward pass .*"),
    ],
)
def test_traced_is_refused_in_one_line_where_it_cannot_be_and_auto_is_eager_then(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    data = DataConfig(dataset="shapes", clients=4, examples=16, image_size=32)
    options = {**changes, "data": data, "rounds": 1}
    message = f"^local.engine=traced cannot train this: {reason}; leave it out$"
    with pytest.raises(ConfigError, match=message):
        federation(tmp_path, local=LocalConfig(engine="traced"), name="refused", **options).run()
    one, two = (
        federation(tmp_path, local=LocalConfig(engine=engine), name=engine, **options).run()
        for engine in ("eager", "auto")
    )
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name])


# ---- guards: how often ----


@contextlib.contextmanager
def counted(counts: Counter[str], owner: Any, *names: str) -> Iterator[None]:
    """Count the calls of some functions of `owner`."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(owner, name, counting(counts, name, getattr(owner, name))))
        yield


def counting(counts: Counter[str], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        return real(*args, **options)

    return call


def test_a_step_takes_one_forward_and_one_backward_pass_without_autograd(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    # 4 of 8 clients with 40 examples each: 3 batches of 16 or fewer, twice, in each of two rounds.
    with counted(counts, TracedModel, "forward", "backward"), counted(counts, torch.Tensor, "backward"):
        federation(tmp_path).run()
    assert counts == {"forward": 2 + 48, "backward": 2 + 2 + 48}  # with a trial of two passes of either kind
    counts.clear()
    with counted(counts, torch.autograd, "grad"):
        federation(tmp_path, name="again").run()
    assert not counts  # nor does the loss need it


def profiled(output: Path, rounds: int, epochs: int) -> tuple[Counter[str], Counter[int]]:
    """Return how often each operation of torch ran in a run, and how often memory of each size was taken."""
    local, never = LocalConfig(batch_size=16, epochs=epochs), EvaluationConfig(every=rounds)
    run = federation(output, local=local, rounds=rounds, evaluation=never, model=ModelConfig(name="2nn"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.run()
    events: Any = profiler.profiler
    found = events.kineto_results.events()
    taken = [event.nbytes() for event in found if event.name() == "[memory]" and event.nbytes() > 0]
    names = (event.name().removeprefix("aten::") for event in found if event.name().startswith("aten::"))
    return Counter(names), Counter(taken)


def test_a_step_takes_few_operations_and_a_client_memory_for_its_update_alone(tmp_path: Path) -> None:
    few, sizes = profiled(tmp_path / "few", rounds=2, epochs=1)
    _, more_sizes = profiled(tmp_path / "many", rounds=4, epochs=1)
    longer, _ = profiled(tmp_path / "longer", rounds=2, epochs=3)
    # Of each of two more rounds with four clients: their updates, and the server's mean.
    assert more_sizes[4 * PARAMETERS] - sizes[4 * PARAMETERS] == 2 * (4 + 1)
    assert not any(count > 4 * PARAMETERS for count in more_sizes - sizes)
    # Of each of three steps of four clients in two rounds, twice more: three layers, and the loss.
    steps = 2 * 3 * 4 * 2
    per_step = {name: (longer[name] - few[name]) / steps for name in longer}
    computing = {
        **{"linear": 3, "relu": 2, "threshold_backward": 2, "mm": 2, "addmm_": 3, "addmv_": 3},
        **{"log_softmax": 1, "exp_": 1, "scatter_": 1},
    }
    assert {name: per_step[name] for name in computing} == computing
    passes_over_vectors = ("zero_", "add_", "mul_", "sub", "clone", "_to_copy")
    assert all(per_step.get(name, 0) < 1 for name in passes_over_vectors), "once for all batches at most"


def test_only_the_batches_that_local_steps_uses_are_read(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    read: list[int] = []
    with counted(counts, torch.Tensor, "index_select"):
        real = torch.Tensor.index_select

        def select(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
            read.append(len(index))
            return real(tensor, dim, index)

        with mock.patch.object(torch.Tensor, "index_select", select):
            federation(tmp_path, local=LocalConfig(batch_size=8, steps=2), rounds=1).run()
    training = read[:8]  # pixels and labels of 4 clients, then those of the test set
    assert training == [16] * 8


def collectives_of_rounds(output: str, small: int) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Return the collectives of five rounds and the model, where sums of `small` elements travel along."""
    counts: Counter[str] = Counter()
    names = ("all_reduce", "broadcast", "all_gather_object", "barrier", "send", "recv")
    per_run = []
    for rounds in (3, 8):
        counts.clear()
        with counted(counts, dist, *names), mock.patch.object(mean, "SMALL", small):
            result = federation(Path(output) / str(rounds), rounds=rounds).run()
        per_run.append(dict(counts))
    few, many = per_run
    return {name: many.get(name, 0) - few.get(name, 0) for name in names}, result.model.state_dict()


def test_a_round_takes_three_collectives_and_four_with_large_sums(tmp_path: Path) -> None:
    # Of each of five rounds: the model; the sums with other numbers, or both apart; and metrics.
    expected = {"broadcast": 5, "all_gather_object": 0, "barrier": 0, "send": 0, "recv": 0}
    sums, models = PARAMETERS, []
    for small, reductions in [(mean.SMALL, 10), (sums, 10), (sums - 1, 15)]:
        ranks = run_world(collectives_of_rounds, str(tmp_path / str(small)), small, size=2)
        assert [counts for counts, _ in ranks] == [{"all_reduce": reductions, **expected}] * 2
        models.append(ranks[0][1])
    for name, values in models[0].items():
        assert all(torch.equal(values, other[name]) for other in models[1:])
