"""Baselines: clients that train alone, and one that holds the data of all, against plain torch loops."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references as ref
import rig
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from fedddp import (
    Callback,
    CheckpointConfig,
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    FeatureShift,
    Federation,
    LocalConfig,
    Result,
    load_config,
)
from fedddp.algorithms import FedAvg, FedBN, FedProx, LocalOnly
from fedddp.config.baselines import Baseline, baselines_of, examples_per_round
from fedddp.config.loader import to_yaml
from fedddp.data.datasets import Images, from_dataset, load
from fedddp.data.loader import ClientLoader
from fedddp.data.partition import Dirichlet, Split, holdout
from fedddp.data.targets import Boxes, Target
from fedddp.rng import stream
from fedddp.storage.history import read_rows
from fedddp.storage.judged import BASELINES
from fedddp.training.clients import PooledLoader

Indices = NDArray[np.int64]

DATA = DataConfig(clients=ref.CLIENTS, partition=Dirichlet(alpha=0.5, min_examples=3), holdout=0.2)
LOCALS = {
    "": rig.LOCAL,
    " with momentum": rig.MOMENTUM,
    " in steps": LocalConfig(steps=5, batch_size=4, lr=0.2),
    " with a step schedule": dataclasses.replace(rig.LOCAL, schedule="step", decay=0.5, decay_every=1),
    " with batch norm": rig.NORM,
}
# With no batch of one example, which batch norm refuses.
NORM = {"local": rig.NORM, "pooled": dataclasses.replace(rig.NORM, batch_size=6)}
CONFIGS = {
    f"{kind}{name}": rig.config_of(
        FedAvg(lr=0.3), NORM[kind] if "norm" in name else local, "norm" in name, baseline=kind, data=DATA
    )
    for kind in ("local", "pooled")
    for name, local in LOCALS.items()
}


@functools.cache
def trained(groups: int, ranks: int, folder: str) -> dict[str, rig.Trained]:
    return rig.train_in_world(CONFIGS, groups, ranks, f"{folder}/{groups}x{ranks}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


def parts_of(config: Config) -> list[Indices]:
    """Return what every client trains on, in a federated run too."""
    labels = np.array(ref.Pixels().targets)
    split = config.data.partition.split(labels, ref.CLIENTS, config.seed)
    return [holdout(split.indices(k), 0.2, k, config.seed)[0] for k in range(ref.CLIENTS)]


def batches(
    config: Config, client: int, round_index: int, indices: Indices, steps: int | None
) -> Iterator[Indices]:
    """Yield the batches of one round: shuffled passes, cut into pieces."""
    taken = 0
    for epoch in range(config.local.epochs if steps is None else steps):
        shuffled = stream("batches", config.seed, round_index, client, epoch).permutation(indices)
        for start in range(0, len(shuffled), config.local.batch_size):
            if taken == steps:
                return
            yield shuffled[start : start + config.local.batch_size]
            taken += 1


def sgd(
    config: Config, client: int, indices: Indices, steps: int | None, norm: bool
) -> tuple[Tensor, Tensor]:
    """Return the parameters and the float buffers of plain torch SGD, in float64; rounds leave no trace."""
    images = from_dataset(ref.Pixels())
    assert images.pixels is not None
    x = (images.pixels.double() / 255 - images.mean[0]) / images.std[0]
    y = torch.from_numpy(images.labels)
    net = ref.net(norm).double()
    optimizer = torch.optim.SGD(net.parameters(), config.local.lr, config.local.momentum)
    for round_index in range(ref.ROUNDS):
        if config.local.schedule == "step":
            optimizer.param_groups[0]["lr"] = config.local.lr * 0.5**round_index
        for batch in batches(config, client, round_index, indices, steps):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    floats = [b.flatten() for b in net.buffers() if b.is_floating_point()]
    return parameters_to_vector(net.parameters()).detach(), torch.cat(floats) if floats else torch.empty(
        0
    ).double()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("local")])
@pytest.mark.parametrize(("groups", "ranks"), rig.WORLDS)
def test_a_client_alone_is_plain_sgd_on_its_own_data(name: str, groups: int, ranks: int, folder: str) -> None:
    config, norm = CONFIGS[name], rig.has_norm(name)
    model, kept = trained(groups, ranks, folder)[name]
    start = parameters_to_vector(ref.net(norm).parameters()).detach()
    assert torch.equal(model[: len(start)], start), "there is no global model"
    assert set(kept) == set(range(ref.CLIENTS)), "every client trains, whatever the cohort"
    for client, indices in enumerate(parts_of(config)):
        params, buffers = sgd(config, client, indices, config.local.steps, norm)
        torch.testing.assert_close(kept[client]["params"].double(), params, rtol=0, atol=2e-6)
        torch.testing.assert_close(kept[client]["buffers"].double(), buffers, rtol=0, atol=2e-6)
        assert (params - start).norm() > 0.05


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("pooled")])
@pytest.mark.parametrize(("groups", "ranks"), rig.WORLDS)
def test_pooled_training_is_plain_sgd_on_the_union(name: str, groups: int, ranks: int, folder: str) -> None:
    config, norm = CONFIGS[name], rig.has_norm(name)
    parts = parts_of(config)
    steps = None
    if config.local.steps:  # as many examples as five steps of each: whole passes, and a last one in part
        size, examples = config.local.batch_size, 0
        for part in parts:
            passes = [len(part[i : i + size]) for i in range(0, len(part), size)] * config.local.steps
            examples += sum(passes[: config.local.steps])
        steps = round(examples / size)
    params, buffers = sgd(config, 0, np.concatenate(parts), steps, norm)
    model, _ = trained(groups, ranks, folder)[name]
    torch.testing.assert_close(model.double(), torch.cat([params, buffers]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_do_not_depend_on_the_number_of_groups(name: str, folder: str) -> None:
    for ranks in (1, 2):
        rig.assert_same_bits(*(trained(groups, ranks, folder)[name] for groups in (1, 2)))


def test_clients_alone_that_are_stopped_within_a_round_resume_to_the_same_bits(folder: str) -> None:
    config = {"local": CONFIGS["local with momentum"]}
    resumed = rig.train_in_world(config, 1, 1, f"{folder}/resumed", stop=True)
    rig.assert_same_bits(resumed["local"], trained(2, 1, folder)["local with momentum"])


# ---- whole runs ----

BASE = Config(
    data=DataConfig(dataset="digits", clients=5, holdout=0.25, examples=200),
    local=LocalConfig(epochs=2, batch_size=10, lr=0.05, momentum=0.5),
    cohort=CohortConfig(size=5),
    evaluation=EvaluationConfig(clients=4, every=2),
    checkpoint=CheckpointConfig(every=2),
    tracking=rig.config_of(FedAvg(), rig.LOCAL).tracking,
    rounds=4,
)


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class Stop(Callback):
    """Ends the run as a kill does, after a round."""

    def on_round_end(self, round: int, metrics: dict[str, Any], model: nn.Module) -> None:
        if round == 3:
            raise KeyboardInterrupt


def config_of(output: Path, baseline: Baseline, **changes: Any) -> Config:
    places: dict[str, Any] = {"output": str(output), "name": baseline, "resume": "auto"}
    return dataclasses.replace(BASE, baseline=baseline, **places, **changes)


def run(output: Path, baseline: Baseline, *callbacks: Callback, **changes: Any) -> Result:
    return Federation(config_of(output, baseline, **changes), module=net(), callbacks=callbacks).run()


def test_both_take_as_many_passes_as_the_federated_run_and_test_on_the_same_examples(tmp_path: Path) -> None:
    kinds: tuple[Baseline, ...] = ("none", "local", "pooled")
    results = {kind: run(tmp_path, kind) for kind in kinds}
    histories = {kind: result.history for kind, result in results.items()}
    for federated, *others in zip(*histories.values(), strict=True):
        assert {row["train/examples"] for row in others} == {federated["train/examples"]}
        assert {row[f"bytes/{way}"] for row in others for way in ("up", "down")} == {0}
    rows = {kind: read_rows(result.folder / "clients.jsonl") for kind, result in results.items()}
    tested = {k: [(row["round"], row["client"], row["examples"]) for row in rows[k]] for k in kinds}
    assert tested["none"] == tested["local"] == tested["pooled"]
    assert len(tested["none"]) == 2 * 4
    assert "eval/accuracy" in histories["pooled"][-1]
    assert (results["pooled"].folder / "evaluation.json").exists()
    assert not any(key.startswith("eval/") for row in histories["local"] for key in row)
    assert not (results["local"].folder / "evaluation.json").exists()
    assert all("clients/accuracy_mean" in history[-1] for history in histories.values())


def test_each_client_alone_is_measured_with_its_own_model(tmp_path: Path) -> None:
    result = run(tmp_path, "local", evaluation=EvaluationConfig())
    rows = read_rows(result.folder / "clients.jsonl")[-5:]
    assert [row["client"] for row in rows] == list(range(5)), "all of them, where no number is given"
    config = BASE
    train, _ = load(config.data)
    assert train.pixels is not None
    x = (train.pixels.double() / 255 - train.mean[0]) / train.std[0]
    states = load_file(result.folder / "checkpoints" / "round-00004" / "clients-00000.safetensors")
    split, _ = config.data.split(train, config.seed)
    accuracies = []
    for row in rows:
        mine = holdout(split.indices(row["client"]), 0.25, row["client"], config.seed)[1]
        params = states[f"{row['client']}.params"].double()
        logits = x[mine].flatten(1) @ params[:640].view(10, 64).T + params[640:]
        accuracies.append(float((logits.argmax(1).numpy() == train.labels[mine]).mean()))
        assert row["accuracy"] == pytest.approx(accuracies[-1])
    assert result.history[-1]["clients/accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert len(set(accuracies)) > 1


@pytest.mark.parametrize("baseline", ["local", "pooled"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, baseline: Baseline) -> None:
    uncut = run(tmp_path / "uncut", baseline)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", baseline, Stop())
    resumed = run(tmp_path / "cut", baseline)
    last = Path("checkpoints", "round-00004")
    for file in (Path("model.safetensors"), last / "clients-00000.safetensors"):
        assert (resumed.folder / file).read_bytes() == (uncut.folder / file).read_bytes()
    plain = [
        [{key: value for key, value in row.items() if "time" not in key} for row in result.history]
        for result in (resumed, uncut)
    ]
    assert plain[0] == plain[1]
    other = dataclasses.replace(config_of(tmp_path / "cut", baseline), baseline="none")
    with pytest.raises(ConfigError, match=f"baseline: is none, but .* was started with {baseline}"):
        Federation(other, module=net()).run()


def test_local_steps_are_those_of_all_clients_together(tmp_path: Path) -> None:
    local = LocalConfig(steps=7, batch_size=8)
    federated, pooled = (run(tmp_path, kind, local=local).history[-1] for kind in ("none", "pooled"))
    assert abs(pooled["train/examples"] - federated["train/examples"]) < 8
    assert pooled["train/steps"] > 5 * federated["train/steps"] / 7


def test_a_client_alone_that_diverges_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="client"):
        run(tmp_path, "local", local=LocalConfig(lr=3e38, epochs=3, momentum=0.9))


def test_without_a_global_model_runs_are_judged_by_their_clients(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"evaluation": EvaluationConfig(stop_after=2), "local": LocalConfig(lr=1e-9)}
    assert len(run(tmp_path / "a", "local", **settings).history) == 3, "no client gets better"
    best = CheckpointConfig(best="clients/accuracy_mean")
    folder = run(tmp_path / "c", "local", checkpoint=best, **settings).folder
    assert {path.name for path in folder.glob("best*")} == {"best.safetensors", "best-clients"}
    with pytest.raises(ConfigError, match="do not have eval/accuracy; .* one of clients/accuracy_mean"):
        run(tmp_path / "b", "local", checkpoint=CheckpointConfig(best="eval/accuracy"))


# ---- feature shift ----


def images_with(target: Target) -> Images:
    """Return four images with targets of a kind, of clients 0, 1, 0, 1."""
    images = from_dataset(ref.Pixels())
    generator = torch.Generator().manual_seed(5)
    planes = torch.randint(256, (4, 1 + (target == "mask"), 8, 8), dtype=torch.uint8, generator=generator)
    boxes = Boxes.join([(torch.tensor([[1.0, 1, 4, 3 + i]]), torch.tensor([i])) for i in range(4)])
    return dataclasses.replace(
        images,
        labels=np.arange(4) % 3,
        shape=(1, 8, 8),
        pixels=planes,
        target=target,
        boxes=boxes if target == "boxes" else None,
        multilabels=torch.eye(4)[:, :3] if target == "multilabel" else None,
    )


@pytest.mark.parametrize("target", ["class", "multilabel", "mask", "boxes"])
def test_pooled_images_have_the_feature_shift_of_the_client_they_are_from(target: Target) -> None:
    images = images_with(target)
    shift = FeatureShift(rotation=0.0 if target == "boxes" else 90.0, color=0.5, noise=0.2)
    data, split = DataConfig(feature_shift=shift), Split(np.array([0, 2, 1, 3]), np.array([0, 2, 4]))
    cpu = torch.device("cpu")
    pooled = PooledLoader(images, data, cpu, seed=3, split=split)
    (batch,) = pooled.batches(np.arange(4), 4, client=0)
    for client in (0, 1):
        own = np.array([client, client + 2])
        (expected,) = ClientLoader(images, data, cpu, seed=3).batches(own, 2, client=client)
        assert torch.equal(batch.images[own], expected.images)
        if isinstance(expected.targets, Boxes):
            assert isinstance(batch.targets, Boxes)
            for place, image in enumerate(own.tolist()):
                assert all(map(torch.equal, batch.targets.of(image), expected.targets.of(place)))
        else:
            assert isinstance(batch.targets, Tensor)
            assert torch.equal(batch.targets[own], expected.targets)
    assert not torch.equal(batch.images[0], batch.images[1])


# ---- the setting ----


@pytest.mark.parametrize("baseline", ["local", "pooled"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--algorithm FedBuff", "algorithm=FedBuff is asynchronous; leave it out"),
        ("--attacks SignFlip", "attacks=SignFlip is of malicious clients"),
        ("--aggregation Krum", "aggregation=Krum is of clients' updates"),
        ("--aggregation.clip_norm 1", "aggregation.clip_norm=1.0 is of clients' updates"),
        ("--algorithm FedBuff --replay runs/x", "replay=runs/x repeats arrivals"),
    ],
)
def test_settings_of_a_federation_are_refused(baseline: Baseline, flags: str, words: str) -> None:
    line = f"baseline={baseline} trains without a federation, but {words}"
    with pytest.raises(ConfigError, match=line) as refused:
        load_config(None, ["--baseline", baseline, "--data.holdout", "0.2", *flags.split()])
    assert "\n" not in str(refused.value)


def test_clients_alone_need_data_of_their_own_to_be_tested_on() -> None:
    with pytest.raises(ConfigError, match=r"but data.holdout=0; set data.holdout, e.g. 0.2"):
        load_config("digits", ["--baseline", "local", "--data.holdout", "0", "--evaluation.clients", "0"])


def test_local_only_is_no_algorithm_of_its_own() -> None:
    with pytest.raises(ConfigError, match="baseline=local trains"):
        Config(algorithm=LocalOnly())
    with pytest.raises(ConfigError, match="unknown name 'LocalOnly'"):
        load_config(None, ["--algorithm", "LocalOnly"])


@pytest.mark.parametrize("algorithm", ["FedProx", "SCAFFOLD", "FedBN", "LocalSGD", "FedAdam", "QFedAvg"])
def test_any_synchronous_configuration_has_both(algorithm: str) -> None:
    config = load_config("digits", ["--algorithm", algorithm, "--data.holdout", "0.2"])
    found = baselines_of(config)
    assert list(found) == ["local-only", "pooled"]
    for baseline in found.values():
        assert dataclasses.replace(baseline, baseline="none") == config, "they differ in one setting"
        assert build_again(baseline) == baseline
    assert BASELINES == {"local": "local only", "pooled": "pooled"}


def build_again(config: Config) -> Config:
    Path("again.yaml").write_text(to_yaml(config))
    return load_config("again.yaml")


def test_a_baseline_of_a_comparison_keeps_the_metrics_that_it_has() -> None:
    best = ["eval/accuracy", "clients/accuracy_worst10"]
    config = dataclasses.replace(BASE, checkpoint=CheckpointConfig(best=best))
    found = baselines_of(config)
    assert found["local-only"].checkpoint.metrics == ["clients/accuracy_worst10"]
    assert found["pooled"].checkpoint.metrics == best


def test_the_examples_of_a_round_are_those_of_the_cohort_or_of_all() -> None:
    sizes = np.array([10, 20, 60])
    data, local = DataConfig(clients=3, holdout=0.1), LocalConfig(epochs=2)
    config = Config(cohort=CohortConfig(size=2), data=data, local=local)
    assert examples_per_round(config, sizes) == 2 * 60
    for baseline in baselines_of(config).values():
        assert examples_per_round(baseline, sizes) == 2 * 90


@pytest.mark.parametrize("algorithm", [FedProx(mu=3.0), FedBN()])
@pytest.mark.parametrize("baseline", ["local", "pooled"])
def test_the_algorithm_has_no_effect(tmp_path: Path, algorithm: FedAvg, baseline: Baseline) -> None:
    plain = run(tmp_path / "plain", baseline, rounds=2)
    other = run(tmp_path / "other", baseline, rounds=2, algorithm=algorithm, cohort=CohortConfig(size=2))
    checkpoint = Path("checkpoints", "round-00002", "clients-00000.safetensors")
    assert (other.folder / checkpoint).read_bytes() == (plain.folder / checkpoint).read_bytes()
    weights = [r.model.state_dict().values() for r in (plain, other)]
    assert all(map(torch.equal, *weights))
    assert math.isfinite(plain.history[-1]["train/loss"])
