"""Runs whose updates and models are compressed: bits, bytes, error feedback, resumes, refusals."""

from __future__ import annotations

import dataclasses
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rig
import torch
from numpy.random import Generator
from safetensors.torch import load_file
from torch import Tensor

from fedddp import (
    CheckpointConfig,
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    TopologyConfig,
    TrackingConfig,
    TransportConfig,
    attacks,
    codecs,
    load_config,
)
from fedddp.aggregation import CoordinateMedian, Mean
from fedddp.algorithms import (
    SCAFFOLD,
    Algorithm,
    AsynchronousAlgorithm,
    AsyncSGD,
    ClientUpdate,
    FedAsync,
    FedAvg,
    FedBN,
    FedBuff,
    FedNova,
    FedPer,
    ServerState,
)
from fedddp.config.loader import to_yaml
from fedddp.reporting.dry_run import dry_run
from fedddp.section import choices
from fedddp.testing import run_world
from fedddp.transport.links import HAD, SENT, Links

UP: dict[str, codecs.Codec] = {
    "Cast": codecs.Cast(),
    "Int8": codecs.Int8(),
    "QSGD": codecs.QSGD(levels=7, bucket=64),
    "TopK": codecs.TopK(fraction=0.1),
    "Sign": codecs.Sign(),
    "EDEN": codecs.EDEN(bits=2),
}
BASE = Config(
    data=DataConfig(clients=6, examples=200),
    model=ModelConfig(name="2nn"),
    local=LocalConfig(steps=2, batch_size=16, lr=0.1),
    cohort=CohortConfig(size=3),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=2,
)
P = 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10
"""Parameters of the model."""


def run(config: Config = BASE, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Train; return the history without its seconds, and the model."""
    result = Federation(dataclasses.replace(config, **changes)).run()
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in result.history]
    return rows, load_file(result.folder / "model.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def payloads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the list of all payloads that are encoded in the test."""
    found: list[Tensor] = []
    encode = codecs.Codec.encode

    def recorded(codec: codecs.Codec, vector: Tensor, rng: Generator) -> Tensor:
        found.append(payload := encode(codec, vector, rng))
        return payload

    monkeypatch.setattr(codecs.Codec, "encode", recorded)
    return found


# ---- the same bits ----


def configs() -> dict[str, Config]:
    """Return runs on the data of the references, by name."""
    made = {f"up {name}": TransportConfig(up=codec) for name, codec in UP.items()}
    made |= {f"down {name}": TransportConfig(down=codec) for name, codec in UP.items()}
    runs = {name: rig.config_of(FedAvg(momentum=0.5), rig.LOCAL, transport=t) for name, t in made.items()}
    both = TransportConfig(up=UP["TopK"], down=UP["Sign"])
    return runs | {"SCAFFOLD": rig.config_of(SCAFFOLD(), rig.LOCAL, transport=both)}


def test_compressed_runs_have_the_same_bits_for_any_groups_and_after_a_stop(tmp_path: Path) -> None:
    (one,) = [rig.train_in_world(configs(), 1, 1, str(tmp_path / "one"))]
    two = rig.train_in_world(configs(), 2, 1, str(tmp_path / "two"))
    resumed = run_world(rig.train, configs(), 1, str(tmp_path / "resumed"), True, size=1)[0]
    plain = rig.train_in_world(
        {"plain": rig.config_of(FedAvg(momentum=0.5), rig.LOCAL)}, 1, 1, str(tmp_path / "plain")
    )["plain"]
    for name, trained in one.items():
        rig.assert_same_bits(trained, two[name])
        rig.assert_same_bits(trained, resumed[name])
        assert not torch.equal(trained[0], plain[0]), name
    for name in ("up TopK", "up Sign", "SCAFFOLD"):
        assert all("error.update" in state for state in one[name][1].values())


def test_a_group_of_two_ranks_compresses_the_update_once(tmp_path: Path) -> None:
    """With draws, with errors that are kept, both ways: what each codec does is the same for any ranks."""
    names = ("up QSGD", "up EDEN", "up TopK", "down Int8", "SCAFFOLD")
    some = {name: config for name, config in configs().items() if name in names}
    assert len(some) == len(names)
    for groups in (1, 2):
        pair = rig.train_in_world(some, groups, 2, str(tmp_path / f"pairs {groups}"))
        if groups == 1:
            expected = pair
    for name, trained in pair.items():
        rig.assert_same_bits(trained, expected[name])


def test_a_run_resumed_between_rounds_has_the_same_bits_and_bytes(tmp_path: Path) -> None:
    transport = TransportConfig(up=codecs.Sign(), down=codecs.TopK(fraction=0.1))
    given: dict[str, Any] = {
        "transport": transport,
        "checkpoint": CheckpointConfig(every=1),
        "resume": "auto",
    }
    whole, model = run(**given, rounds=4, output=str(tmp_path / "whole"), name="one")
    run(**given, rounds=2, output=str(tmp_path / "resumed"), name="one")
    rows, resumed = run(**given, rounds=4, output=str(tmp_path / "resumed"), name="one")
    assert rows == whole
    assert same(model, resumed)


# ---- identities ----


def test_all_elements_equal_fedavg_and_many_levels_nearly() -> None:
    plain, model = run()
    rows, same_model = run(transport=TransportConfig(up=codecs.TopK(fraction=1.0)))
    assert same(model, same_model)
    assert [r["bytes/up"] for r in rows] == [r["bytes/up"] + 3 * 8 for r in plain], "the headers"
    _, near = run(transport=TransportConfig(up=codecs.QSGD(levels=32767)))
    assert not same(model, near)
    for name, tensor in model.items():
        torch.testing.assert_close(near[name], tensor, rtol=0, atol=1e-4)


def links(**config: Any) -> Links:
    return Links(TransportConfig(**config), FedAvg(), seed=0)


def dyadic(rng: Generator, length: int) -> Tensor:
    """Return multiples of 1/8, whose sums are exact in float32."""
    return torch.from_numpy(rng.integers(-64, 64, length).astype(np.float32) / 8)


@pytest.mark.parametrize("codec", [codecs.TopK(fraction=0.1), codecs.Sign()], ids=str)
def test_what_was_sent_and_the_error_are_the_sum_of_the_updates(codec: codecs.Codec) -> None:
    """Exactly: on multiples of powers of two no sum is rounded. 4 elements, so that Sign's means are such."""
    rng, state, ways = np.random.default_rng(3), dict[str, Tensor](), links(up=codec)
    length = 100 if isinstance(codec, codecs.TopK) else 4
    sent, updates = torch.zeros(length), torch.zeros(length)
    for number in range(5):
        update = dyadic(rng, length)
        got, _ = ways.received(ClientUpdate({"update": update}, 1.0), state, client=3, number=number)
        sent, updates = sent + got.vectors["update"], updates + update
        assert torch.equal(sent + state["error.update"], updates)
        assert not torch.equal(sent, updates)


def test_error_feedback_is_exact_to_rounding_on_any_numbers() -> None:
    rng, state = np.random.default_rng(4), dict[str, Tensor]()
    ways, total = links(up=codecs.Sign()), torch.zeros(500, dtype=torch.float64)
    for number in range(20):
        update = torch.from_numpy(rng.standard_normal(500).astype(np.float32))
        got, _ = ways.received(ClientUpdate({"update": update}, 1.0), state, client=0, number=number)
        total += got.vectors["update"].double() - update.double()
    torch.testing.assert_close(total, -state["error.update"].double(), rtol=0, atol=1e-5)


def test_streams_depend_on_round_and_client_and_vector() -> None:
    update = ClientUpdate({"update": torch.randn(50), "control": torch.randn(50)}, 1.0)
    update.vectors["control"].copy_(update.vectors["update"])
    ways = links(up=codecs.QSGD(levels=1))
    got = [ways.received(update, {}, client=k, number=n)[0].vectors for k, n in ((0, 0), (0, 1), (1, 0))]
    seen = [vector for vectors in got for vector in vectors.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    again = ways.received(update, {}, client=1, number=0)[0].vectors
    assert all(torch.equal(again[name], got[2][name]) for name in again)


def test_short_vectors_are_sent_as_they_are() -> None:
    update = ClientUpdate({"update": torch.randn(50), "a": torch.tensor([3.25])}, 1.0)
    got, sent = links(up=codecs.Sign()).received(update, {}, client=0, number=0)
    assert torch.equal(got.vectors["a"], update.vectors["a"])
    assert sent == 8 + 4 + math.ceil(50 / 8) + 4


# ---- bytes ----


@pytest.mark.parametrize("name", UP)
def test_bytes_up_are_the_payloads(name: str, payloads: list[Tensor]) -> None:
    rows, _ = run(transport=TransportConfig(up=UP[name]))
    assert len(payloads) == 2 * 3
    assert all(payload.dtype == torch.uint8 for payload in payloads)
    assert [row["bytes/up"] for row in rows] == [sum(map(len, payloads[i : i + 3])) for i in (0, 3)]
    assert rows[0]["bytes/down"] == 3 * 4 * P


def test_bytes_down_are_the_changes_that_a_client_missed_or_the_whole_model(payloads: list[Tensor]) -> None:
    rows, _ = run(transport=TransportConfig(down=codecs.Int8()), rounds=6)
    assert len(payloads) == 6, "one per round"
    had: dict[int, int] = {}
    for number, row in enumerate(rows):
        expected = 0
        for client in row["cohort"]:
            missed = sum(map(len, payloads[had[client] : number])) if client in had else 4 * P
            expected += min(4 * P, missed)
            had[client] = number
        assert row["bytes/down"] == expected
        assert row["bytes/up"] == 3 * 4 * P
    assert len({row["bytes/down"] for row in rows}) > 2


def test_the_coordinator_keeps_the_model_that_clients_decode() -> None:
    ways = links(down=codecs.TopK(k=2))
    server = ServerState(torch.zeros(6), torch.zeros(2), torch.zeros(1, dtype=torch.int64), population=3)
    ways.start(server)
    held, total = server.params.clone(), torch.zeros(6)
    for number in range(4):
        before = ways.snapshot(server)
        step = dyadic(np.random.default_rng(number), 6)
        server.params += step
        total += step
        ways.send_change(server, before, number)
        changed = server.params != held
        assert int(changed.sum()) <= 2
        held = server.params.clone()
        assert torch.equal(held + server.vectors["transport.error.params"], total)
    payload = 8 + 2 * 4 + 1  # a bit for each of six elements
    assert int(server.vectors[SENT]) == 4 * payload
    assert ways.bytes_down(server, [0, 2]) == 2 * (6 * 4 + 2 * 4 + 8)
    assert server.vectors[HAD].tolist() == [4 * payload, -1, 4 * payload]
    assert ways.bytes_down(server, [0]) == 2 * 4 + 8


@pytest.mark.parametrize("algorithm", [FedAvg(), SCAFFOLD(), FedNova()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("name", UP)
def test_the_dry_run_shows_the_bytes_of_the_history(name: str, algorithm: Algorithm) -> None:
    config = dataclasses.replace(
        BASE, algorithm=algorithm, transport=TransportConfig(up=UP[name], down=codecs.Int8()), rounds=1
    )
    names, values = (list(column.cells) for column in dry_run(config, 1).columns)
    shown = str(dict(zip(names, values, strict=True))["bytes per round"])
    (row,), _ = run(config)
    down, up = shown.split(", ")
    for text, number in ((down, row["bytes/down"]), (up, row["bytes/up"])):
        value, unit = text.split()[:2]
        assert float(value) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(number, rel=6e-3)
    assert "to clients of the round before" in down


# ---- every algorithm ----


@pytest.mark.parametrize("name", sorted(n for n in choices(Algorithm) if "." not in n))
def test_every_algorithm_trains_compressed_or_is_refused(name: str) -> None:
    algorithm = FedBuff(buffer_size=2) if name == "FedBuff" else choices(Algorithm)[name]()
    local = dataclasses.replace(BASE.local, **algorithm.requires(BASE.local))
    asynchronous = isinstance(algorithm, AsynchronousAlgorithm)
    codec = codecs.QSGD(levels=7, bucket=64) if asynchronous else codecs.TopK(fraction=0.2)
    transport = TransportConfig(up=codec, down=None if asynchronous else codecs.Int8())
    model = ModelConfig(name="resnet8-gn", norm="batch") if isinstance(algorithm, FedBN) else BASE.model
    data = dataclasses.replace(BASE.data, examples=60) if isinstance(algorithm, FedBN) else BASE.data
    given: dict[str, Any] = {"algorithm": algorithm, "local": local, "model": model, "data": data}
    if isinstance(algorithm, FedAsync):
        with pytest.raises(ConfigError, match="transport.up=QSGD compresses updates, but algorithm=FedAsync"):
            dataclasses.replace(BASE, **given, transport=transport)
        return
    rows, weights = run(**given, transport=transport)
    plain, other = run(**given)
    assert rows[0]["bytes/up"] < 0.75 * plain[0]["bytes/up"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert not same(weights, other)


def test_local_layers_keep_their_initial_values_at_the_server() -> None:
    _, start = run(algorithm=FedPer(), rounds=1, local=LocalConfig(steps=1, lr=1e-30))
    for codec in (codecs.QSGD(), codecs.TopK(fraction=0.5), codecs.Sign(), codecs.EDEN()):
        _, trained = run(algorithm=FedPer(), transport=TransportConfig(up=codec, down=codec))
        kept = [name for name in start if torch.equal(start[name], trained[name])]
        assert len(kept) == 2, "weight and bias of the head"


@pytest.mark.parametrize("algorithm", [FedBuff(buffer_size=2), AsyncSGD()], ids=["FedBuff", "AsyncSGD"])
def test_asynchronous_updates_are_compressed_for_any_groups(algorithm: Algorithm, tmp_path: Path) -> None:
    local = LocalConfig(steps=1, batch_size=4, lr=0.2)
    transport = TransportConfig(up=codecs.EDEN(bits=2))
    runs = {"one": rig.config_of(algorithm, local, transport=transport)}
    one = rig.train_in_world(runs, 1, 1, str(tmp_path / "one"))["one"]
    two = rig.train_in_world(runs, 2, 1, str(tmp_path / "two"))["one"]
    rig.assert_same_bits(one, two)


def test_asynchronous_bytes_are_the_payloads(payloads: list[Tensor]) -> None:
    rows, _ = run(algorithm=FedBuff(), transport=TransportConfig(up=codecs.QSGD()))
    assert [row["bytes/up"] for row in rows] == [sum(map(len, payloads[i : i + 3])) for i in (0, 3)]


# ---- with rules, attacks and invalid updates ----


@pytest.mark.parametrize("name", UP)
def test_an_update_that_is_not_finite_is_left_out_and_its_error_is_not_kept(
    name: str, tmp_path: Path
) -> None:
    class Broken(attacks.Attack):
        """Sends one infinite element."""

        def corrupt(self, update: ClientUpdate, rng: Generator) -> ClientUpdate:
            vector = update.vectors["update"].clone()
            vector[7] = math.inf
            return dataclasses.replace(update, vectors={"update": vector})

    rows, model = run(
        attacks=Broken(fraction=0.5),
        aggregation=Mean(on_invalid_update="skip"),
        cohort=CohortConfig(size=6),
        transport=TransportConfig(up=UP[name]),
        output=str(tmp_path),
        name="one",
    )
    kept = [load_file(path) for path in tmp_path.glob("one/checkpoints/*/clients-*.safetensors")]
    assert len(kept) == UP[name].error_feedback
    assert all(len(state) == 3 and torch.cat([*state.values()]).isfinite().all() for state in kept)
    assert [row["clients/invalid"] for row in rows] == [3, 3]
    assert all(torch.isfinite(tensor).all() for tensor in model.values())


def test_a_malicious_update_is_encoded_and_robust_rules_see_decoded_ones(payloads: list[Tensor]) -> None:
    given: dict[str, Any] = {"attacks": attacks.SignFlip(fraction=0.34), "aggregation": CoordinateMedian()}
    run(**given, transport=TransportConfig(up=codecs.Cast()), cohort=CohortConfig(size=6), rounds=1)
    decoded = [codecs.Cast().decode(payload) for payload in payloads]
    norms = sorted(float(vector.norm()) for vector in decoded)
    assert len(norms) == 6
    assert norms[4] > 2 * norms[3], "two of six send four times their update"


# ---- inside a client group ----


def trained_in_pairs(group: str | None, output: str) -> list[Tensor]:
    transport = TransportConfig(group=group)  # type: ignore[arg-type]
    config = dataclasses.replace(
        BASE,
        transport=transport,
        topology=TopologyConfig(ranks_per_client=2),
        local=LocalConfig(steps=5, batch_size=16, lr=0.1),
        output=output,
    )
    return [p.detach().clone() for p in Federation(config).run().model.parameters()]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return run_world(trained_in_pairs, None, str(tmp_path_factory.mktemp("exact")), size=2)[0]


@pytest.mark.parametrize("group", ["bf16", "fp16", "powersgd"])
def test_gradients_inside_a_group_are_compressed_and_clients_do_not_see_each_other(
    group: str, exact: list[Tensor], tmp_path: Path
) -> None:
    one = run_world(trained_in_pairs, group, str(tmp_path / "one"), size=2)[0]
    two = run_world(trained_in_pairs, group, str(tmp_path / "two"), size=4)[0]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), "for any number of groups"
    assert not all(torch.equal(a, b) for a, b in zip(one, exact, strict=True))
    if group != "powersgd":
        for a, b in zip(one, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


# ---- settings ----


def test_yaml_flags_and_python_are_one_path(tmp_path: Path) -> None:
    expected = Config(transport=TransportConfig(up=codecs.QSGD(levels=3), down=codecs.Int8(), group=None))
    file = tmp_path / "run.yaml"
    file.write_text("transport: {up: {name: QSGD, levels: 3}, down: Int8, group: none}")
    assert load_config(str(file)) == expected
    flags = ["--transport.up", "QSGD", "--transport.up.levels", "3", "--transport.down", "Int8"]
    assert load_config(None, flags) == expected
    file.write_text(to_yaml(expected))
    assert load_config(str(file)) == expected
    file.write_text("transport: {up: none, down: null}")
    assert load_config(str(file)) == Config()


def test_a_setting_of_the_downlink_is_refused_under_its_own_key() -> None:
    with pytest.raises(ConfigError, match=r"^transport\.down\.levels must be in \[1, 32767\], got 0"):
        load_config(None, ["--transport.down", "QSGD", "--transport.down.levels", "0"])
    with pytest.raises(ConfigError, match=r"^transport\.up\.bits must be in \[1, 4\], got 5"):
        load_config(None, ["--transport.up", "EDEN", "--transport.up.bits", "5"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"algorithm": FedAsync(), "transport": TransportConfig(up=codecs.Cast())},
            "transport.up=Cast compresses updates, but algorithm=FedAsync sends models",
        ),
        (
            {"algorithm": FedBuff(), "transport": TransportConfig(up=codecs.TopK())},
            "transport.up=TopK keeps an error per client, but algorithm=FedBuff keeps no client state",
        ),
        (
            {"algorithm": FedBuff(), "transport": TransportConfig(down=codecs.Cast())},
            "transport.down=Cast compresses the change of the model in a round, but algorithm=FedBuff",
        ),
        (
            {"transport": TransportConfig(group="bf16")},
            "transport.group=bf16 compresses gradients inside a client group, but topology.ranks_per",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config(**changes)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)
    assert any(fix in str(error.value) for fix in ("; use ", "; leave ", "; raise "))


class Rounded(codecs.Codec):
    """A codec of one's own: whole hundredths."""

    hundredths: int = 1

    def pack(self, vector: Tensor, rng: Generator) -> list[Tensor]:
        return [(vector * 100 / self.hundredths).round().to(torch.int16)]

    def unpack(self, body: Tensor, length: int) -> Tensor:
        return body.clone().view(torch.int16).float() * self.hundredths / 100


def test_a_codec_of_ones_own_is_a_setting_at_once(tmp_path: Path) -> None:
    config = load_config(None, ["--transport.up", f"{__name__}.Rounded", "--transport.up.hundredths", "2"])
    assert config.transport.up == Rounded(hundredths=2)
    rows, _ = run(transport=config.transport, rounds=1)
    assert rows[0]["bytes/up"] == 3 * (8 + 2 * P)


# ---- the figure ----


@pytest.mark.usefixtures("no_dashboards")
def test_the_script_writes_the_figure_and_the_table_between_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, root = tmp_path / "compression.md", Path(__file__).parent.parent
    page.write_text("before\n<!-- measured -->\nold\n<!-- measured -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["compression.py", "--rounds", "1", "--output", str(tmp_path)])
    runpy.run_path(str(root / "scripts" / "compression.py"), run_name="__main__")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    names = [line.split(" |")[0] for line in text.splitlines() if line.startswith("| ")][1:]
    shown = (root / "docs" / "compression.md").read_text()
    assert len(names) == 14
    assert all(f"\n{name} |" in shown for name in names)
    assert (tmp_path / "compression.svg").read_text().count("<svg") == 1
