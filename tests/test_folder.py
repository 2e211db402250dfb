"""The run directory: one run at a time, always the same run, whatever happened to its files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fedddp import Federation, Local, Run, Topology, Track
from fedddp.config.schema import ConfigError
from fedddp.distributed.launch import connect
from fedddp.distributed.world import World
from fedddp.testing import run_world
from fedddp.training import run_directory as folder_module
from fedddp.training.run_directory import run_folder


@pytest.fixture
def world() -> World:
    world = connect(Topology())
    world.close()
    return world


def enter(world: World, default_name: str = "digits", **settings: Any) -> tuple[Path, Run]:
    with run_folder(Run(**settings), default_name, world) as (folder, run):
        (folder / "history.jsonl").touch()
        return folder, run


def test_a_name_that_is_taken_is_numbered_and_auto_takes_the_newest(world: World) -> None:
    made = [enter(world)[0].name for _ in range(11)]
    assert made == ["digits", *(f"digits-{n}" for n in range(2, 12))]
    Path("runs/digits-old").mkdir()
    folder, run = enter(world, resume="auto")
    assert (folder.name, run.name, run.resume) == ("digits-11", "digits-11", "auto")
    assert enter(world, "other", resume="auto")[0].name == "other"


@pytest.mark.parametrize("left", ["history.jsonl", "checkpoints"])
def test_a_named_directory_with_a_run_is_refused_unless_it_goes_on(world: World, left: str) -> None:
    Path("runs/mine").mkdir(parents=True)
    (Path("runs/mine") / left).mkdir()
    with pytest.raises(ConfigError, match=r"runs/mine holds a run already; .* --resume auto"):
        enter(world, name="mine")


def restarted(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_a_restarted_launcher_finds_the_directory_it_had(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = enter(world)
    other = Path("runs/digits-2")
    other.mkdir()
    (other / ".launcher").write_text("elsewhere 1 ")
    with monkeypatch.context() as patch:
        restarted(patch)
        folder, run = enter(world)
        assert (folder, run.resume) == (mine, "auto")
        named, run = enter(world, name="digits")
        assert (named, run.resume) == (mine, "auto")


def test_a_restart_does_not_take_what_the_first_start_was_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path("runs/theirs")
    other.mkdir(parents=True)
    (other / "history.jsonl").touch()
    with monkeypatch.context() as patch:
        restarted(patch)
        with pytest.raises(ConfigError, match="holds a run already"):
            enter(world, name="theirs")


def _two_runs(where: Path, resume: str) -> str:
    """Rank 0 holds the directory until rank 1, a run of its own, was refused."""
    me = os.environ["RANK"]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    folder_module.LOCK_WAIT_S = 0.3
    world = connect(Topology())
    run = Run(output=str(where), name="one", resume=resume)  # type: ignore[arg-type]
    if me == "0":
        with run_folder(run, "", world) as (folder, _):
            (where / "held").touch()
            while not (where / "refused").exists():
                time.sleep(0.02)
            return folder.name
    while not (where / "held").exists():
        time.sleep(0.02)
    try:
        with run_folder(run, "", world):
            return "two runs in one directory"
    except ConfigError as error:
        (where / "refused").touch()
        return str(error)
    finally:
        world.close()


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_second_process_is_refused_the_same_directory(tmp_path: Path, resume: str) -> None:
    first, second = run_world(_two_runs, tmp_path, resume, size=2)
    assert first == "one"
    assert second == f"name: another run is writing to {tmp_path}/one; wait for it or choose another --name"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"rounds: [", "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"", "it holds no sections"),
        (b"- 1\n- 2\n", "it holds no sections"),
        (b"[" * 5000, "is damaged"),
    ],
)
def test_a_damaged_configuration_is_named_in_one_line(world: World, text: bytes, words: str) -> None:
    folder, _ = enter(world)
    (folder / "config.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=words) as refusal:
        enter(world, resume="auto")
    assert "\n" not in str(refusal.value)
    assert "delete it to go on" in str(refusal.value)
    (folder / "config.yaml").unlink()
    enter(world, resume="auto")


def test_a_resume_with_settings_of_another_run_is_refused_and_leaves_them(world: World) -> None:
    folder, _ = enter(world)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"local.lr: is 0.5, but .* was started with 0.05"):
        enter(world, resume="auto", local=Local(lr=0.5))
    assert (folder / "config.yaml").read_text() == before
    with pytest.raises(ConfigError, match=r"topology.threads: is 2, but .* was started with 1"):
        enter(world, resume="auto", topology=Topology(threads=2))
    enter(world, resume="auto", rounds=99, topology=Topology(timeout_s=5))
    assert "rounds: 99" in (folder / "config.yaml").read_text()


def test_what_cannot_run_is_refused_before_any_training() -> None:
    with pytest.raises(ConfigError, match="must return logits of shape"):
        Federation(model=nn.Flatten(), track=Track(with_=[], progress=False)).run()
