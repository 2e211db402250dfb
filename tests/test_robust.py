"""Robust aggregation: each rule against its paper's words in plain loops, and against attacks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references as ref
import rig
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedddp import (
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    Federation,
    LocalConfig,
    TopologyConfig,
    TrackingConfig,
    load_config,
)
from fedddp.aggregation import (
    Bulyan,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
    RobustAggregation,
    TrimmedMean,
)
from fedddp.algorithms import ClientUpdate, FedAvg, FedProx
from fedddp.data.partition import IID, Partition, Split, holdout
from fedddp.distributed.launch import connect
from fedddp.simulation.attacks import GaussianNoise, LabelFlip, ModelReplacement, NoAttack, SignFlip
from fedddp.testing import run_world
from fedddp.training.objects import Objects

Rows = NDArray[np.float64]
"""One update per row."""


def krum_scores(rows: Rows, f: int) -> list[float]:
    scores = []
    for i, row in enumerate(rows):
        others = sorted(sum((row - other) ** 2) for j, other in enumerate(rows) if j != i)
        scores.append(sum(others[: max(1, len(rows) - f - 2)]))
    return scores


def krum(rows: Rows, f: int) -> Rows:
    best: Rows = rows[int(np.argmin(krum_scores(rows, f)))]
    return best


def multi_krum(rows: Rows, f: int, keep: int) -> Rows:
    mean: Rows = rows[np.argsort(krum_scores(rows, f))[:keep]].mean(0)
    return mean


def trimmed(rows: Rows, cut: int) -> Rows:
    columns = [sorted(column)[cut : len(column) - cut] for column in rows.T]
    return np.array([sum(column) / len(column) for column in columns])


def bulyan(rows: Rows, f: int) -> Rows:
    left = list(rows)
    chosen: list[Rows] = []
    while len(chosen) < len(rows) - 2 * f:
        chosen.append(left.pop(int(np.argmin(krum_scores(np.array(left), f)))))
    columns = []
    for column in np.array(chosen).T:
        nearest = np.argsort(np.abs(column - np.median(column)), kind="stable")
        columns.append(np.mean(column[nearest[: len(chosen) - 2 * f]]))
    return np.array(columns)


def equal_weights(clients: int) -> Tensor:
    return torch.full((clients,), 1 / clients, dtype=torch.float64)


RULES: dict[str, tuple[RobustAggregation, Callable[[Rows], Rows]]] = {
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
@pytest.mark.parametrize("malicious", [0, 2])
def test_rules_equal_the_papers_words(name: str, clients: int, malicious: int) -> None:
    rows = np.random.default_rng(clients).standard_normal((clients, 7)).astype(np.float32)
    rows[:malicious] += 50
    rule, reference = RULES[name]
    chosen = rule.aggregate(torch.from_numpy(rows), equal_weights(clients)).double().numpy()
    np.testing.assert_allclose(chosen, reference(rows.astype(np.float64)), atol=1e-6)
    if malicious and name != "Bulyan of 1":
        assert np.abs(chosen).max() < 5


def test_krum_chooses_the_update_that_scores_by_hand_give() -> None:
    rows = torch.tensor([[0.0], [1.0], [3.0], [3.5], [100.0]])
    # One malicious client: two neighbours. Scores 10, 5, 4.25, 6.5 and a large one.
    assert Krum(attackers=1).aggregate(rows, equal_weights(5)).tolist() == [3.0]
    assert MultiKrum(attackers=1, keep=2).aggregate(rows, equal_weights(5)).tolist() == [2.0]


def test_unit_vectors_from_the_geometric_median_to_the_updates_sum_to_zero() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32))
    rows[:4] += 1000
    point = GeometricMedian().aggregate(rows, equal_weights(9))
    summed = torch.nn.functional.normalize(rows.double() - point, dim=1).sum(0)
    assert summed.norm() < 1e-3
    on_a_line = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    middle = GeometricMedian().aggregate(on_a_line, equal_weights(3)).float()
    torch.testing.assert_close(middle, torch.ones(2), atol=1e-4, rtol=0)


# ---- breakdown points: as many malicious clients as a rule promises to stand, at any magnitude ----

PROMISES: dict[str, tuple[RobustAggregation, int, int]] = {
    "GeometricMedian": (GeometricMedian(), 9, 4),
    "GeometricMedian, even": (GeometricMedian(), 10, 4),
    "GeometricMedian, one": (GeometricMedian(), 10, 1),
    "CoordinateMedian": (CoordinateMedian(), 9, 4),
    "CoordinateMedian, even": (CoordinateMedian(), 10, 4),
    "TrimmedMean": (TrimmedMean(beta=0.3), 10, 3),
    "TrimmedMean, most": (TrimmedMean(beta=0.45), 11, 4),
    "Krum": (Krum(attackers=2), 7, 2),
    "MultiKrum": (MultiKrum(attackers=2), 7, 2),
    "Bulyan": (Bulyan(attackers=1), 7, 1),
    "Bulyan of 2": (Bulyan(attackers=2), 11, 2),
}
"""Rules, with n clients and the most of them that may be malicious."""
DIRECTIONS: dict[str, Callable[[Rows], Rows]] = {
    "together": np.ones_like,
    "apart": np.sign,
    "one coordinate": lambda signs: np.eye(*signs.shape),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("magnitude", [1e2, 1e12, 1e19, 3e38])
@pytest.mark.parametrize("name", PROMISES)
def test_as_many_malicious_clients_as_a_rule_promises_cannot_move_it_far(
    name: str, magnitude: float, direction: str
) -> None:
    rule, clients, malicious = PROMISES[name]
    rng = np.random.default_rng(clients)
    rows = (5 + rng.standard_normal((clients, 6))).astype(np.float32)
    honest = rows[malicious:].astype(np.float64)
    signs = rng.standard_normal((malicious, 6))
    rows[:malicious] = (magnitude * DIRECTIONS[direction](signs)).astype(np.float32)
    stack = rule.accumulator({"update": 6, "buffers": 0}, clients, torch.zeros(6), torch.zeros(0).long())
    for client, row in enumerate(torch.from_numpy(rows)):
        assert stack.add(client, ClientUpdate({"update": row}, 0.1), row[:0], 0.1, torch.zeros(0).long())
    found = stack.result()["update"].double().numpy()
    centre = honest.mean(0)
    spread = np.linalg.norm(honest - centre, axis=1).max()
    # Lopuhaä and Rousseeuw, 1991: a geometric median stays within 2 (n − f)/(n − 2f) of the honest spread.
    factor = 2 * (clients - malicious) / (clients - 2 * malicious)
    assert np.linalg.norm(found - centre) <= factor * spread
    if not isinstance(rule, GeometricMedian):
        assert (found >= honest.min(0) - 1e-6).all()
        assert (found <= honest.max(0) + 1e-6).all()
    else:  # its first-order condition: at the minimum unit vectors to all updates cancel
        towards = rows.astype(np.float64) - found
        lengths = np.linalg.norm(towards, axis=1, keepdims=True)
        assert np.linalg.norm((towards / lengths).sum(0)) < 1e-3


@pytest.mark.parametrize(
    "rule", [CoordinateMedian(), TrimmedMean(beta=0.0), GeometricMedian(), Krum(attackers=0)]
)
def test_clients_without_examples_have_no_vote(rule: RobustAggregation) -> None:
    stack = rule.accumulator({"update": 2, "buffers": 1}, 9, torch.zeros(2), torch.zeros(1).long())
    counter = torch.tensor([3])
    for client in range(9):
        learner = client >= 6
        update = ClientUpdate({"update": torch.full((2,), 2.5 * learner)}, 1 / 9)  # uniform weights
        stack.add(client, update, torch.full((1,), 1.5 * learner), learner / 3, counter)
    assert stack.counts.tolist() == [3, 0, 0]
    aggregated = stack.result()
    assert aggregated.clients == 3
    torch.testing.assert_close(aggregated["update"], torch.full((2,), 2.5))
    assert aggregated["buffers"].tolist() == [1.5]


class OneLearner(Partition):
    """All examples belong to client 1."""

    def min_examples_for(self, clients: int) -> int:
        return 0

    def assign(self, labels: Any, clients: int, rng: Any, ids: Any) -> Split:
        return Split.from_owners(np.ones(len(labels), dtype=np.int64), clients)


def test_a_model_moves_by_its_only_learner_among_empty_clients() -> None:
    data = DataConfig(clients=6, partition=OneLearner())
    config = rig.config_of(FedAvg(), rig.LOCAL, data=data, cohort=CohortConfig(size=6), rounds=1)
    starts = torch.nn.utils.parameters_to_vector(ref.net().parameters()).detach()
    moved = []
    for rule in (Mean(), CoordinateMedian()):
        run = dataclasses.replace(config, aggregation=rule)
        result = Federation(run, module=ref.net(), train=ref.Pixels()).run()
        moved.append(torch.nn.utils.parameters_to_vector(result.model.parameters()).detach() - starts)
        assert result.history[0]["clients/aggregated"] == (6 if rule == Mean() else 1)
    assert moved[0].norm() > 0.05
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-6)


# ---- in rounds: any number of groups, stopped and resumed ----

FIVE = CohortConfig(size=5)
CONFIGS = {
    name: rig.config_of(algorithm, local, "norm" in name, aggregation=rule, attacks=attack, cohort=FIVE)
    for name, algorithm, local, rule, attack in (
        ("Mean", FedAvg(), rig.LOCAL, Mean(clip_norm=0.5), ModelReplacement(fraction=0.2)),
        ("CoordinateMedian and norm", FedAvg(), rig.NORM, CoordinateMedian(), GaussianNoise(fraction=0.4)),
        ("TrimmedMean", FedAvg(momentum=0.5), rig.LOCAL, TrimmedMean(), SignFlip(fraction=0.2)),
        ("Krum and norm", FedAvg(), rig.NORM, Krum(), LabelFlip(fraction=0.2)),
        ("MultiKrum", FedProx(mu=0.5), rig.LOCAL, MultiKrum(clip_norm=0.5), SignFlip(fraction=0.2)),
        ("Bulyan", FedAvg(), rig.LOCAL, Bulyan(attackers=0), NoAttack()),
        ("GeometricMedian", FedAvg(), rig.LOCAL, GeometricMedian(), GaussianNoise(fraction=0.4)),
    )
}


def test_bits_do_not_depend_on_the_number_of_groups_nor_on_a_resume(tmp_path: Path) -> None:
    def results(groups: int, ranks: int, stop: bool = False) -> dict[str, rig.Trained]:
        folder = str(tmp_path / f"{groups}x{ranks}-{stop}")
        # What pairs of ranks send is the same for every rule: with buffers, and without.
        names = CONFIGS if ranks == 1 else ("Krum and norm", "MultiKrum")
        return rig.train_in_world({name: CONFIGS[name] for name in names}, groups, ranks, folder, stop)

    alone = results(1, 1)
    for other in (results(2, 1), results(1, 1, stop=True)):
        for name in CONFIGS:
            rig.assert_same_bits(alone[name], other[name])
    one_group, two_groups = results(1, 2), results(2, 2)
    for name in one_group:
        rig.assert_same_bits(one_group[name], two_groups[name])
        torch.testing.assert_close(one_group[name][0], alone[name][0], rtol=0, atol=1e-5)


def test_float_buffers_are_aggregated_by_median_and_integer_buffers_by_maximum() -> None:
    like, integer_buffers = torch.zeros(2), torch.zeros(1, dtype=torch.int64)
    updates = Krum(attackers=0).accumulator({"update": 2, "buffers": 1}, 3, like, integer_buffers)
    for client, value in ((7, 1.0), (2, 5.0), (4, 1e9)):
        update = {"update": torch.full((2,), value)}
        updates.add(client, ClientUpdate(update, 0.1), torch.tensor([value]), 0.1, integer_buffers - client)
    aggregated = updates.result()
    assert aggregated["buffers"].tolist() == [5.0]
    assert aggregated["update"].tolist() in ([1.0] * 2, [5.0] * 2)
    assert updates.integer_buffers.tolist() == [-2]
    assert aggregated.clients == 3


# ---- a rule of one's own ----


SEEN: list[list[float]] = []
"""The weights that `Middle` was given, by round; on the coordinator."""


class Middle(RobustAggregation):
    """The update of the client in the middle of the cohort; without the dataclass decorator."""

    def aggregate(self, updates: Tensor, weights: Tensor) -> Tensor:
        SEEN.append(weights.tolist())
        return updates[len(updates) // 2]


def train_with_middle(folder: str) -> tuple[rig.Trained, list[list[float]]]:
    SEEN.clear()
    config = rig.config_of(FedAvg(), rig.LOCAL, aggregation=Middle())
    return rig.train({"Middle": config}, 1, folder)["Middle"], SEEN


def test_an_own_rule_is_given_updates_and_weights_ordered_by_client(tmp_path: Path) -> None:
    one, two = (run_world(train_with_middle, str(tmp_path / f"{n}"), size=n)[0] for n in (1, 2))
    rig.assert_same_bits(one[0], two[0])
    reference = ref.Reference(rig.config_of(FedAvg(), rig.LOCAL))
    x, weights = reference.w0, []
    for cohort in reference.cohorts():
        weights.append(reference.p(cohort))
        x, _ = reference.train(x, cohort[len(cohort) // 2])
    assert one[1] == two[1] == weights
    assert all(len({*row}) > 1 for row in weights)
    torch.testing.assert_close(one[0][0].double(), x, rtol=0, atol=1e-5)
    assert (x - reference.w0).norm() > 0.05  # training moved the model


# ---- attacks ----


def final_accuracy(**changes: Any) -> float:
    """Return the accuracy at the end of a run of ten clients on digits, with a small convolutional net."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)]
        net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *head)
    config = Config(
        data=DataConfig(dataset="digits", clients=10, partition=IID()),
        local=LocalConfig(epochs=1, batch_size=16, lr=0.2, schedule="cosine"),
        cohort=CohortConfig(size=10),
        evaluation=EvaluationConfig(every=20),
        rounds=20,
        tracking=TrackingConfig(trackers=[], progress=False),
        **changes,
    )
    result = Federation(config, module=net).run()
    assert result.finished, "something asked the run to stop, such as `timeout` around the tests"
    return float(result.history[-1]["eval/accuracy"])


def test_sign_flips_break_the_mean_but_not_trimmed_mean_nor_multi_krum() -> None:
    attacks = SignFlip(fraction=0.3)
    honest = final_accuracy()
    assert honest > 0.95
    assert final_accuracy(attacks=attacks) < 0.3
    for rule in (TrimmedMean(beta=0.3), MultiKrum(attackers=3)):
        assert final_accuracy(attacks=attacks, aggregation=rule) > honest - 0.03


@pytest.mark.parametrize("name", ["SignFlip", "GaussianNoise", "ModelReplacement", "LabelFlip"])
def test_malicious_clients_are_a_function_of_the_seed_and_change_their_updates_or_labels(name: str) -> None:
    config = load_config("digits", f"--attacks {name} --attacks.fraction 0.25 --data.holdout 0.2".split())
    attack = config.attacks
    malicious = attack.malicious(20, config.seed)
    assert malicious.tolist() == attack.malicious(20, config.seed).tolist()
    assert len(malicious) == 5
    assert malicious.tolist() != attack.malicious(20, config.seed + 1).tolist()
    update = torch.arange(1.0, 1001.0)
    honest = ClientUpdate({"update": update, "control": update}, 0.25)
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


def test_model_replacement_scales_by_its_setting_or_by_the_clients_weight_in_the_cohort() -> None:
    honest = ClientUpdate({"update": torch.tensor([1.0, -2.0])}, 0.125)
    for attack, factor in ((ModelReplacement(), 8.0), (ModelReplacement(scale=3.0), 3.0)):
        sent = attack.corrupt(honest, np.random.default_rng(0)).vectors["update"]
        assert sent.tolist() == [factor, -2 * factor]
    attacks = (ModelReplacement(), ModelReplacement(scale=3.0), SignFlip(), LabelFlip())
    assert [attack.needs_cohort for attack in attacks] == [True, False, False, False]


def clients_with_flipped_labels(folder: str) -> tuple[list[int], list[int]]:
    """Return the clients whose training labels, and those whose held-out labels, are not the true ones."""
    flags = ["--attacks", "LabelFlip", "--attacks.fraction", "0.25", "--data.holdout", "0.2"]
    config = load_config("digits", flags)
    honest = dataclasses.replace(config, attacks=NoAttack())
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        flipped, true = (rig.session_of(c, world, Path(folder), Objects()) for c in (config, honest))

    def differing(part: int) -> list[int]:
        shares = {
            k: holdout(true.split.indices(k), config.data.holdout, k, config.seed)[part] for k in range(20)
        }
        old, new = true.train.images.labels, flipped.train.images.labels
        assert all((new[i] == 9 - old[i]).all() or (new[i] == old[i]).all() for i in shares.values())
        return [k for k, i in shares.items() if len(i) and not (new[i] == old[i]).all()]

    assert sorted(flipped.malicious) == differing(0)
    return differing(0), differing(1)


def test_label_flips_change_the_training_labels_of_malicious_clients_only(tmp_path: Path) -> None:
    ((training, held_out),) = run_world(clients_with_flipped_labels, str(tmp_path), size=1)
    assert len(training) == 5
    assert not held_out


# ---- combinations that cannot work ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        *[
            (f"--algorithm {name} --aggregation {rule}", f"aggregation={rule} .* {name}, .*; use Mean")
            for name, rule in itertools.product(
                ("SCAFFOLD", "FedDyn", "FedNova", "QFedAvg"), ("Krum", "TrimmedMean")
            )
        ],
        ("--aggregation Krum --aggregation.attackers 4", "Krum needs at least 11 .*cohort.size=10"),
        ("--aggregation Bulyan --aggregation.attackers 2", "Bulyan needs at least 11 .*cohort.size=10"),
        ("--aggregation MultiKrum --cohort.sampling poisson", "MultiKrum needs .* use sampling=fixed"),
        ("--aggregation TrimmedMean --aggregation.beta 0.5", r"beta must be in \[0, 0.5\), got 0.5"),
        (
            "--aggregation Krum --aggregation.sums float32",
            "aggregation.sums.*sums is a setting of Mean, not of Krum; choose another",
        ),
        ("--aggregation Krum --aggregation.attackers -1", "attackers must be >= 0"),
        ("--aggregation MultiKrum --aggregation.keep 0", "keep must be >= 1"),
        ("--attacks SignFlip --attacks.fraction 1", r"fraction must be in \[0, 1\), got 1"),
        ("--attacks SignFlip --attacks.scale 0", "scale must be > 0"),
        ("--attacks.fraction 0.2", "fraction=0.2 needs an attack; choose"),
    ],
)
def test_rules_and_attacks_that_cannot_work_are_refused_in_one_line(flags: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_config("digits", flags.split())
    assert "\n" not in str(refused.value)


def test_the_default_is_the_mean_without_attacks() -> None:
    assert Config().aggregation == Mean()
    assert Config().attacks == NoAttack()
