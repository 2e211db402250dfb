"""Clients that train by graphs train as eager ones.

A GPU records and replays them (`tests/gpu`). Here the passes themselves stand in for their recording: they
run again on the memory that they were recorded with. What is kept, copied and counted around them is real.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_traced import LOCAL, MODELS, MOMENTUM, assert_equal, images, trained
from torch import nn

from fedddp import CohortConfig, DataConfig, Federation, LocalConfig, ModelConfig, TrackingConfig
from fedddp.algorithms import SCAFFOLD, Algorithm, Ditto, FedAvg, QFedAvg
from fedddp.data.loader import ClientLoader
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.distributed.world import World
from fedddp.models.flat import FlatModel
from fedddp.models.trace import UnsupportedModelError
from fedddp.rng import global_states
from fedddp.section import ConfigError
from fedddp.tasks import Classification
from fedddp.training import graph_trainer
from fedddp.training.client_trainer import ClientTrainer
from fedddp.training.graph_trainer import GraphTrainer

Record = Callable[[Callable[[], None]], Callable[[], None]]


@pytest.fixture
def world() -> Iterator[World]:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        yield world


def run_again(passes: Callable[[], None]) -> Callable[[], None]:
    """Stand in for `Recorder.record`."""
    for _ in range(graph_trainer.WARM_UP):
        passes()
    return passes


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Callable[[Record], None]:
    """Return what sets what stands in for `Recorder.record`."""
    return lambda record: monkeypatch.setattr(
        graph_trainer, "Recorder", lambda: SimpleNamespace(record=record)
    )


@pytest.mark.parametrize("local", [LOCAL, MOMENTUM], ids=["sgd", "momentum"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_train_the_bits_of_eager_passes(
    world: World, recording: Callable[[Record], None], name: str, local: LocalConfig
) -> None:
    recording(run_again)
    graphs, eager = (
        trained(world, MODELS[name], kind, local=local) for kind in (GraphTrainer, ClientTrainer)
    )
    assert_equal(graphs, eager)
    assert not torch.equal(eager[0][0], eager[2][0])


@pytest.mark.parametrize("algorithm", [SCAFFOLD(), Ditto(), QFedAvg()], ids=lambda a: type(a).__name__)
def test_algorithms_that_change_gradients_models_and_weights_train_by_graphs(
    world: World, recording: Callable[[Record], None], algorithm: Algorithm
) -> None:
    recording(run_again)
    graphs, eager = (
        trained(world, MODELS["batch norm"], kind, algorithm=algorithm)
        for kind in (GraphTrainer, ClientTrainer)
    )
    assert_equal(graphs, eager)


def test_passes_are_recorded_once_for_each_number_of_images(
    world: World, recording: Callable[[Record], None]
) -> None:
    counts: Counter[str] = Counter()

    def counted(passes: Callable[[], None]) -> Callable[[], None]:
        counts["recorded"] += 1

        def replay() -> None:
            counts["replayed"] += 1
            passes()

        return replay

    recording(counted)
    trained(world, MODELS["mlp"], GraphTrainer)
    # Clients of 11, 24, 5 and 16 images in batches of 8, two epochs in each of two rounds; a trial of two.
    assert counts == {"recorded": 1 + 3, "replayed": 1 + 4 * (2 + 3 + 1 + 2)}


def test_a_trial_leaves_all_as_it_was(world: World, recording: Callable[[Record], None]) -> None:
    recording(run_again)
    trainer = graphs_of(world, nn.Sequential(MODELS["batch norm"](), nn.Dropout(0.5)))
    flat = trainer.flat
    flat.grad.fill_(3.0)
    flat.module.eval()
    torch.manual_seed(5)
    vectors = [flat.params, flat.grad, flat.buffers, flat.integer_buffers, trainer.loss_sum]
    before, states = [vector.clone() for vector in vectors], global_states()
    trainer.prepare()
    assert all(torch.equal(one, two) for one, two in zip(vectors, before, strict=True))
    assert global_states() == states
    assert (flat.module.training, trainer.loss_count) == (False, 0)


def twice(passes: Callable[[], None]) -> Callable[[], None]:
    def replay() -> None:
        passes()
        passes()

    return replay


def fail(passes: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (lambda passes: lambda: None, "a replay of its passes computes something else"),
        (twice, "a replay of its passes computes something else"),
        (
            fail,
            "its passes cannot be recorded (CUDA error: operation not permitted when stream is capturing)",
        ),
    ],
    ids=["nothing", "twice", "fails"],
)
def test_a_trial_refuses_what_is_not_replayed(
    world: World, recording: Callable[[Record], None], record: Record, reason: str
) -> None:
    recording(record)
    with pytest.raises(UnsupportedModelError, match=re.escape(reason)):
        graphs_of(world, MODELS["mlp"]()).prepare()


def graphs_of(world: World, module: nn.Module) -> GraphTrainer:
    torch.manual_seed(0)
    loader = ClientLoader(images(), DataConfig(), world.device, seed=3)
    return GraphTrainer(world, FlatModel(module), Classification(), loader, LOCAL, FedAvg(), seed=3)


def test_graphs_without_a_gpu_are_refused_in_one_line(tmp_path: Path) -> None:
    run = Federation(
        data=DataConfig(dataset="digits", clients=8, examples=320),
        cohort=CohortConfig(size=4),
        model=ModelConfig(name="lenet"),
        local=LocalConfig(engine="graph"),
        tracking=TrackingConfig(trackers=[], progress=False),
        topology=TopologyConfig(device="cpu"),
        output=str(tmp_path),
        rounds=1,
    )
    reason = "the clients do not train on a GPU"
    with pytest.raises(ConfigError, match=f"^local.engine=graph cannot train this: {reason}; leave it out$"):
        run.run()
