"""The best model is kept, and a run that no longer improves ends early; both survive a resume."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedddp import (
    Callback,
    CheckpointConfig,
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    Federation,
    LocalConfig,
    Result,
    TrackingConfig,
    load_config,
)
from fedddp.algorithms import FedBuff
from fedddp.config.loader import to_yaml
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.storage.checkpoint import save_tensors
from fedddp.storage.client_states import ClientStates
from fedddp.storage.history import read_rows
from fedddp.testing import run_world
from fedddp.training.best import Best, BestModels, drop_newer

DRAW = torch.Generator().manual_seed(3)
TRAIN, TEST = (
    TensorDataset(torch.rand(n, 1, 4, 4, generator=DRAW), torch.randint(4, (n,), generator=DRAW))
    for n in (120, 40)
)
"""Labels of chance: the accuracy on the test set goes up and down."""

BASE = Config(
    data=DataConfig(clients=6, holdout=0.2),
    local=LocalConfig(batch_size=10, lr=0.5),
    cohort=CohortConfig(size=3),
    evaluation=EvaluationConfig(every=1, clients=2),
    checkpoint=CheckpointConfig(every=3, best="eval/accuracy"),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=12,
)


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


class Collect(Callback):
    """Keeps a copy of the model of every round."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}

    def on_round_end(self, round: int, metrics: dict[str, Any], model: nn.Module) -> None:
        self.states[round] = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(output: Path, *, collect: Collect | None = None, **changes: Any) -> Result:
    config = dataclasses.replace(BASE, **{"output": str(output), "name": "run", "resume": "auto", **changes})
    callbacks = [collect] if collect else []
    return Federation(config, module=net(), train=TRAIN, test=TEST, callbacks=callbacks).run()


def best_round(history: list[dict[str, Any]], metric: str) -> int:
    """Return the first round with the best value, the plain way."""
    sign = -1 if metric.endswith("loss") else 1
    values = [(sign * row[metric], -row["round"]) for row in history if row.get(metric) is not None]
    return -int(max(values)[1])


@pytest.mark.parametrize(
    "metric", ["eval/accuracy", "eval/loss", "clients/accuracy_worst10", "clients/accuracy_std"]
)
def test_the_file_holds_the_first_model_with_the_best_value(tmp_path: Path, metric: str) -> None:
    collect = Collect()
    result = train(tmp_path, collect=collect, checkpoint=CheckpointConfig(every=5, best=metric))
    expected = best_round(result.history, metric)
    assert 1 <= expected < 12, "the last model must not be the best one, or the test sees nothing"
    with safe_open(result.folder / "best.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    assert int(metadata["round"]) == expected
    assert float(metadata["value"]) == result.history[expected - 1][metric]
    assert metadata["metric"] == metric
    with safe_open(result.folder / "model.safetensors", framework="pt") as opened:
        shared = opened.metadata()
    assert {name: metadata[name] for name in shared} == shared
    kept = load_file(result.folder / "best.safetensors")
    assert kept.keys() == collect.states[expected].keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in collect.states[expected].items())


SEVERAL = ["clients/accuracy_worst10", "eval/loss", "eval/accuracy"]
FILES = dict(
    zip(SEVERAL, [f"best{end}.safetensors" for end in ("", "-eval-loss", "-eval-accuracy")], strict=True)
)


def test_each_of_several_metrics_has_a_file_with_its_first_best_model(tmp_path: Path) -> None:
    collect = Collect()
    result = train(tmp_path, collect=collect, checkpoint=CheckpointConfig(every=5, best=SEVERAL))
    rounds = {metric: best_round(result.history, metric) for metric in SEVERAL}
    assert len(set(rounds.values())) > 1, "the metrics must differ, or the test sees nothing"
    assert {path.name for path in result.folder.glob("best*")} == set(FILES.values())
    for metric, file in FILES.items():
        with safe_open(result.folder / file, framework="pt") as opened:
            metadata = opened.metadata()
        assert (metadata["metric"], int(metadata["round"])) == (metric, rounds[metric])
        assert float(metadata["value"]) == result.history[rounds[metric] - 1][metric]
        kept = load_file(result.folder / file)
        assert all(torch.equal(kept[name], t) for name, t in collect.states[rounds[metric]].items())


def test_the_first_of_several_metrics_is_kept_as_if_it_were_the_only_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"evaluation": EvaluationConfig(stop_after=3, clients=2)}
    one = train(tmp_path / "one", checkpoint=CheckpointConfig(best=SEVERAL[0]), **settings)
    three = train(tmp_path / "three", checkpoint=CheckpointConfig(best=SEVERAL), **settings)
    listed = train(tmp_path / "listed", checkpoint=CheckpointConfig(best=SEVERAL[:1]), **settings)
    assert len(one.history) == len(three.history) == len(listed.history) < 12
    files = [(result.folder / "best.safetensors").read_bytes() for result in (one, three, listed)]
    assert files[0] == files[1] == files[2]
    assert [path.name for path in listed.folder.glob("best*")] == ["best.safetensors"]


def test_without_a_metric_no_best_model_is_kept(tmp_path: Path) -> None:
    result = train(tmp_path, checkpoint=CheckpointConfig(), rounds=2)
    assert not (result.folder / "best.safetensors").exists()


def plain_stop(values: list[float], every: int, patience: int) -> int:
    """Return the round after which a run ends, from its value after each round."""
    best, since = -math.inf, 0
    for number in range(every, len(values) + 1, every):
        if values[number - 1] > best:
            best, since = values[number - 1], number
        elif number - since >= patience:
            return number
    return len(values)


@pytest.mark.parametrize(("every", "patience"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 4), (1, 99)])
def test_a_run_ends_after_so_many_rounds_without_a_better_value(
    tmp_path: Path, every: int, patience: int, caplog: pytest.LogCaptureFixture
) -> None:
    values = [row["eval/accuracy"] for row in train(tmp_path / "all").history]
    expected = plain_stop(values, every, patience)
    evaluation = EvaluationConfig(every=every, stop_after=patience)
    with caplog.at_level(logging.INFO, "fedddp"):
        result = train(tmp_path / "early", evaluation=evaluation, checkpoint=CheckpointConfig(every=5))
    assert result.finished
    assert len(result.history) == expected
    assert [row.get("eval/accuracy") is not None for row in result.history] == [
        number % every == 0 or number == 12 for number in range(1, expected + 1)
    ]
    assert (f"the run ends after round {expected}" in caplog.text) == (expected < 12)
    assert (result.folder / "model.safetensors").exists()
    again = train(tmp_path / "early", evaluation=evaluation, checkpoint=CheckpointConfig(every=5))
    assert again.finished
    assert again.history == result.history, "a run that ended early has nothing left to train"
    more = dataclasses.replace(evaluation, stop_after=0)
    longer = train(tmp_path / "early", evaluation=more, checkpoint=CheckpointConfig(every=5))
    assert len(longer.history) == 12, "without the limit it continues"


class Stop(Callback):
    """Ends the run as a kill does, after a round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_round_end(self, round: int, metrics: dict[str, Any], model: nn.Module) -> None:
        if round == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("killed_after", [4, 5, 7, 8])
def test_a_killed_run_keeps_the_same_best_model_and_ends_in_the_same_round(
    tmp_path: Path, killed_after: int
) -> None:
    settings: dict[str, Any] = {"evaluation": EvaluationConfig(stop_after=5)}
    whole = train(tmp_path / "whole", **settings)
    config = dataclasses.replace(BASE, output=str(tmp_path / "cut"), name="run", resume="auto", **settings)
    parts: dict[str, Any] = {"module": net(), "train": TRAIN, "test": TEST}
    with pytest.raises(KeyboardInterrupt):
        Federation(config, callbacks=[Stop(killed_after)], **parts).run()
    resumed = Federation(config, **parts).run()
    assert len(resumed.history) == len(whole.history)
    for file in ("best.safetensors", "model.safetensors"):
        assert (resumed.folder / file).read_bytes() == (whole.folder / file).read_bytes()


@pytest.mark.parametrize("killed_after", [4, 5, 8])
def test_a_killed_run_keeps_the_same_best_models_by_every_metric(tmp_path: Path, killed_after: int) -> None:
    settings: dict[str, Any] = {"checkpoint": CheckpointConfig(every=3, best=SEVERAL), "rounds": 9}
    uncut = train(tmp_path / "uncut", **settings)
    config = dataclasses.replace(BASE, output=str(tmp_path / "cut"), name="run", resume="auto", **settings)
    parts: dict[str, Any] = {"module": net(), "train": TRAIN, "test": TEST}
    with pytest.raises(KeyboardInterrupt):
        Federation(config, callbacks=[Stop(killed_after)], **parts).run()
    resumed = Federation(config, **parts).run()
    for file in FILES.values():
        assert (resumed.folder / file).read_bytes() == (uncut.folder / file).read_bytes()


def test_a_metric_that_becomes_another_one_s_file_is_compared_from_the_resume_on(tmp_path: Path) -> None:
    """What best.safetensors holds is not the best by a metric that another file was for."""
    still: dict[str, Any] = {"local": LocalConfig(batch_size=10, lr=1e-9)}
    two = ["eval/accuracy", "eval/loss"]
    train(tmp_path, checkpoint=CheckpointConfig(best=two), rounds=2, **still)
    folder = train(tmp_path, checkpoint=CheckpointConfig(best=two[::-1]), rounds=4, **still).folder
    for file, metric in (("best.safetensors", two[1]), ("best-eval-accuracy.safetensors", two[0])):
        with safe_open(folder / file, framework="pt") as opened:
            assert (opened.metadata()["metric"], opened.metadata()["round"]) == (metric, "3")


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("[eval/iou, eval/dice]", ["eval/iou", "eval/dice"]),
        ("eval/accuracy", ["eval/accuracy"]),
        ("none", []),
        ("[]", []),
    ],
)
def test_one_metric_or_several_are_given_by_a_flag(flag: str, expected: list[str]) -> None:
    config = load_config(None, ["--checkpoint.best", flag])
    assert config.checkpoint.metrics == expected
    Path("again.yaml").write_text(to_yaml(config))
    assert load_config("again.yaml") == config


def test_a_metric_that_stands_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="checkpoint.best names eval/loss twice"):
        load_config(None, ["--checkpoint.best", "[eval/loss, eval/accuracy, eval/loss]"])


def train_in_world(output: str, asynchronous: bool) -> None:
    changes: dict[str, Any] = {"algorithm": FedBuff(buffer_size=2)} if asynchronous else {}
    train(Path(output), evaluation=EvaluationConfig(stop_after=2, clients=2), **changes)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_all_ranks_end_in_the_same_round(tmp_path: Path, asynchronous: bool) -> None:
    for size in (1, 2):
        run_world(train_in_world, str(tmp_path / str(size)), asynchronous, size=size)
    one, two = (tmp_path / size / "run" for size in ("1", "2"))
    assert len(read_rows(one / "history.jsonl")) == len(read_rows(two / "history.jsonl")) < 12
    assert (one / "best.safetensors").read_bytes() == (two / "best.safetensors").read_bytes()
    assert json.loads((two / "run.json").read_text())["state"] == "finished"


def test_a_value_that_is_no_number_is_never_the_best() -> None:
    best = Best("eval/loss")
    assert not best.update({"eval/loss": math.nan}, 1)
    assert best.evaluated == 1
    assert not best.update({}, 2)
    assert best.evaluated == 1, "nothing was measured"
    assert not best.update({"eval/loss": None}, 3)
    assert best.update({"eval/loss": 2.0}, 4)
    assert not best.update({"eval/loss": math.nan}, 5)
    assert not best.update({"eval/loss": 2.0}, 6), "an equal value is no better one"
    assert best.update({"eval/loss": 1.5}, 7)
    assert (best.value, best.round, best.evaluated) == (1.5, 7, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": {"best": "train/loss"}}, "checkpoint.best=train/loss is no metric of an evaluation"),
        ({"checkpoint": {"best": "eval/acuracy"}}, "do not have eval/acuracy; .* eval/accuracy"),
        ({"checkpoint": {"best": ["eval/loss", "train/loss"]}}, "best=train/loss is no metric of an"),
        ({"checkpoint": {"best": ["eval/loss", "eval/dice"]}}, "best=eval/dice: .* do not have eval/dice"),
        ({"checkpoint": {"best": "eval/recall"}}, "do not have eval/recall"),
        ({"evaluation": {}, "checkpoint": {"best": "clients/accuracy_mean"}}, "do not have clients/accuracy"),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    sections: dict[str, Any] = {
        "evaluation": EvaluationConfig(**changes.get("evaluation", {"clients": 2})),
    }
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, checkpoint=CheckpointConfig(**changes["checkpoint"]), **sections)
    assert not (tmp_path / "run" / "history.jsonl").exists()


class Diverges(nn.Module):
    """Its loss is no number after the first round."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        assert isinstance(self.steps, Tensor)
        if self.training:
            self.steps += 1
        logits: Tensor = self.layer(images.flatten(1))
        return logits if self.training or self.steps < 5 else logits * math.nan


def test_a_loss_that_is_no_number_any_more_ends_the_run(tmp_path: Path) -> None:
    config = dataclasses.replace(
        BASE,
        output=str(tmp_path),
        checkpoint=CheckpointConfig(best="eval/loss"),
        evaluation=EvaluationConfig(stop_after=3),
    )
    result = Federation(config, module=Diverges(), train=TRAIN, test=TEST).run()
    finite = [row["round"] for row in result.history if row["eval/loss"] is not None]
    assert finite
    assert len(result.history) == best_round(result.history, "eval/loss") + 3 < 12


def test_a_best_model_that_was_never_kept_is_looked_for_anew(tmp_path: Path) -> None:
    still: dict[str, Any] = {
        "local": LocalConfig(batch_size=10, lr=1e-9),
        "evaluation": EvaluationConfig(stop_after=50),
    }
    train(tmp_path, checkpoint=CheckpointConfig(), rounds=2, **still)
    folder = train(tmp_path, checkpoint=CheckpointConfig(best="eval/accuracy"), rounds=4, **still).folder
    with safe_open(folder / "best.safetensors", framework="pt") as opened:
        assert opened.metadata()["round"] == "3"


def test_a_resume_of_a_run_that_ended_early_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = EvaluationConfig(stop_after=1)
    done = len(train(tmp_path, evaluation=evaluation).history)
    with caplog.at_level(logging.INFO, "fedddp"):
        assert len(train(tmp_path, evaluation=evaluation, rounds=50).history) == done
    assert f"evaluation.stop_after=1 ended this run after round {done}; raise it" in caplog.text


def test_without_test_data_there_is_nothing_to_stop_by(tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, checkpoint=CheckpointConfig(), output=str(tmp_path))
    config = dataclasses.replace(config, evaluation=EvaluationConfig(stop_after=2))
    with pytest.raises(ConfigError, match=r"evaluation.stop_after: .* give test data"):
        Federation(config, module=net(), train=TRAIN).run()


def test_best_models_of_rounds_that_the_run_lost_are_deleted(tmp_path: Path) -> None:
    """A process that is killed may have written the best model, but not the checkpoint of its round."""
    for lost, metadata in ((False, {"round": "3"}), (True, {"round": "4"})):
        save_tensors({"x": torch.zeros(1)}, tmp_path / "best.safetensors", metadata)
        drop_newer(tmp_path, 3)
        assert (tmp_path / "best.safetensors").exists() is not lost


def test_a_best_model_has_its_clients_beside_it_whenever_the_process_ends(tmp_path: Path) -> None:
    written: list[set[str]] = []
    world = connect(TopologyConfig())
    world.close()
    states, models = ClientStates(world), BestModels(["clients/a_mean"], kept=True)
    for number in (1, 2):
        states.kept = {0: {"x": torch.full((2,), float(number))}}
        better = models.update({"clients/a_mean": float(number)}, number)
        models.keep(nn.Linear(1, 1), better)
        models.keep_clients(states, better)
        with pytest.MonkeyPatch.context() as patch:

            def watched(*arguments: Any) -> None:
                written.append({path.name for path in (tmp_path / "best-clients").iterdir()})
                save_tensors(*arguments)

            patch.setattr("fedddp.training.best.save_tensors", watched)
            models.write(tmp_path, states, {})
    of_round = [f"clients-a_mean-0000{number}-00000.safetensors" for number in (1, 2)]
    assert written == [{of_round[0]}, {*of_round}], "the first is there until the second model is"
    assert [path.name for path in (tmp_path / "best-clients").iterdir()] == of_round[1:]
    assert load_file(tmp_path / "best-clients" / of_round[1])["0.x"].eq(2).all()
