"""Secure aggregation in training: the same bits as without it, drop-outs, metrics, refusals."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from launching import try_without
from safetensors.torch import load_file
from test_resume import BASE as RESUMED
from test_resume import LOCALS, assert_same, interrupted, net, newest_states, run, train

from fedddp import (
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LocalConfig,
    TopologyConfig,
)
from fedddp.aggregation import CoordinateMedian, Mean
from fedddp.algorithms import (
    SCAFFOLD,
    Algorithm,
    AsyncSGD,
    FedAdam,
    FedAsync,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedDyn,
    FedNova,
    QFedAvg,
    ServerOptimizer,
)
from fedddp.config.loader import load_config
from fedddp.data.partition import IID, Dirichlet, PowerLaw
from fedddp.reporting.dry_run import dry_run
from fedddp.secure import SecAgg, SecAggPlus, SecureAggregation
from fedddp.secure.protocol import SecureSum
from fedddp.simulation.attacks import SignFlip
from fedddp.simulation.clock import SpeedTable, Virtual
from fedddp.storage.history import read_rows
from fedddp.testing import run_world
from fedddp.training import secure_round

STEPS = LocalConfig(batch_size=20, lr=0.1, steps=3)
BASE = dataclasses.replace(
    RESUMED,
    data=DataConfig(clients=7, partition=Dirichlet(alpha=0.5)),
    cohort=CohortConfig(size=5),
    evaluation=EvaluationConfig(every=2),
    local=STEPS,
    rounds=2,
)
ALGORITHMS: list[Algorithm] = [
    *(FedAvg(), FedAvgM(), FedAdam(), ServerOptimizer(), FedNova(), SCAFFOLD(), FedDyn(), QFedAvg(q=1.0)),
]
DROPPING = SecAgg(threshold=0.5, drop_before_shares=0.1, drop_before_update=0.1, drop_before_unmasking=0.1)


def configs(folder: Path) -> dict[str, Config]:
    """Return runs with secure aggregation, by name; the plain ones are called like theirs, with `plain`."""
    found = {
        f"{type(a).__name__}-SecAgg": dataclasses.replace(BASE, algorithm=a, secure_aggregation=SecAgg())
        for a in ALGORITHMS
    }
    plus = SecAggPlus(neighbours_per_client=2)
    found["FedAvg-SecAggPlus"] = dataclasses.replace(BASE, secure_aggregation=plus)
    found["attacked-SecAgg"] = dataclasses.replace(BASE, attacks=SignFlip(), secure_aggregation=SecAgg())
    late = Virtual(speed=SpeedTable(factors=[1.0] * 7, dropout=0.2), deadline_s=60.0)
    found["late-SecAgg"] = dataclasses.replace(BASE, clock=late, secure_aggregation=SecAgg(threshold=0.5))
    return {name: dataclasses.replace(config, output=str(folder)) for name, config in found.items()}


def train_both(folder: Path) -> None:
    """Train all of `configs` in this rank's world with secure aggregation."""
    for name, config in configs(folder).items():
        run(dataclasses.replace(config, name=name))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of `configs` without secure aggregation, with it, and with it in two groups."""
    folder = tmp_path_factory.mktemp("secure")
    train_both(folder / "one")
    for name, config in configs(folder / "plain").items():
        run(dataclasses.replace(config, name=name, secure_aggregation=None))
    run_world(train_both, folder / "two", size=2)
    return folder


@pytest.mark.parametrize("name", configs(Path()))
def test_the_model_has_the_bits_of_the_plain_run_for_any_number_of_groups(trained: Path, name: str) -> None:
    plain, one, two = (
        load_file(trained / kind / name / "model.safetensors") for kind in ("plain", "one", "two")
    )
    assert plain.keys() == one.keys() == two.keys()
    for key, tensor in plain.items():
        assert torch.equal(tensor, one[key]), key
        assert torch.equal(tensor, two[key]), key
    states = [newest_states(trained / kind / name) for kind in ("plain", "one", "two")]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
        assert torch.equal(tensor, states[2][key]), key


@pytest.mark.parametrize("name", configs(Path()))
def test_the_history_has_sums_and_no_client(trained: Path, name: str) -> None:
    plain, one, two = (read_rows(trained / kind / name / "history.jsonl") for kind in ("plain", "one", "two"))
    for ours, theirs, again in zip(one, plain, two, strict=True):
        assert theirs.keys() - ours.keys() == {"cohort"}
        assert ours.keys() - theirs.keys() == {"time/secure"}
        for key in theirs.keys() - {"cohort", "bytes/up", "bytes/down"}:
            if not key.startswith("time/"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
        assert ours["bytes/up"] == again["bytes/up"]
        assert ours["bytes/down"] == again["bytes/down"]
        assert 1.9 * theirs["bytes/up"] < ours["bytes/up"] < 3.5 * theirs["bytes/up"]
        assert 0 < ours["time/secure"] < ours["time/round"]
        assert ours["time/train"] > 0


def test_steps_that_differ_advance_integer_buffers_by_their_mean(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data": DataConfig(clients=3, partition=PowerLaw()),
        "cohort": CohortConfig(size=3),
    }
    local = LocalConfig(batch_size=20, lr=0.1)
    config = dataclasses.replace(BASE, **changes, local=local, rounds=1, output=str(tmp_path))
    plain = run(config)
    secure = run(dataclasses.replace(config, secure_aggregation=SecAgg()))
    theirs, ours, key = plain.model.state_dict(), secure.model.state_dict(), "body.2.num_batches_tracked"
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert differing == [key]
    steps = plain.history[-1]["train/steps"]
    assert (
        int(ours["body.2.num_batches_tracked"]) == -(-steps // 3) < int(theirs["body.2.num_batches_tracked"])
    )


def train_pair(config: Config) -> list[dict[str, Any]]:
    """Return the models of a run without and with secure aggregation, in this rank's world."""
    pair = (config, dataclasses.replace(config, secure_aggregation=SecAgg()))
    return [{k: v.clone() for k, v in run(one).model.state_dict().items()} for one in pair]


@pytest.mark.parametrize(
    "topology",
    [TopologyConfig(coordinator="dedicated"), TopologyConfig(ranks_per_client=2)],
    ids=["dedicated coordinator", "two ranks per client"],
)
def test_the_bits_are_the_plain_ones_for_other_topologies(tmp_path: Path, topology: TopologyConfig) -> None:
    config = dataclasses.replace(BASE, topology=topology, algorithm=SCAFFOLD(), output=str(tmp_path))
    (plain, secure), *_ = run_world(train_pair, config, size=2)
    assert all(torch.equal(tensor, secure[name]) for name, tensor in plain.items())


def test_every_run_of_the_protocol_has_a_context_of_its_own(tmp_path: Path) -> None:
    """Keys are derived for it: a message of another round, or of the sum of the n_k, opens nothing."""
    seen = []

    class Recorded(SecureSum):
        def __init__(self, *arguments: Any, context: str, **others: Any) -> None:
            seen.append(context)
            super().__init__(*arguments, context=context, **others)

    config = dataclasses.replace(BASE, secure_aggregation=SecAgg(), rounds=2, output=str(tmp_path), name="x")
    with mock.patch("fedddp.secure.protocol.SecureSum", Recorded):
        run(config)
    assert seen == ["x|0|n", "x|0", "x|1|n", "x|1"]


# ---- resume ----


RESUMABLE: dict[str, dict[str, Any]] = {
    "FedAvg": {"algorithm": FedAvg()},
    "SCAFFOLD": {"algorithm": SCAFFOLD()},
    "dropping": {"algorithm": SCAFFOLD(), "secure_aggregation": DROPPING},
}


def resume_all(runs: list[Config]) -> None:
    for config in runs:
        assert train(config)[0]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were stopped at every kind of point, and end in a world of two groups."""
    folder, waiting = tmp_path_factory.mktemp("resumed"), []
    for name, changes in RESUMABLE.items():
        secure: dict[str, Any] = {"secure_aggregation": SecAgg(), **changes}
        config = dataclasses.replace(
            BASE, **secure, local=LOCALS[0], output=str(folder / name), name="uninterrupted"
        )
        finished, checks = train(config)
        assert finished
        stopped = dataclasses.replace(config, name="resumed", resume="auto")
        for stop_at in (3, 5, checks.stop // 2):
            assert not train(stopped, stop_at=stop_at)[0]
        waiting.append(stopped)
    run_world(resume_all, waiting, size=2)
    return folder


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_stopped_round_is_repeated_and_ends_with_the_same_bits(resumed: Path, name: str) -> None:
    assert_same(resumed / name / "resumed", resumed / name / "uninterrupted", BASE.rounds)


def test_no_checkpoint_of_a_stopped_round_has_its_secrets_or_sums(tmp_path: Path) -> None:
    config = dataclasses.replace(
        BASE, algorithm=SCAFFOLD(), local=STEPS, secure_aggregation=SecAgg(), output=str(tmp_path), name="x"
    )
    with interrupted(stop_at=6):
        assert not run(config).finished
    (folder,) = (tmp_path / "x" / "checkpoints").iterdir()
    assert "round-00000-00000" < folder.name < "round-00001"
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert names == {*net().state_dict(), "server.c"}  # no sums, and no state of a client that trained


# ---- drop-outs ----


def dropping(config: Config) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a run's history, and its model."""
    result = run(config)
    return result.history, {k: v.clone() for k, v in result.model.state_dict().items()}


def test_drop_outs_are_left_out_in_any_world(tmp_path: Path) -> None:
    config = dataclasses.replace(
        BASE, rounds=6, secure_aggregation=DROPPING, cohort=CohortConfig(size=7), output=str(tmp_path)
    )
    history, model = dropping(config)
    expected = []
    for index in range(6):
        drops = DROPPING.drops(range(7), config.seed, index)
        late = sum(point < 3 for point in drops.values())
        expected.append((7 - late if len(drops) <= 3 else 0, late))
    assert [(row["clients/aggregated"], row["clients/missing"]) for row in history] == expected
    assert len({late for _, late in expected}) > 1
    (other, again), _ = run_world(dropping, config, size=2)
    assert [row["clients/aggregated"] for row in other] == [row["clients/aggregated"] for row in history]
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.items())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("drop_before_shares", "sent shares"),
        ("drop_before_update", "remained to unmask the sum"),
        ("drop_before_unmasking", "remained to unmask the sum"),
    ],
)
def test_a_round_with_too_few_clients_is_abandoned_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, setting: str, words: str
) -> None:
    secure = SecAgg(threshold=1, **{setting: 0.3})
    states: dict[str, Any] = {"algorithm": SCAFFOLD(), "output": str(tmp_path)}
    config = dataclasses.replace(
        BASE, **states, secure_aggregation=secure, cohort=CohortConfig(size=3), rounds=5
    )
    with caplog.at_level(logging.WARNING):
        result = run(config)
    assert result.finished
    lines = [record.getMessage() for record in caplog.records]
    abandoned = [row["round"] for row in result.history if not row["clients/aggregated"]]
    assert 0 < len(abandoned) < 5
    assert len(lines) == len(abandoned)
    for number, line in zip(abandoned, lines, strict=True):
        assert line.startswith(f"round {number}: ")
        assert words in line
        assert line.endswith("; the model is unchanged")


def test_an_abandoned_round_changes_neither_the_model_nor_a_client(tmp_path: Path) -> None:
    secure = SecAgg(threshold=1, drop_before_unmasking=0.99)
    config = dataclasses.replace(
        BASE, algorithm=SCAFFOLD(), secure_aggregation=secure, output=str(tmp_path), rounds=2, name="x"
    )
    model = run(config).model
    assert all(torch.equal(tensor, net().state_dict()[name]) for name, tensor in model.state_dict().items())
    assert {name for name in newest_states(tmp_path / "x") if name[0].isdigit()} == set()


def test_a_poisson_cohort_may_be_too_small(tmp_path: Path) -> None:
    cohort = CohortConfig(size=3, sampling="poisson")
    config = dataclasses.replace(
        BASE, cohort=cohort, secure_aggregation=SecAgg(), rounds=6, output=str(tmp_path)
    )
    aggregated = [row["clients/aggregated"] for row in run(config).history]
    assert 0 in aggregated
    assert max(aggregated) >= 3


def exploding(config: Config) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a run's history and warnings; the second client of a cohort diverges."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Kept(logging.WARNING)
    logging.getLogger("fedddp").addHandler(handler)
    try:
        return run(config).history, lines
    finally:
        logging.getLogger("fedddp").removeHandler(handler)


def test_clients_whose_update_is_invalid_drop_out_without_their_names(tmp_path: Path) -> None:
    config = dataclasses.replace(
        BASE,
        aggregation=Mean(on_invalid_update="skip"),
        attacks=SignFlip(fraction=0.15, scale=1e9),
        secure_aggregation=SecAgg(threshold=0.5),
        data=DataConfig(clients=7, partition=IID()),
        cohort=CohortConfig(size=7),
        output=str(tmp_path),
        rounds=2,
    )
    history, lines = exploding(config)
    assert [(row["clients/aggregated"], row["clients/invalid"]) for row in history] == [(6, 1)] * 2
    words = "NaN, infinity or overflow in the update of 1 client; dropped out before masking"
    assert lines == [f"round {number}: {words}" for number in (1, 2)]


# ---- configuration ----


def test_yaml_flags_and_python_are_one_path(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("secure_aggregation: {name: SecAggPlus, neighbours_per_client: 4, threshold: 0.7}\n")
    expected = SecAggPlus(neighbours_per_client=4, threshold=0.7)
    assert load_config(str(file)).secure_aggregation == expected
    flags = ["--secure_aggregation", "SecAggPlus", "--secure_aggregation.threshold", "0.7"]
    assert load_config(None, flags).secure_aggregation == SecAggPlus(threshold=0.7)
    assert load_config(str(file), ["--secure_aggregation", "none"]).secure_aggregation is None
    assert load_config(None, []).secure_aggregation is None
    with pytest.raises(ConfigError, match="secure_aggregation: unknown name 'none'; choose one of SecAgg, "):
        load_config(None, ["--secure_aggregation.threshold", "0.7"])
    with pytest.raises(ConfigError, match=r"secure_aggregation: unknown name 'SecAg'.*Did you mean 'SecAgg'"):
        load_config(None, ["--secure_aggregation", "SecAg"])


ONE_BY_ONE = "steps by each update alone, which no sum hides; use a synchronous"
ASYNC_LOCAL = LocalConfig(steps=1)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "robust": ({"aggregation": CoordinateMedian()}, "CoordinateMedian must see the updates apart"),
    "clipping": ({"aggregation": Mean(clip_norm=1.0)}, r"clip_norm=1\.0 clips single updates"),
    "invalid": ({"aggregation": Mean(on_invalid_update="clip")}, "on_invalid_update=clip changes single"),
    "float32": ({"aggregation": Mean(sums="float32")}, "sums=float32 rounds sums"),
    "FedAsync": ({"algorithm": FedAsync()}, f"algorithm=FedAsync {ONE_BY_ONE}"),
    "FedBuff": ({"algorithm": FedBuff()}, "algorithm=FedBuff receives an update as soon as it is trained"),
    "AsyncSGD": ({"algorithm": AsyncSGD(), "local": ASYNC_LOCAL}, f"algorithm=AsyncSGD {ONE_BY_ONE}"),
    "ids": (
        {"evaluation": EvaluationConfig(clients=2), "data": DataConfig(holdout=0.1)},
        "evaluation.clients=2 records the metrics of single clients",
    ),
    "pair": ({"cohort": CohortConfig(size=2)}, "cohort.size=2 is fewer than the 3 clients"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("secure", [SecAgg(), SecAggPlus()], ids=["SecAgg", "SecAggPlus"])
def test_what_needs_single_updates_is_refused_in_one_line(name: str, secure: SecureAggregation) -> None:
    changes, words = REFUSED[name]
    Config(**changes)
    with pytest.raises(ConfigError, match=rf"secure_aggregation={type(secure).__name__} .*{words}") as error:
        Config(**changes, secure_aggregation=secure)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(secure_round.SecureRound, "__init__", None)
    monkeypatch.setattr("fedddp.secure.settings.importlib.util.find_spec", lambda name: None)
    config = dataclasses.replace(BASE, secure_aggregation=SecAgg(), output=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"secure_aggregation=SecAgg needs .* pip install \"fedddp\[secure\]\""
    ):
        run(config)


def test_settings_and_plans_do_without_the_package() -> None:
    assert run_world(try_without, "cryptography", size=1) == [[]]


def test_the_plan_shows_the_bytes_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    config = Config(data=DataConfig(clients=20), cohort=CohortConfig(size=10), secure_aggregation=SecAgg())
    Console(width=200).print(dry_run(config, 1))
    shown = " ".join(capsys.readouterr().out.split())
    assert "bytes per round" in shown
    assert "secure aggregation SecAgg: 9 neighbours per client, 6 of 10 shares recover a secret" in shown
