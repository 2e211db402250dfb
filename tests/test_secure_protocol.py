"""The protocol of secure aggregation: what the coordinator receives, drop-outs, refusals, sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from fedddp import ConfigError
from fedddp.aggregation import InvalidUpdateError, Mean
from fedddp.algorithms import ClientUpdate
from fedddp.distributed.world import World
from fedddp.secure import SecAgg, SecAggPlus, SecureAggregation
from fedddp.secure.client import PublicKeys, RefusedError, SecureClient
from fedddp.secure.coordinator import Inbox, connected, recoverable, unmask
from fedddp.secure.masked_sums import MaskedSums
from fedddp.secure.messages import NUMBERS, traffic, vector_length
from fedddp.secure.protocol import SecureSum
from fedddp.secure.settings import Drop

LENGTH = 20_000


class Alone:
    """A world of one rank, as far as the protocol uses it."""

    is_coordinator = True

    def gather(self, value: object) -> list[Any]:
        return [value]

    def sum(self, *tensors: Tensor) -> None:
        pass


ALONE = cast(World, Alone())


class Recorder(Inbox):
    """An inbox that keeps each client's masked vector."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.vectors: dict[int, Tensor] = {}

    def receive_masked(self, client: int, vector: Tensor) -> None:
        self.vectors[client] = vector.clone()
        super().receive_masked(client, vector)


def secure_sum(
    settings: SecureAggregation, clients: Collection[int], drops: Mapping[int, Drop], length: int
) -> SecureSum:
    run = SecureSum(
        ALONE,
        settings,
        settings.neighbours(sorted(clients), 3, 7),
        hosted=clients,
        drops=drops,
        context="run|7",
        length=length,
    )
    run.inbox = Recorder(length)
    return run


def updates(clients: Collection[int], length: int) -> dict[int, Tensor]:
    """Return vectors like those of clients: small fixed-point numbers, with their sign bits."""
    draw = torch.Generator().manual_seed(len(clients))
    return {k: (torch.randn(length, generator=draw) * 2.0**30).long() for k in clients}


def run_all(run: SecureSum, vectors: Mapping[int, Tensor]) -> Tensor | None:
    run.open()
    for client, vector in vectors.items():
        if not run.problem and run.drops.get(client, Drop.UNMASKING) == Drop.UNMASKING:
            run.deliver(client, vector.clone())
    return run.close()


# ---- what the coordinator receives ----


def assert_looks_random(vector: Tensor) -> None:
    """χ² tests of the bits: each of the 64 positions, and the bytes; false alarms in 1 of 10^8.

    Keys and masks are secret, so that each run of the tests draws others.
    """
    bits = np.unpackbits(vector.numpy().view(np.uint8)).reshape(len(vector), 64)
    ones, expected = bits.sum(0), len(vector) / 2
    # 64 positions, each with a binomial count: 64 degrees of freedom; 64 ± 8 standard deviations of √128.
    assert abs(float((2 * (ones - expected) ** 2 / expected).sum()) - 64) < 8 * math.sqrt(128)
    counts = np.bincount(vector.numpy().view(np.uint8), minlength=256)
    chi_squared = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert abs(chi_squared - 255) < 8 * math.sqrt(510)


def assert_uncorrelated(masked: Tensor, vector: Tensor) -> None:
    correlation = np.corrcoef(masked.double().numpy(), vector.double().numpy())[0, 1]
    assert abs(correlation) < 7 / math.sqrt(len(vector))


SETTINGS = {"SecAgg": SecAgg(), "SecAggPlus": SecAggPlus(neighbours_per_client=2)}


@pytest.fixture(scope="module", params=SETTINGS)
def finished(request: pytest.FixtureRequest) -> tuple[Recorder, dict[int, Tensor]]:
    clients = (2, 3, 5, 8, 13)
    vectors = updates(clients, LENGTH)
    run = secure_sum(SETTINGS[request.param], clients, {}, LENGTH)
    total = run_all(run, vectors)
    assert total is not None
    assert torch.equal(total, torch.stack([*vectors.values()]).sum(0))
    return cast(Recorder, run.inbox), vectors


def test_the_tests_of_randomness_find_updates() -> None:
    vector = updates((1,), LENGTH)[1]
    with pytest.raises(AssertionError):
        assert_looks_random(vector)
    with pytest.raises(AssertionError):
        assert_uncorrelated(vector + (torch.randn(LENGTH) * 2.0**33).long(), vector)


def test_masked_vectors_look_random_and_do_not_correlate_with_the_updates(
    finished: tuple[Recorder, dict[int, Tensor]],
) -> None:
    inbox, vectors = finished
    assert inbox.vectors.keys() == vectors.keys()
    for masked in inbox.vectors.values():
        assert_looks_random(masked)
        for vector in vectors.values():
            assert_uncorrelated(masked, vector)


def test_the_sum_of_any_proper_subset_stays_masked(finished: tuple[Recorder, dict[int, Tensor]]) -> None:
    inbox, vectors = finished
    for size in range(1, len(vectors)):
        for some in itertools.combinations(vectors, size):
            masked = torch.stack([inbox.vectors[client] for client in some]).sum(0)
            assert_looks_random(masked)
            assert_uncorrelated(masked, torch.stack([vectors[client] for client in some]).sum(0))


def test_without_the_seeds_even_the_sum_of_all_stays_masked() -> None:
    vectors = updates(range(4), LENGTH)
    run = secure_sum(SecAgg(), range(4), {}, LENGTH)
    run.open()
    for client, vector in vectors.items():
        run.deliver(client, vector.clone())
    assert_looks_random(run.inbox.total)


def test_the_coordinator_receives_exactly_one_secret_of_each_client() -> None:
    drops = {0: Drop.UPDATE, 1: Drop.UNMASKING}
    run = secure_sum(SecAgg(), range(6), drops, 4)
    clients = dict(run.clients)
    assert run_all(run, updates(range(6), 4)) is not None
    for client, revealed in run.inbox.revealed.items():
        assert len(revealed) == 4
        for holder, share in revealed.items():
            key_share, seed_share = clients[holder - 1]._held[client]
            assert share == (key_share if client == 0 else seed_share)
            assert key_share != seed_share


def test_secrets_are_drawn_again_in_every_round() -> None:
    runs = [secure_sum(SecAgg(), range(4), {}, 1) for _ in range(2)]
    for run in runs:
        run.open()
    first, second = (run.inbox for run in runs)
    keys = [key for inbox in (first, second) for both in inbox.keys.values() for key in both]
    assert len(set(keys)) == 2 * 4 * 2
    sealed = [
        message for inbox in (first, second) for part in inbox.sealed.values() for message in part.values()
    ]
    assert len(set(sealed)) == 2 * 4 * 3
    seeds = [client._seed for run in runs for client in run.clients.values()]
    assert len(set(seeds)) == 8
    for run in runs:
        run.deliver(0, torch.zeros(1, dtype=torch.int64))
    assert not torch.equal(first.total, second.total)


# ---- drop-outs ----


def drop_sets(clients: int, most: int) -> Iterator[dict[int, Drop]]:
    """Yield who of `clients` drops out and where, for every set of at most `most`."""
    for count in range(most + 1):
        for some in itertools.combinations(range(clients), count):
            for points in itertools.product(Drop, repeat=count):
                yield dict(zip(some, points, strict=True))


def summed(vectors: Mapping[int, Tensor], drops: Mapping[int, Drop]) -> Tensor:
    alive = [v for k, v in vectors.items() if drops.get(k, Drop.UNMASKING) == Drop.UNMASKING]
    return torch.stack(alive).sum(0)


@pytest.mark.parametrize(("clients", "threshold"), [(4, 0.75), (5, 0.6), (5, 0.8)])
def test_any_drop_set_up_to_n_minus_t_equals_the_survivors_sum_and_one_more_is_refused(
    clients: int, threshold: float
) -> None:
    settings = SecAgg(threshold=threshold)
    needed = settings.needed(clients)
    assert needed == {4: 3, 5: round(threshold * 5)}[clients]
    vectors = updates(range(clients), 5)
    for drops in drop_sets(clients, clients - needed + 1):
        run = secure_sum(settings, range(clients), drops, 5)
        total = run_all(run, vectors)
        if len(drops) <= clients - needed:
            assert total is not None
            assert torch.equal(total, summed(vectors, drops)), drops
        else:
            assert total is None
            assert run.problem, drops


def test_neighbours_of_secagg_plus_recover_what_enough_of_them_hold() -> None:
    settings, clients = SecAggPlus(neighbours_per_client=2), range(6)
    vectors, seen = updates(clients, 5), set()
    for drops in drop_sets(6, 2):
        run = secure_sum(settings, clients, drops, 5)
        total = run_all(run, vectors)
        gone = set(drops)
        needs = [k for k in clients if drops.get(k) != Drop.SHARES]  # whose secrets are needed
        enough = all(len(set(run.holders[k]) - gone) >= 2 for k in needs)
        # On the ring, two clients that are gone leave two parts, unless they are side by side.
        late = {k for k in gone if drops[k] != Drop.UNMASKING}
        whole = len(late) < 2 or bool(late & {o for k in late for o in run.neighbours[k]})
        assert (total is not None) == (enough and whole), drops
        seen.add((enough, whole))
        if total is not None:
            assert torch.equal(total, summed(vectors, drops)), drops
    assert seen == {(True, True), (True, False), (False, True), (False, False)}


def test_a_part_of_the_clients_is_never_unmasked_apart_from_the_others() -> None:
    """0-1-2-3-4-5 on a ring: without 0 and 3 each of 1, 2 and 4, 5 would be a sum of its own."""
    ring = {k: [(k - 1) % 6, (k + 1) % 6] for k in range(6)}
    settings, vectors = SecAggPlus(neighbours_per_client=2), updates(range(6), 5)
    run = SecureSum(
        *(ALONE, settings, ring),
        hosted=range(6),
        drops={0: Drop.UPDATE, 3: Drop.UPDATE},
        context="",
        length=5,
    )
    assert run_all(run, vectors) is None
    assert run.problem.startswith("no masks connect all of the 4 clients that sent an update")
    assert run.inbox.revealed == {}  # no client answered, so nothing can be unmasked
    assert [connected(some, ring) for some in ([], [2], [1, 2, 3], [5, 0], [1, 3])] == [*[True] * 4, False]


def test_too_few_clients_abandon_the_round_before_they_train() -> None:
    run = secure_sum(SecAgg(), range(5), dict.fromkeys((0, 1, 2), Drop.SHARES), 1)
    run.open()
    assert run.problem == "2 of 5 clients sent shares, fewer than 3"
    run = secure_sum(SecAgg(threshold=1), range(5), {4: Drop.SHARES}, 1)
    run.open()
    assert "4 of 5 clients sent shares, too few for the 5 shares" in run.problem
    assert run.close() is None


def test_drop_outs_are_a_function_of_the_seed_the_round_and_the_client() -> None:
    settings = SecAgg(drop_before_shares=0.2, drop_before_update=0.2, drop_before_unmasking=0.2)
    drops = settings.drops(range(3000), 1, 2)
    assert drops == settings.drops(range(3000), 1, 2)
    assert {k: drops[k] for k in (5, 7) if k in drops} == settings.drops([5, 7], 1, 2)
    assert drops != settings.drops(range(3000), 1, 3)
    counts = [sum(point == one for point in drops.values()) for one in Drop]
    for count, share in zip(counts, (0.2, 0.8 * 0.2, 0.64 * 0.2), strict=True):
        assert abs(count / 3000 - share) < 0.03
    assert SecAgg().drops(range(100), 1, 2) == {}


# ---- refusals ----


@pytest.fixture
def three() -> dict[int, SecureClient]:
    """Three clients that have exchanged shares."""
    clients = {k: SecureClient(k, "run|1", 2) for k in (1, 2, 3)}
    keys = {k: client.keys() for k, client in clients.items()}
    sealed = {k: c.share({o: keys[o] for o in keys if o != k}) for k, c in clients.items()}
    for k, client in clients.items():
        client.receive({o: sealed[o][k] for o in clients if o != k})
    return clients


@pytest.mark.parametrize(
    ("arrived", "dropped", "reason"),
    [
        ([1, 2, 3], [3], "names client 3 both as arrived and as dropped"),
        ([1, 2], [], "other clients than those that sent shares"),
        ([1, 2, 4], [3], "other clients"),
        ([1], [2, 3], "1 clients arrived, but 2 are needed"),
    ],
)
def test_a_client_refuses_a_request_that_would_reveal_too_much(
    three: dict[int, SecureClient], arrived: list[int], dropped: list[int], reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        three[1].reveal(arrived, dropped)
    assert three[1].reveal([1, 2, 3], []).keys() == {1, 2, 3}


def test_a_client_refuses_a_second_request_and_a_second_vector(three: dict[int, SecureClient]) -> None:
    three[1].mask(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RefusedError, match="masks are used once"):
        three[1].mask(torch.zeros(2, dtype=torch.int64))
    three[1].reveal([1, 2], [3])
    with pytest.raises(RefusedError, match="second request"):
        three[1].reveal([1, 2, 3], [])


def test_a_client_refuses_equal_keys_strangers_and_too_few_shares() -> None:
    clients = {k: SecureClient(k, "run|1", 2) for k in (1, 2, 3)}
    keys = {k: client.keys() for k, client in clients.items()}
    with pytest.raises(RefusedError, match="same key"):
        clients[1].share({2: keys[2], 3: keys[2]})
    with pytest.raises(RefusedError, match="same key"):
        clients[1].share({2: PublicKeys(keys[2].sharing, keys[2].sharing)})
    with pytest.raises(RefusedError, match="1 clients cannot hold"):
        clients[1].share({})
    clients[1].share({2: keys[2], 3: keys[3]})
    with pytest.raises(RefusedError, match="no neighbour"):
        clients[1].receive({4: b""})
    with pytest.raises(RefusedError, match="1 of the needed 2 clients"):
        clients[1].receive({})


def test_the_coordinator_refuses_shares_that_do_not_fit() -> None:
    run = secure_sum(SecAgg(), range(4), {0: Drop.UPDATE}, 3)
    assert run_all(run, updates(range(4), 3)) is not None
    partners = {k: [o for o in range(4) if o != k] for k in range(4)}
    run.inbox.revealed[0] = {point: share + 1 for point, share in run.inbox.revealed[0].items()}
    with pytest.raises(ValueError, match="client 0 recover (no secret|another key)"):
        unmask(run.inbox, "run|7", partners, run.thresholds)
    del run.inbox.revealed[0]
    with pytest.raises(ValueError, match="0 of 3 shares of a secret of client 0"):
        unmask(run.inbox, "run|7", partners, run.thresholds)


# ---- settings ----


@pytest.mark.parametrize("holders", range(1, 40))
@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.9, 1.0])
def test_more_than_half_of_the_shares_are_needed(holders: int, threshold: float) -> None:
    needed = SecAgg(threshold=threshold).needed(holders)
    assert holders / 2 < needed <= holders
    assert needed >= threshold * holders - 1e-9


@pytest.mark.parametrize("clients", [1, 2, 3, 6, 7, 30, 101, 1000])
@pytest.mark.parametrize("k", ["auto", 2, 6])
def test_neighbours_are_a_shuffled_ring(clients: int, k: Any) -> None:
    settings = SecAggPlus(neighbours_per_client=k)
    graph = settings.neighbours([3 * c for c in range(clients)], 5, 1)
    degree = min(clients - 1, 2 * math.ceil(2 * math.log2(max(clients, 2))) if k == "auto" else k)
    assert graph.keys() == {3 * c for c in range(clients)}
    for client, others in graph.items():
        assert len(others) == len(set(others)) == degree
        assert client not in others
        assert all(client in graph[other] for other in others)
    reached, frontier = {0}, {0}
    while frontier:
        frontier = {other for client in frontier for other in graph[client]} - reached
        reached |= frontier
    assert reached == graph.keys()
    if clients > 30 and k == 6:
        assert graph != settings.neighbours([3 * c for c in range(clients)], 5, 2)


def test_odd_numbers_of_neighbours_and_low_thresholds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"secure_aggregation\.neighbours_per_client must be even, got 3"):
        SecAggPlus(neighbours_per_client=3)
    with pytest.raises(ConfigError, match=r"secure_aggregation\.threshold must be in \[0\.5, 1\], got 0\.4"):
        SecAgg(threshold=0.4)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_bytes_are_those_of_the_messages(settings: SecureAggregation) -> None:
    run = secure_sum(settings, range(7), {}, 11)
    run_all(run, updates(range(7), 11))
    degree = settings.degree(7)
    inbox = run.inbox
    sent = sum(len(key) for keys in inbox.keys.values() for key in keys)
    sent += sum(len(message) for part in inbox.sealed.values() for message in part.values())
    sent += 7 * 11 * 8 + sum(8 + 66 for shares in inbox.revealed.values() for _ in shares)
    assert run.bytes_up == sent == 7 * traffic(11, degree)[0]
    assert run.bytes_down == 7 * traffic(11, degree)[1]


# ---- sums of updates ----


def masked_sums(clients: int, **settings: Any) -> MaskedSums:
    sums = MaskedSums(
        Mean(**settings), {"update": 3, "buffers": 2}, clients, torch.zeros(1), torch.tensor([5, 0])
    )
    run = secure_sum(SecAgg(), range(clients), {}, sums.length)
    sums.begin(run)
    return sums


def add(sums: Any, client: int, vector: Tensor, weight: float = 0.3, loss: float = 2.5) -> bool:
    update = ClientUpdate({"update": vector}, weight)
    steps = torch.tensor([5 + client, 4])
    added: bool = sums.add(client, update, vector[:2] / 7, weight / 2, steps, loss, (10.0 + client, 3))
    return added


def test_masked_sums_are_the_plain_sums_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(1)
    vectors = [torch.randn(3, generator=draw) * 10.0**power for power in (-6, 0, 3, 4)]
    masked = masked_sums(4)
    plain = Mean().accumulator({"update": 3, "buffers": 2}, 4, torch.zeros(1), torch.zeros(2).long())
    for client, vector in enumerate(vectors):
        assert add(masked, client, vector, 0.1 + client / 7)
        assert add(plain, client, vector, 0.1 + client / 7)
        assert masked.counts.tolist() == [0, 0, 0]
    masked.finish(ALONE)
    ours, theirs = masked.result(), plain.result()
    assert ours.clients == theirs.clients == 4
    for name in ("update", "buffers"):
        assert torch.equal(ours[name], theirs[name])
    assert (masked.loss, masked.loss_count, masked.steps) == (10.0, 46.0, 12)
    # Changes of 0, 1, 2 and 3 are advanced by their mean, rounded up; equal ones by what they are.
    assert masked.integer_buffers.tolist() == [5 + 2, 4]
    assert plain.integer_buffers.tolist() == [5 + 3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38, 1e7])
def test_an_invalid_update_drops_out_before_masking(value: float) -> None:
    good, bad = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, value, 3.0])
    sums = masked_sums(4, on_invalid_update="skip")
    assert [add(sums, client, bad if client == 1 else good) for client in range(4)] == [
        True,
        False,
        True,
        True,
    ]
    sums.finish(ALONE)
    assert sums.result().clients == 3
    torch.testing.assert_close(sums.result()["update"], good)
    stopping = masked_sums(4)
    with pytest.raises(InvalidUpdateError, match="client 2"):
        add(stopping, 2, bad)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e13])
def test_a_loss_that_cannot_be_summed_drops_out_too(loss: float) -> None:
    sums = masked_sums(4, on_invalid_update="skip")
    assert not add(sums, 0, torch.ones(3), loss=loss)
    with pytest.raises(InvalidUpdateError, match="client 0: its training loss"):
        add(masked_sums(4), 0, torch.ones(3), loss=loss)


def test_integer_buffers_that_cannot_be_summed_drop_out_too() -> None:
    update, far = ClientUpdate({"update": torch.ones(3)}, 0.1), torch.tensor([2**60 + 9, 0])
    assert not masked_sums(4, on_invalid_update="skip").add(0, update, torch.ones(2), 0.1, far)
    assert masked_sums(4).add(0, update, torch.ones(2), 0.1, far // 2)
    with pytest.raises(InvalidUpdateError, match="client 0: its integer buffers changed too much"):
        masked_sums(4).add(0, update, torch.ones(2), 0.1, -far)


def test_a_rank_holds_one_vector_however_many_clients_it_has() -> None:
    sums = masked_sums(30)
    assert sums.length == 3 + 2 + 2 + NUMBERS == vector_length({"update": 3}, 2, 2)
    for client in range(30):
        add(sums, client, torch.ones(3))
    assert sums.secure is not None
    held = [v for v in vars(sums.secure.inbox).values() if isinstance(v, Tensor)]
    assert sum(tensor.numel() for tensor in held) == sums.length
    assert not [v for c in sums.secure.clients.values() for v in vars(c).values() if isinstance(v, Tensor)]


def test_recoverable_counts_holders() -> None:
    holders = {1: [1, 2, 3], 2: [2, 3, 4]}
    needed = SecAgg().needed
    assert recoverable(holders, [2, 3], needed)
    assert not recoverable(holders, [1, 2], needed)
    assert recoverable({}, [], needed)
