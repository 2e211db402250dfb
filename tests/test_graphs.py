"""Clients that train by graphs train as eager ones.

A GPU records and replays them (`tests/gpu`). Here the passes themselves stand in for their recording: they
run again on the memory that they were recorded with. What is kept, copied and counted around them is real.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from test_traced import LOCAL, MODELS, MOMENTUM, assert_equal, images, trained
from torch import nn

from fedddp import CohortConfig, Config, DataConfig, Federation, LocalConfig, ModelConfig, TrackingConfig
from fedddp.algorithms import SCAFFOLD, Algorithm, Ditto, FedAvg, QFedAvg, ServerState
from fedddp.data.datasets import load
from fedddp.data.loader import ClientLoader
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.distributed.world import World
from fedddp.models.flat import FlatModel
from fedddp.models.trace import UnsupportedModelError
from fedddp.rng import global_states
from fedddp.section import ConfigError
from fedddp.tasks import Classification, MultiLabel, Segmentation
from fedddp.training import engine, graph_trainer
from fedddp.training.client_trainer import ClientJob, ClientTrainer, Parts
from fedddp.training.engine import make_trainer
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
    """Return what sets what stands in for `record`."""
    return lambda record: monkeypatch.setattr(graph_trainer, "record", record)


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


VARIANTS: dict[str, dict[str, Any]] = {
    "one image": {"local": dataclasses.replace(LOCAL, batch_size=1, epochs=1)},
    "three steps": {"local": dataclasses.replace(LOCAL, steps=3)},
    "clipped": {"local": dataclasses.replace(LOCAL, clip_norm=0.1)},
    "kept Adam": {"local": dataclasses.replace(LOCAL, optimizer="adam", optimizer_state="keep", lr=0.01)},
    "weight decay": {"local": dataclasses.replace(LOCAL, weight_decay=0.1)},
    "batches that no client fills": {"local": dataclasses.replace(LOCAL, batch_size=100)},
    "augmented": {"data": DataConfig(augment="crop-flip")},
    "smoothed": {"task": Classification(label_smoothing=0.1)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_batch_and_step_is_the_same_by_graphs(
    world: World, recording: Callable[[Record], None], name: str
) -> None:
    recording(run_again)
    graphs, eager = (
        trained(world, MODELS["convolutions"], kind, **VARIANTS[name])
        for kind in (GraphTrainer, ClientTrainer)
    )
    assert_equal(graphs, eager)


@pytest.mark.parametrize("target", ["multilabel", "mask"])
def test_other_targets_than_classes_are_replayed(
    world: World, recording: Callable[[Record], None], target: Literal["multilabel", "mask"]
) -> None:
    recording(run_again)
    config = DataConfig(dataset="scenes", examples=40, clients=1, image_size=24)
    examples = load(config, target)[0]
    whole: tuple[nn.Module, ...] = (nn.Flatten(), nn.Linear(3 * 24 * 24, examples.classes))
    layers = {"multilabel": whole, "mask": (nn.Conv2d(3, examples.classes, 1),)}[target]
    task = {"multilabel": MultiLabel(), "mask": Segmentation()}[target]
    results = []
    for kind in (GraphTrainer, ClientTrainer):
        torch.manual_seed(0)
        flat = FlatModel(nn.Sequential(*copy.deepcopy(layers)))
        loader = ClientLoader(examples, config, world.device, seed=3)
        trainer = kind(Parts(world, flat, task, loader, LOCAL, FedAvg(), 3))
        server = ServerState.of(flat, 1)
        job = ClientJob(client=0, round=0, indices=np.arange(30), weight=1.0, share=1.0, lr=0.1)
        result = trainer.train(server, job, {})
        results.append((result.update.vectors["update"].clone(), result.loss))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][0].any()


def test_the_passes_of_whole_batches_are_recorded_once(
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
    # Clients of 11, 24, 5 and 16 images have 1, 3, 0 and 2 batches of 8, in two epochs of two rounds each.
    assert counts == {"recorded": 1 + 1, "replayed": 2 + 4 * (1 + 3 + 0 + 2)}


def test_a_trial_leaves_all_as_it_was(world: World, recording: Callable[[Record], None]) -> None:
    recording(run_again)
    flat = FlatModel(nn.Sequential(MODELS["batch norm"](), nn.Dropout(0.5)))
    flat.grad.fill_(3.0)
    flat.module.eval()
    torch.manual_seed(5)
    vectors = [flat.params, flat.grad, flat.buffers, flat.integer_buffers]
    before, states = [vector.clone() for vector in vectors], global_states()
    trainer = graphs_of(world, flat)
    assert all(torch.equal(one, two) for one, two in zip(vectors, before, strict=True))
    assert global_states() == states
    assert (flat.module.training, trainer.loss_count, float(trainer.loss_sum)) == (False, 0, 0.0)


def twice(passes: Callable[[], None]) -> Callable[[], None]:
    def replay() -> None:
        passes()
        passes()

    return replay


def fail(passes: Callable[[], None]) -> Callable[[], None]:
    """Fail as torch does: in the passes, and again where recording ends."""
    try:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    finally:
        raise RuntimeError("capture was invalidated")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (lambda passes: lambda: None, "a replay of its passes computes something else"),
        (twice, "a replay of its passes computes something else"),
        (fail, "its passes cannot be recorded (operation not permitted when stream is capturing)"),
    ],
    ids=["nothing", "twice", "fails"],
)
def test_a_trial_refuses_what_is_not_replayed(
    world: World, recording: Callable[[Record], None], record: Record, reason: str
) -> None:
    recording(record)
    with pytest.raises(UnsupportedModelError, match=re.escape(reason)):
        graphs_of(world, FlatModel(MODELS["mlp"]()))


def graphs_of(world: World, flat: FlatModel) -> GraphTrainer:
    loader = ClientLoader(images(), DataConfig(), world.device, seed=3)
    return GraphTrainer(Parts(world, flat, Classification(), loader, LOCAL, FedAvg(), 3))


def test_the_trainer_that_is_asked_for_is_made_or_refused_in_one_line(
    world: World, recording: Callable[[Record], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(local=LocalConfig(engine="graph"))
    loader = ClientLoader(images(), DataConfig(), world.device, seed=3)
    monkeypatch.setattr(engine, "obstacle", lambda *_: "")  # which is that there is no GPU

    def made() -> ClientTrainer:
        return make_trainer(config, world, FlatModel(MODELS["mlp"]()), loader)

    recording(run_again)
    assert type(made()) is GraphTrainer
    recording(fail)
    reason = re.escape("its passes cannot be recorded (operation not permitted when stream is capturing)")
    with pytest.raises(ConfigError, match=f"^local.engine=graph cannot train this: {reason}; leave it out$"):
        made()
    world.group = None  # a dedicated coordinator, on its CPU
    assert type(made()) is ClientTrainer


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
