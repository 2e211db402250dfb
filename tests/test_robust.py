"""Rules against liars: each against its paper's words in plain loops, and on real attacks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_methods as rig
import torch
from numpy.typing import NDArray
from torch import nn

from fedddp import (
    IID,
    Bulyan,
    Cohort,
    CoordinateMedian,
    Data,
    Evaluation,
    FedAvg,
    Federation,
    FedProx,
    GaussianNoise,
    GeometricMedian,
    Krum,
    LabelFlip,
    Local,
    Mean,
    ModelReplacement,
    MultiKrum,
    NoAttack,
    Run,
    SignFlip,
    Track,
    TrimmedMean,
)
from fedddp.aggregation.robust import Robust
from fedddp.algorithms.algorithm import Contribution
from fedddp.config.loader import load
from fedddp.config.schema import ConfigError
from fedddp.testing import run_world

pytestmark = pytest.mark.timeout(2 * rig.PATIENCE_S)

Rows = NDArray[np.float64]


def krum_scores(rows: Rows, f: int) -> list[float]:
    scores = []
    for i, row in enumerate(rows):
        others = sorted(sum((row - other) ** 2) for j, other in enumerate(rows) if j != i)
        scores.append(sum(others[: max(1, len(rows) - f - 2)]))
    return scores


def krum(rows: Rows, f: int) -> Rows:
    return rows[int(np.argmin(krum_scores(rows, f)))]


def multi_krum(rows: Rows, f: int, keep: int) -> Rows:
    return rows[np.argsort(krum_scores(rows, f))[:keep]].mean(0)


def trimmed(rows: Rows, cut: int) -> Rows:
    columns = [sorted(column)[cut : len(column) - cut] for column in rows.T]
    return np.array([sum(column) / len(column) for column in columns])


def bulyan(rows: Rows, f: int) -> Rows:
    left, chosen = list(rows), []
    while len(chosen) < len(rows) - 2 * f:
        chosen.append(left.pop(int(np.argmin(krum_scores(np.array(left), f)))))
    columns = []
    for column in np.array(chosen).T:
        nearest = sorted(column, key=lambda value, column=column: abs(value - np.median(column)))
        columns.append(np.mean(nearest[: len(chosen) - 2 * f]))
    return np.array(columns)


RULES: dict[str, tuple[Robust, Callable[[Rows], Rows]]] = {
    "CoordinateMedian": (CoordinateMedian(), lambda rows: np.median(rows, axis=0)),
    "TrimmedMean": (TrimmedMean(beta=0.3), lambda rows: trimmed(rows, len(rows) * 3 // 10)),
    "Krum": (Krum(attackers=2), lambda rows: krum(rows, 2)),
    "MultiKrum": (MultiKrum(attackers=2), lambda rows: multi_krum(rows, 2, len(rows) - 2)),
    "MultiKrum of 3": (MultiKrum(attackers=2, keep=3), lambda rows: multi_krum(rows, 2, 3)),
    "Bulyan": (Bulyan(attackers=2), lambda rows: bulyan(rows, 2)),
    "Bulyan of 1": (Bulyan(attackers=1), lambda rows: bulyan(rows, 1)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("clients", [11, 20])
@pytest.mark.parametrize("liars", [0, 2])
def test_rules_are_the_papers(name: str, clients: int, liars: int) -> None:
    rows = np.random.default_rng(clients).standard_normal((clients, 7)).astype(np.float32)
    rows[:liars] += 50
    rule, reference = RULES[name]
    chosen = rule.choose(torch.from_numpy(rows)).double().numpy()
    np.testing.assert_allclose(chosen, reference(rows.astype(np.float64)), atol=1e-6)
    if liars and name != "Bulyan of 1":
        assert np.abs(chosen).max() < 5


def test_krum_by_hand() -> None:
    rows = torch.tensor([[0.0], [1.0], [3.0], [3.5], [100.0]])
    # One attacker: two neighbours. Scores 10, 5, 4.25, 6.5, much.
    assert Krum(attackers=1).choose(rows).tolist() == [3.0]
    assert MultiKrum(attackers=1, keep=2).choose(rows).tolist() == [2.0]


def test_geometric_median_has_balanced_pulls() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32))
    rows[:4] += 1000
    point = GeometricMedian().choose(rows)
    pulls = torch.nn.functional.normalize(rows.double() - point, dim=1).sum(0)
    assert pulls.norm() < 1e-3
    on_a_line = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    torch.testing.assert_close(GeometricMedian().choose(on_a_line).float(), torch.ones(2), atol=1e-4, rtol=0)


# ---- in rounds: any number of groups, stopped and resumed ----

FIVE = Cohort(size=5)
RUNS = {
    name: rig.run_of(method, local, "norm" in name, aggregation=rule, attacks=attack, cohort=FIVE)
    for name, method, local, rule, attack in (
        ("Mean", FedAvg(), rig.LOCAL, Mean(clip_norm=0.5), ModelReplacement(fraction=0.2)),
        ("CoordinateMedian and norm", FedAvg(), rig.NORM, CoordinateMedian(), GaussianNoise(fraction=0.4)),
        ("TrimmedMean", FedAvg(momentum=0.5), rig.LOCAL, TrimmedMean(), SignFlip(fraction=0.2)),
        ("Krum and norm", FedAvg(), rig.NORM, Krum(), LabelFlip(fraction=0.2)),
        ("MultiKrum", FedProx(mu=0.5), rig.LOCAL, MultiKrum(clip_norm=0.5), SignFlip(fraction=0.2)),
        ("Bulyan", FedAvg(), rig.LOCAL, Bulyan(attackers=0), NoAttack()),
        ("GeometricMedian", FedAvg(), rig.LOCAL, GeometricMedian(), GaussianNoise(fraction=0.4)),
    )
}


def test_bits_do_not_depend_on_groups_nor_on_a_stop(tmp_path: Path) -> None:
    def results(size: int, ranks: int, stop: bool = False) -> dict[str, Any]:
        folder = str(tmp_path / f"{size}-{ranks}-{stop}")
        return run_world(rig.train, RUNS, ranks, folder, stop, size=size, timeout_s=rig.PATIENCE_S)[0]

    alone = results(1, 1)
    for other in (results(2, 1), results(1, 1, stop=True)):
        for name in RUNS:
            rig.same(alone[name], other[name])
    shared, twice = results(2, 2), results(4, 2)
    for name in RUNS:
        rig.same(shared[name], twice[name])
        torch.testing.assert_close(shared[name][0], alone[name][0], rtol=0, atol=1e-5)


def test_buffers_are_medians() -> None:
    like, counters = torch.zeros(2), torch.zeros(1, dtype=torch.int64)
    sums = Krum(attackers=0).accumulator({"update": 2, "buffers": 1}, 3, like, counters)
    for client, value in ((7, 1.0), (2, 5.0), (4, 1e9)):
        update = {"update": torch.full((2,), value)}
        sums.add(client, Contribution(update, 0.1), torch.tensor([value]), 0.1, counters + client)
    total = sums.total()
    assert total["buffers"].tolist() == [5.0]
    assert total["update"].tolist() in ([1.0] * 2, [5.0] * 2)
    assert sums.counters.tolist() == [7]
    assert total.clients == 3


# ---- attacks ----


def end(**changes: Any) -> float:
    """Return the accuracy at the end of a run of ten clients on digits, with a small convolutional net."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)]
        net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *head)
    run = Run(
        data=Data(dataset="digits", clients=10, partition=IID()),
        local=Local(epochs=1, batch_size=16, lr=0.2, schedule="cosine"),
        cohort=Cohort(size=10),
        evaluation=Evaluation(every=20),
        rounds=20,
        track=Track(with_=[], progress=False),
        **changes,
    )
    outcome = Federation(run, model=net).run()
    assert outcome.finished, "something asked the run to stop, such as `timeout` around the tests"
    return float(outcome.history[-1]["eval/accuracy"])


def test_sign_flips_break_the_mean_but_not_trimmed_mean_nor_multi_krum() -> None:
    attacks = SignFlip(fraction=0.3)
    honest = end()
    assert honest > 0.95
    assert end(attacks=attacks) < 0.3
    for rule in (TrimmedMean(beta=0.3), MultiKrum(attackers=3)):
        assert end(attacks=attacks, aggregation=rule) > honest - 0.03


@pytest.mark.parametrize("name", ["SignFlip", "GaussianNoise", "ModelReplacement", "LabelFlip"])
def test_attacks_change_what_liars_do_and_nobody_else(name: str) -> None:
    run = load("digits", f"--attacks {name} --attacks.fraction 0.25 --data.holdout 0.2".split())
    attack = run.attacks
    liars = attack.malicious(20, run.seed)
    assert liars.tolist() == attack.malicious(20, run.seed).tolist()
    assert len(liars) == 5
    assert liars.tolist() != attack.malicious(20, run.seed + 1).tolist()
    update = torch.arange(1.0, 1001.0)
    honest = Contribution({"update": update, "control": update}, 0.25)
    sent = attack.corrupt(honest, np.random.default_rng(0))
    assert torch.equal(sent.vectors["control"], update)
    got = sent.vectors["update"]
    if name == "SignFlip":
        assert torch.equal(got, -4 * update)
    elif name == "ModelReplacement":
        assert torch.equal(got, 4 * update)
    elif name == "GaussianNoise":
        assert float(got.norm() / update.norm()) == pytest.approx(10, rel=1e-4)
        cosine = torch.cosine_similarity(got, update, dim=0)
        assert abs(float(cosine)) < 0.2
    else:
        assert torch.equal(got, update)
    flipped = attack.relabel(np.array([0, 3, 9]), 10).tolist()
    assert flipped == ([9, 6, 0] if name in ("ModelReplacement", "LabelFlip") else [0, 3, 9])


def liars_labels(folder: str) -> tuple[list[int], list[int]]:
    """Return the clients whose training labels, and those whose held-out labels, are not the true ones."""
    from fedddp.distributed.launch import connect
    from fedddp.distributed.topology import Topology

    run = load("digits", ["--attacks", "LabelFlip", "--attacks.fraction", "0.25", "--data.holdout", "0.2"])
    world = connect(Topology(device="cpu"))
    clean = dataclasses.replace(run, attacks=NoAttack())
    flipped, true = (Federation(r)._session(world, Path(folder), r) for r in (run, clean))
    world.close()

    def differing(part: int) -> list[int]:
        shares = {k: true._shares(k)[part] for k in range(20)}
        old, new = true.train._labels, flipped.train._labels
        assert all((new[i] == 9 - old[i]).all() or (new[i] == old[i]).all() for i in shares.values())
        return [k for k, i in shares.items() if len(i) and not (new[i] == old[i]).all()]

    assert sorted(flipped.liars) == differing(0)
    return differing(0), differing(1)


def test_label_flips_reach_the_liars_training_data_only(tmp_path: Path) -> None:
    ((training, held_out),) = run_world(liars_labels, str(tmp_path), size=1)
    assert len(training) == 5
    assert not held_out


# ---- combinations that cannot work ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        *[
            (f"--algorithm {method} --aggregation {rule}", f"aggregation={rule} .* {method}, .*; use Mean")
            for method, rule in itertools.product(
                ("SCAFFOLD", "FedDyn", "FedNova", "QFedAvg"), ("Krum", "TrimmedMean")
            )
        ],
        ("--aggregation Krum --aggregation.attackers 4", "Krum needs at least 11 .*cohort.size=10"),
        ("--aggregation Bulyan --aggregation.attackers 2", "Bulyan needs at least 11 .*cohort.size=10"),
        ("--aggregation MultiKrum --cohort.sampling poisson", "MultiKrum needs .* use sampling=fixed"),
        ("--aggregation TrimmedMean --aggregation.beta 0.5", r"beta must be in \[0, 0.5\), got 0.5"),
        ("--aggregation Krum --aggregation.sums float32", "sums=float32 is for Mean"),
        ("--aggregation Krum --aggregation.attackers -1", "attackers must be >= 0"),
        ("--aggregation MultiKrum --aggregation.keep 0", "keep must be >= 1"),
        ("--attacks SignFlip --attacks.fraction 1", r"fraction must be in \[0, 1\), got 1"),
        ("--attacks SignFlip --attacks.scale 0", "scale must be > 0"),
        ("--attacks.fraction 0.2", "fraction=0.2 needs an attack; choose"),
    ],
)
def test_combinations_that_cannot_work_are_refused(flags: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load("digits", flags.split())
    assert "\n" not in str(refused.value)


def test_the_mean_is_the_default_and_counts_by_examples() -> None:
    assert Run().aggregation == Mean()
    assert Run().attacks == NoAttack()
