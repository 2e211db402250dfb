"""Checkpoints: written in full or not at all, verified on reading, and never another model's."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.models.flat import FlatModel
from fedddp.storage.checkpoint import Checkpoints, load_into, save_model
from fedddp.testing import run_world


class Tied(nn.Module):
    """Two layers with one weight, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.bn(self.b(self.a(x)))
        return normalized


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    world = connect(TopologyConfig())
    world.close()
    return Checkpoints(tmp_path / "checkpoints", 2, world)


def save(checkpoints: Checkpoints, name: str, value: float) -> None:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    state = {"server.v": torch.full((3,), value)}
    checkpoints.save(name, model, state, {"round": int(value)}, lambda folder: [])
    checkpoints.finish()


def test_the_newest_checkpoint_is_found_and_old_ones_are_deleted(checkpoints: Checkpoints) -> None:
    for number in (1, 2, 3):
        save(checkpoints, f"round-{number:05d}", number)
    found, corrupt = checkpoints.newest()
    assert found is not None
    assert found.folder.name == "round-00003"
    assert not corrupt
    assert found.metadata["round"] == 3
    assert found.tensors("state.safetensors")["server.v"].tolist() == [3.0] * 3
    assert found.tensors("model.safetensors")["weight"].eq(3).all()
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["round-00002", "round-00003"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o027, 0o640)])
def test_every_file_of_a_checkpoint_is_for_whom_the_umask_lets_read_it(
    checkpoints: Checkpoints, mask: int, mode: int
) -> None:
    before = os.umask(mask)
    try:
        save(checkpoints, "round-00001", 1)
        assert os.umask(mask) == mask, "saving leaves it as it was"
    finally:
        os.umask(before)
    files = {file.name: file.stat().st_mode & 0o777 for file in checkpoints.folder.glob("round-00001/*")}
    assert files == dict.fromkeys(("model.safetensors", "state.safetensors", "state.json"), mode)


def test_a_round_stopped_in_the_middle_is_newer_than_the_round_before(
    checkpoints: Checkpoints,
) -> None:
    for name in ("round-00002", "round-00002-00004"):
        save(checkpoints, name, 2)
    found, _ = checkpoints.newest()
    assert found is not None
    assert found.folder.name == "round-00002-00004"


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("corruption", ["cut", "flip", "deleted"])
def test_a_corrupt_checkpoint_is_set_aside_and_reported(
    checkpoints: Checkpoints, file: str, corruption: str
) -> None:
    save(checkpoints, "round-00001", 1)
    save(checkpoints, "round-00002", 2)
    path = checkpoints.folder / "round-00002" / file
    data = bytearray(path.read_bytes())
    if corruption == "deleted":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x5A
        path.write_bytes(data[: len(data) // 2] if corruption == "cut" else data)
    found, corrupt = checkpoints.newest()
    assert found is not None
    assert found.folder.name == "round-00001"
    assert len(corrupt) == 1
    assert "round-00002 is corrupt" in corrupt[0]
    assert "set aside as .corrupt-1-round-00002" in corrupt[0]
    # The name is free again: the run that resumes from round 1 reaches round 2 once more.
    save(checkpoints, "round-00002", 2)
    again, corrupt = checkpoints.newest()
    assert again is not None
    assert (again.folder.name, corrupt) == ("round-00002", [])


def test_a_checkpoint_of_an_older_version_is_named_as_such_and_never_chosen(checkpoints: Checkpoints) -> None:
    """It is intact: its digest is that of its contents, under the key that versions before 0.1.0 wrote."""
    save(checkpoints, "round-00001", 1)
    save(checkpoints, "round-00002", 2)
    state = checkpoints.folder / "round-00002" / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({"digest": content["digest"], "facts": content["metadata"]}))
    found, (line,) = checkpoints.newest()
    assert found is not None
    assert found.folder.name == "round-00001"
    assert line == (
        f"checkpoint {checkpoints.folder}/round-00002 is corrupt (it is of fedddp before 0.1.0, which names "
        "its parts otherwise); set aside as .corrupt-1-round-00002"
    )


def test_checkpoints_sort_by_number_and_other_folders_are_ignored(checkpoints: Checkpoints) -> None:
    for number in (99999, 100000):
        save(checkpoints, f"round-{number:05d}", number)
    for other in ("round-100000 (copy)", "notes", "zzz"):
        (checkpoints.folder / other).mkdir()
    (checkpoints.folder / "round-200000").write_text("a file of that name is a corrupt checkpoint")
    found, corrupt = checkpoints.newest()
    assert found is not None
    assert found.folder.name == "round-100000"
    assert len(corrupt) == 1
    assert "round-200000" in corrupt[0]


def test_only_files_that_the_checkpoint_wrote_are_read(checkpoints: Checkpoints) -> None:
    save(checkpoints, "round-00001", 1)
    (checkpoints.folder / "round-00001" / "clients-00009.safetensors").write_bytes(b"of another run")
    found, corrupt = checkpoints.newest()
    assert found is not None
    assert not corrupt
    assert found.files("clients-*.safetensors") == []
    assert found.tensors("clients-00009.safetensors") == {}


def test_saving_again_keeps_an_intact_checkpoint_and_replaces_a_corrupt_one(
    checkpoints: Checkpoints,
) -> None:
    save(checkpoints, "round-00001", 1)
    path = checkpoints.folder / "round-00001" / "model.safetensors"
    before = path.stat().st_ino
    save(checkpoints, "round-00001", 1)
    assert path.stat().st_ino == before
    path.write_bytes(path.read_bytes()[:-1])
    save(checkpoints, "round-00001", 1)
    found, corrupt = checkpoints.newest()
    assert found is not None
    assert not corrupt


def test_partial_files_of_a_killed_run_are_deleted(checkpoints: Checkpoints) -> None:
    for leftover in (".round-00007.part", ".round-00001.part"):
        (checkpoints.folder / leftover).mkdir(parents=True)
        (checkpoints.folder / leftover / "clients-00003.safetensors").write_bytes(b"partial")
    assert checkpoints.newest() == (None, [])
    save(checkpoints, "round-00001", 1)
    assert [p.name for p in checkpoints.folder.iterdir()] == ["round-00001"]
    found, _ = checkpoints.newest()
    assert found is not None
    assert found.files("clients-*") == []


def test_without_an_intact_checkpoint_none_is_found(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() == (None, [])
    save(checkpoints, "round-00001", 1)
    shutil.rmtree(checkpoints.folder / "round-00001")
    assert checkpoints.newest() == (None, [])


def test_a_failed_save_keeps_the_earlier_checkpoint(checkpoints: Checkpoints) -> None:
    save(checkpoints, "round-00001", 1)

    def full(_: Path) -> list[Path]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"round-00002: No space left on device; make room"):
        checkpoints.save("round-00002", nn.Linear(2, 2), {}, {}, full)
    found, corrupt = checkpoints.newest()
    assert found is not None
    assert found.folder.name == "round-00001"
    assert not corrupt
    assert [p.name for p in checkpoints.folder.iterdir()] == ["round-00001"]


def test_training_goes_on_while_a_checkpoint_of_before_is_written(checkpoints: Checkpoints) -> None:
    model, state, metadata = nn.Linear(2, 2), {"server.v": torch.zeros(3)}, {"best": {"round": 1}}
    nn.init.constant_(model.weight, 1.0)
    trained = threading.Event()
    checkpoints._writer.submit(trained.wait)  # the disk is slow
    checkpoints.save("round-00001", model, state, metadata, lambda folder: [])
    nn.init.constant_(model.weight, 2.0)
    state["server.v"].add_(1)
    metadata["best"]["round"] = 2
    assert not (checkpoints.folder / "round-00001").exists()
    trained.set()
    checkpoints.finish()
    found, _ = checkpoints.newest()
    assert found is not None
    assert found.tensors("model.safetensors")["weight"].eq(1).all()
    assert found.tensors("state.safetensors")["server.v"].eq(0).all()
    assert found.metadata["best"] == {"round": 1}


def test_the_next_checkpoint_reports_that_the_one_before_was_not_written(checkpoints: Checkpoints) -> None:
    save(checkpoints, "round-00001", 1)
    model = nn.Linear(2, 2)
    checkpoints.save("round-00002", model, {}, {}, lambda folder: folder.rmdir() or [])  # type: ignore[func-returns-value]
    with pytest.raises(OSError, match=r"round-00002: No such file or directory; make room"):
        checkpoints.save("round-00003", model, {}, {}, lambda folder: [])
    assert [p.name for p in checkpoints.folder.iterdir()] == ["round-00001"]
    save(checkpoints, "round-00003", 3)  # an error is raised once


def _save_in_a_world(folder: Path, full: int | str | None) -> str:
    world = connect(TopologyConfig())
    if full == "coordinator's model" and world.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    def shard(part: Path) -> list[Path]:
        if world.rank == full:
            raise OSError(28, "No space left on device")
        path = part / f"clients-{world.rank:05d}.safetensors"
        safetensors.torch.save_file({"a": torch.full((1,), float(world.rank))}, path)
        return [path]

    checkpoints = Checkpoints(folder, 2, world)
    try:
        checkpoints.save("round-00001", nn.Linear(100, 100), {}, {}, shard)
        checkpoints.finish()
    except OSError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("full", [None, 0, 1, "coordinator's model"])
def test_all_ranks_save_or_all_raise_the_same_error(tmp_path: Path, full: int | str | None) -> None:
    reported = run_world(_save_in_a_world, tmp_path / "checkpoints", full, size=2)
    if full is None:
        assert reported == ["saved"] * 2
        assert len(list((tmp_path / "checkpoints" / "round-00001").glob("clients-*"))) == 2
    else:
        assert reported[0] == reported[1]
        assert re.match(r"cannot write checkpoint .*(No space left|File too large).*; make room", reported[0])
        assert list((tmp_path / "checkpoints").iterdir()) == []


def test_model_safetensors_loads_into_a_plain_module(tmp_path: Path) -> None:
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
def test_a_checkpoint_of_another_model_is_rejected(tensors: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_into(nn.Linear(2, 2), tensors)
