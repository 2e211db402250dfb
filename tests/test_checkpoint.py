"""Checkpoints: whole or not at all, and never another model's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fedddp.checkpoint import Checkpoints, load_into, save_model
from fedddp.topology import Topology, connect
from fedddp.vector import FlatModel


class Tied(nn.Module):
    """Two layers with one weight, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.b(self.a(x)))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    world = connect(Topology())
    world.close()
    return Checkpoints(tmp_path / "checkpoints", 2, world)


def save(checkpoints: Checkpoints, name: str, value: float) -> None:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    state = {"server.v": torch.full((3,), value)}
    checkpoints.save(name, model, state, {"round": int(value)}, lambda folder: None)


def test_the_newest_is_found_and_old_ones_go(checkpoints: Checkpoints) -> None:
    for number in (1, 2, 3):
        save(checkpoints, f"round-{number:05d}", number)
    found, damaged = checkpoints.newest()
    assert found is not None
    assert found.folder.name == "round-00003"
    assert not damaged
    assert found.facts["round"] == 3
    assert found.tensors("state.safetensors")["server.v"].tolist() == [3.0] * 3
    assert found.tensors("model.safetensors")["weight"].eq(3).all()
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["round-00002", "round-00003"]


def test_a_round_stopped_in_the_middle_is_newer_than_the_round_before(
    checkpoints: Checkpoints,
) -> None:
    for name in ("round-00002", "round-00002-00004"):
        save(checkpoints, name, 2)
    found, _ = checkpoints.newest()
    assert found is not None
    assert found.folder.name == "round-00002-00004"


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    checkpoints: Checkpoints, file: str, damage: str
) -> None:
    save(checkpoints, "round-00001", 1)
    save(checkpoints, "round-00002", 2)
    path = checkpoints.folder / "round-00002" / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x5A
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    found, damaged = checkpoints.newest()
    # A flipped bit in state.json may still be JSON with the same meaning only if it hit a space.
    assert found is not None
    assert found.folder.name == "round-00001"
    assert len(damaged) == 1
    assert "round-00002 is damaged" in damaged[0]


def test_nothing_whole_is_nothing_found(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() == (None, [])
    save(checkpoints, "round-00001", 1)
    shutil.rmtree(checkpoints.folder / "round-00001")
    assert checkpoints.newest() == (None, [])


def test_a_failed_save_leaves_the_earlier_one(checkpoints: Checkpoints) -> None:
    save(checkpoints, "round-00001", 1)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"round-00002: No space left on device; make room"):
        checkpoints.save("round-00002", nn.Linear(2, 2), {}, {}, full)
    found, damaged = checkpoints.newest()
    assert found is not None
    assert found.folder.name == "round-00001"
    assert not damaged
    assert [p.name for p in checkpoints.folder.iterdir()] == ["round-00001"]


def test_the_model_file_loads_into_the_plain_module(tmp_path: Path) -> None:
    module = Tied()
    FlatModel(module).params.uniform_()
    save_model(module, tmp_path / "model.safetensors")
    plain = Tied()
    safetensors.torch.load_model(plain, tmp_path / "model.safetensors")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name
    ours = Tied()
    load_into(ours, safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(ours.b.weight, module.a.weight)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": torch.zeros(2, 2)}, "misses bias"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "another shape for weight"),
        (
            {"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "x": torch.zeros(1)},
            "does not know x",
        ),
    ],
)
def test_another_models_checkpoint_is_refused(tensors: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_into(nn.Linear(2, 2), tensors)
