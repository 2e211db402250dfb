"""Privacy, secure aggregation and compression together: the bits, the bytes, what is refused."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import references as ref
import rig
import torch
from rich.console import Console
from torch import Tensor, nn

from fedddp import (
    CohortConfig,
    Config,
    ConfigError,
    Federation,
    TrackingConfig,
    TransportConfig,
    codecs,
    privacy,
)
from fedddp.aggregation import Mean
from fedddp.algorithms import (
    SCAFFOLD,
    Algorithm,
    ClientContext,
    ClientUpdate,
    FedAdam,
    FedAvg,
    FedNova,
    FedPer,
    ServerState,
)
from fedddp.config.baselines import baselines_of
from fedddp.config.loader import build
from fedddp.models.flat import FlatModel
from fedddp.privacy.local import LocalProtection
from fedddp.privacy.statement import statement
from fedddp.reporting.dry_run import dry_run
from fedddp.secure import SecAgg, SecAggPlus
from fedddp.training.exchange import round_bytes
from fedddp.transport.links import Links
from fedddp.transport.shared import Shared

DELTA = 1e-3
QUIET = TrackingConfig(trackers=[], progress=False)
CENTRAL_FLAGS = "--privacy CentralDP --privacy.noise_multiplier 1 --privacy.delta 1e-3 --privacy.clip 1"
CENTRAL = privacy.CentralDP(noise_multiplier=0.8, delta=DELTA, clip=0.4)
ADAPTIVE = dataclasses.replace(CENTRAL, adaptive=True, count_noise=1.0, clip=0.3, quantile=0.4)
LOCAL_DP = privacy.LocalDP(epsilon=8.0, delta=DELTA, clip=0.3)
PACKED = TransportConfig(up=codecs.QSGD(levels=16), down=codecs.Int8())
FED_BACK = TransportConfig(up=codecs.TopK(fraction=0.3), down=codecs.TopK(fraction=0.5))
DOWN = TransportConfig(down=codecs.Sign())
ROTATED = TransportConfig(down=codecs.EDEN())

CASES: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "central": (FedAvg(), {"privacy": CENTRAL}),
    "central, FedAdam": (FedAdam(tau=0.02), {"privacy": CENTRAL}),
    "central, SCAFFOLD": (SCAFFOLD(), {"privacy": CENTRAL}),
    "central, FedNova": (FedNova(), {"privacy": dataclasses.replace(CENTRAL, clip=3.0)}),
    "central, FedPer": (FedPer(), {"privacy": CENTRAL}),
    "central, adaptive": (FedAvg(), {"privacy": ADAPTIVE}),
    "central, down": (FedAvg(), {"privacy": CENTRAL, "transport": DOWN}),
    "central, SCAFFOLD, down": (SCAFFOLD(), {"privacy": ADAPTIVE, "transport": ROTATED}),
    "local": (FedAvg(), {"privacy": LOCAL_DP}),
    "local, SCAFFOLD": (SCAFFOLD(), {"privacy": LOCAL_DP}),
    "down": (FedAvg(), {"transport": DOWN}),
}
"""What trains the same bits with and without secure aggregation."""
OTHERS: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "local, packed": (FedAvg(), {"privacy": LOCAL_DP, "transport": PACKED}),
    "local, fed back": (SCAFFOLD(), {"privacy": LOCAL_DP, "transport": FED_BACK}),
}
CONFIGS = {name: rig.config_of(algorithm, rig.LOCAL, **more) for name, (algorithm, more) in CASES.items()}
SECURE = {f"{n}, secure": dataclasses.replace(c, secure_aggregation=SecAgg()) for n, c in CONFIGS.items()}
SECURE["central, plus"] = dataclasses.replace(CONFIGS["central"], secure_aggregation=SecAggPlus())
COMPRESSED = {name: rig.config_of(algorithm, rig.LOCAL, **more) for name, (algorithm, more) in OTHERS.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, rig.Trained]]:
    """Return what trains all configurations in a world, once for each."""

    @functools.cache
    def train(groups: int, stop: bool = False) -> dict[str, rig.Trained]:
        folder = tmp_path_factory.mktemp(f"{groups}-{stop}")
        plain = CONFIGS if (groups, stop) == (1, False) else {}  # what no test looks at elsewhere
        return rig.train_in_world(plain | SECURE | COMPRESSED, groups, 1, str(folder), stop)

    return train


@pytest.mark.parametrize("name", SECURE)
def test_secure_aggregation_leaves_the_bits_of_the_private_run(name: str, trained: Any) -> None:
    plain = trained(1)[name.replace(", plus", "").replace(", secure", "")]
    rig.assert_same_bits(trained(1)[name], plain)


@pytest.mark.parametrize("name", [*SECURE, *COMPRESSED])
def test_pairs_train_the_same_bits_in_two_groups(name: str, trained: Any) -> None:
    rig.assert_same_bits(trained(2)[name], trained(1)[name])


@pytest.mark.parametrize("name", [*SECURE, *COMPRESSED])
def test_pairs_that_were_stopped_within_a_round_resume_to_the_same_bits(name: str, trained: Any) -> None:
    rig.assert_same_bits(trained(1, True)[name], trained(1)[name])


def test_gradients_compressed_inside_a_group_are_protected_like_others(tmp_path: Path) -> None:
    topology = dataclasses.replace(CONFIGS["central"].topology, ranks_per_client=2)
    more: dict[str, Any] = {"transport": TransportConfig(group="bf16"), "topology": topology}
    names = ("central", "central, secure", "local", "local, secure")
    configs = {name: dataclasses.replace((CONFIGS | SECURE)[name], **more) for name in names}
    found = rig.train_in_world(configs, 1, 2, str(tmp_path))
    for name in ("central", "local"):
        rig.assert_same_bits(found[name], found[f"{name}, secure"])


# ---- runs ----


def run(folder: Path, config: Config, module: nn.Module | None = None, **changes: Any) -> Any:
    config = dataclasses.replace(config, output=str(folder), **changes)
    return Federation(config, module=module or ref.net(), train=ref.Pixels()).run()


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("name", ["central", "central, adaptive", "local"])
def test_a_secure_private_row_is_the_private_row_without_a_cohort(name: str, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", CONFIGS[name]).history
    secure = run(tmp_path / "secure", SECURE[f"{name}, secure"]).history
    for ours, theirs in zip(secure, plain, strict=True):
        assert theirs.keys() - ours.keys() == {"cohort"}
        for key in theirs.keys() - {"cohort", "bytes/up", "bytes/down"}:
            if not key.startswith("time/"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
    assert any(row["clients/clipped"] for row in secure) or name == "local"


@pytest.mark.parametrize("name", [*CONFIGS, *SECURE, *COMPRESSED])
def test_the_bytes_of_the_first_row_are_those_of_the_plan(name: str, tmp_path: Path) -> None:
    config = (CONFIGS | SECURE | COMPRESSED)[name]
    flat = FlatModel(ref.net())
    server = ServerState.of(flat, ref.CLIENTS)
    config.algorithm.start(server)
    links = Links(config.transport, config.algorithm, config.seed, Shared.of(config.algorithm, flat))
    first = run(tmp_path, config, rounds=1).history[0]
    assert (first["bytes/up"], first["bytes/down"]) == round_bytes(config, links, server, ref.COHORT)


def test_a_strict_secure_row_has_planned_bytes_and_no_sums(tmp_path: Path) -> None:
    strict = dataclasses.replace(LOCAL_DP, strict=True)
    config = dataclasses.replace(
        SECURE["local, secure"], privacy=strict, aggregation=Mean(on_invalid_update="skip")
    )
    rows = run(tmp_path / "1", config).history
    kept = {"round", "privacy", "eval", "bytes", "time"}
    assert {key.partition("/")[0] for row in rows for key in row} <= kept
    dropped = dataclasses.replace(config, secure_aggregation=SecAgg(drop_before_update=0.5))
    others = run(tmp_path / "2", dropped).history
    assert [row["bytes/up"] for row in others] == [row["bytes/up"] for row in rows]


# ---- order: noise, then the codec; clipping, then masks ----


def test_a_local_client_packs_what_it_made_noisy(tmp_path: Path) -> None:
    calls: list[str] = []
    noisy: list[Tensor] = []

    def sent(self: LocalProtection, *arguments: Any) -> ClientUpdate:
        noisy.append((update := own(self, *arguments)).vectors["update"])
        return update

    def encode(self: codecs.QSGD, vector: Tensor, rng: Any) -> Tensor:
        assert torch.equal(vector, noisy[-1])
        calls.append("encode")
        return pack(self, vector, rng)

    own, pack = LocalProtection.sent, codecs.QSGD.encode
    config = rig.config_of(
        FedAvg(), rig.LOCAL, privacy=LOCAL_DP, transport=TransportConfig(up=codecs.QSGD()), rounds=1
    )
    with mock.patch.object(LocalProtection, "sent", sent), mock.patch.object(codecs.QSGD, "encode", encode):
        run(tmp_path, config)
    assert len(calls) == len(noisy) == ref.COHORT


class Broken(FedAvg):
    """FedAvg whose client 2 sends NaN."""

    def finish(self, context: ClientContext) -> ClientUpdate:
        if context.client == 2:
            context.params[3] = math.nan
        return super().finish(context)


def test_an_invalid_private_client_sends_zeros_and_does_not_drop_out(tmp_path: Path, caplog: Any) -> None:
    config = dataclasses.replace(
        CONFIGS["central"],
        algorithm=Broken(),
        aggregation=Mean(on_invalid_update="skip"),
        cohort=CohortConfig(size=5),
        rounds=2,
    )
    plain = run(tmp_path / "plain", config)
    with caplog.at_level(logging.WARNING):
        # With threshold 1 any client that dropped out would end the round.
        secure = run(tmp_path / "secure", config, secure_aggregation=SecAgg(threshold=1))
    assert torch.equal(weights(plain.model), weights(secure.model))
    counts = [(row["clients/aggregated"], row["clients/invalid"]) for row in secure.history]
    assert counts == [(4, 1), (4, 1)]
    assert "in the update of 1 client; zeros sent instead" in caplog.text


def test_drop_outs_of_a_private_round_leave_the_denominator(tmp_path: Path) -> None:
    secure = SecAgg(threshold=0.5, drop_before_update=0.3)
    config = dataclasses.replace(
        CONFIGS["central"], secure_aggregation=secure, cohort=CohortConfig(size=5), rounds=4
    )
    rows = run(tmp_path, config).history
    late = [len(secure.drops(range(5), config.seed, index)) for index in range(4)]
    assert [row["clients/missing"] for row in rows] == late
    assert any(late)
    assert all(row["privacy/epsilon"] for row in rows)


def test_an_abandoned_private_round_changes_nothing_and_is_charged(tmp_path: Path, caplog: Any) -> None:
    secure = SecAgg(threshold=1, drop_before_unmasking=0.99)
    config = dataclasses.replace(CONFIGS["central"], secure_aggregation=secure, rounds=2)
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path / "1", config)
    assert torch.equal(weights(result.model), weights(ref.net()))
    assert caplog.text.count("the model is unchanged") == 2
    released = run(tmp_path / "2", CONFIGS["central"], rounds=2)
    assert [row["privacy/epsilon"] for row in result.history] == [
        row["privacy/epsilon"] for row in released.history
    ]


def test_no_sum_of_the_numbers_of_examples_is_formed_under_privacy(tmp_path: Path) -> None:
    from fedddp.training.secure_round import SecureRound

    with mock.patch.object(SecureRound, "_add_up_examples", side_effect=AssertionError):
        run(tmp_path, SECURE["central, secure"], rounds=1)
        with pytest.raises(AssertionError):
            run(tmp_path, SECURE["down, secure"], rounds=1)


# ---- refusals ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            f"{CENTRAL_FLAGS} --transport.up Cast",
            "transport.up=Cast cannot be combined with privacy=CentralDP: ",
        ),
        (
            "--secure_aggregation SecAgg --transport.up QSGD",
            "transport.up=QSGD would lose precision and save",
        ),
        (
            f"{CENTRAL_FLAGS} --secure_aggregation SecAgg --cohort.sampling poisson",
            "with amplification by sampling cannot be combined with privacy=CentralDP",
        ),
        (
            f"{CENTRAL_FLAGS} --secure_aggregation SecAgg --privacy.amplification without_replacement",
            "reveals a cohort that the account takes for secret",
        ),
        (f"{CENTRAL_FLAGS} --privacy.strict true --transport.down QSGD", "which client was sent which model"),
        ("--baseline pooled --transport.up QSGD", "but transport.up compresses what is sent; leave it out"),
        ("--baseline pooled --secure_aggregation SecAgg", "but secure_aggregation=SecAgg masks what clients"),
        (f"--baseline pooled {CENTRAL_FLAGS}", "but privacy=CentralDP protects what clients send"),
    ],
)
def test_pairs_are_refused_in_one_line_with_the_reason(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build({}, flags.split())
    assert message in str(error.value)
    assert "; " in str(error.value)
    assert "\n" not in str(error.value)


def test_poisson_cohorts_are_masked_where_the_account_takes_them_for_known() -> None:
    flags = f"{CENTRAL_FLAGS} --secure_aggregation SecAgg --cohort.sampling poisson"
    assert build({}, f"{flags} --privacy.amplification none".split()).secure_aggregation is not None


# ---- what a user sees ----


def test_baselines_of_a_protected_run_send_nothing(tmp_path: Path) -> None:
    flags = f"{CENTRAL_FLAGS} --secure_aggregation SecAgg --transport.down QSGD --data.holdout 0.3 "
    config = build({}, (flags + "--data.examples 120 --data.clients 8 --cohort.size 3 --rounds 1").split())
    for baseline in baselines_of(config).values():
        row = Federation(baseline, output=str(tmp_path), tracking=QUIET).run().history[0]
        assert (row["bytes/up"], row["bytes/down"]) == (0, 0)
        assert "privacy/epsilon" not in row


def test_the_plan_shows_all_three_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"{CENTRAL_FLAGS} --secure_aggregation SecAgg --transport.down Int8 --cohort.size 4"
    Console(width=250).print(dry_run(build({}, flags.split()), 1))
    shown = " ".join(capsys.readouterr().out.split())
    assert "privacy noise multiplier 1: simulated ε = " in shown
    assert "secure aggregation SecAgg: 3 neighbours per client, 3 of 4 shares recover a secret" in shown
    assert "to clients of the round before)" in shown


def test_the_statement_of_a_secure_run_does_not_speak_of_cohorts() -> None:
    rows = [{"round": 1, "privacy/epsilon": 2.0, "privacy/simulated": 0}]
    section = {"privacy": {"name": "CentralDP", "delta": 1e-3}}
    assert "cohorts" in str(statement(section, rows))
    assert "cohorts" not in str(statement({**section, "secure_aggregation": {"name": "SecAgg"}}, rows))
