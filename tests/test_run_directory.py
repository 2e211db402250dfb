"""The run directory: one run at a time, always the same run, whatever happened to its files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import nn

from fedddp import Config, ConfigError, Federation, LocalConfig, TopologyConfig, TrackingConfig
from fedddp.config.loader import to_dict
from fedddp.distributed.launch import connect
from fedddp.distributed.world import World
from fedddp.testing import run_world
from fedddp.training import run_directory as module
from fedddp.training.run_directory import run_directory, write_record


@pytest.fixture
def world() -> World:
    world = connect(TopologyConfig())
    world.close()
    return world


def enter(world: World, default_name: str = "digits", **settings: Any) -> tuple[Path, Config]:
    """Start a run with these settings; return its directory and its configuration."""
    config = Config(**settings)
    with run_directory(config, default_name, world, to_dict(config)) as (directory, config):
        write_record(directory, to_dict(config))
        (directory / "history.jsonl").touch()
        return directory, config


def test_a_taken_default_name_is_numbered_and_auto_resumes_the_newest(world: World) -> None:
    made = [enter(world)[0].name for _ in range(11)]
    assert made == ["digits", *(f"digits-{n}" for n in range(2, 12))]
    Path("runs/digits-old").mkdir()
    directory, config = enter(world, resume="auto")
    assert (directory.name, config.name, config.resume) == ("digits-11", "digits-11", "auto")
    assert enter(world, "other", resume="auto")[0].name == "other"


@pytest.mark.parametrize("existing", ["history.jsonl", "checkpoints"])
def test_a_named_directory_that_holds_a_run_is_rejected_without_resume(world: World, existing: str) -> None:
    Path("runs/mine").mkdir(parents=True)
    (Path("runs/mine") / existing).mkdir()
    with pytest.raises(ConfigError, match=r"runs/mine holds a run already; .* --resume auto"):
        enter(world, name="mine")


def set_restart_count(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_a_restarted_launcher_resumes_in_its_own_directory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = enter(world)
    other = Path("runs/digits-2")
    other.mkdir()
    (other / ".launcher").write_text("elsewhere 1 ")
    with monkeypatch.context() as patch:
        set_restart_count(patch)
        directory, config = enter(world)
        assert (directory, config.resume) == (mine, "auto")
        named, config = enter(world, name="digits")
        assert (named, config.resume) == (mine, "auto")


def test_a_restarted_launcher_does_not_resume_a_directory_that_its_first_start_was_denied(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path("runs/theirs")
    other.mkdir(parents=True)
    (other / "history.jsonl").touch()
    with monkeypatch.context() as patch:
        set_restart_count(patch)
        with pytest.raises(ConfigError, match="holds a run already"):
            enter(world, name="theirs")


def _start_two_runs(output: Path, resume: Literal["never", "auto"]) -> str:
    """Rank 0 holds the directory until rank 1, a run of its own, is rejected."""
    rank = os.environ["RANK"]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    module.LOCK_WAIT_S = 0.3
    world = connect(TopologyConfig())
    config = Config(output=str(output), name="one", resume=resume)
    if rank == "0":
        with run_directory(config, "", world, to_dict(config)) as (directory, _):
            (output / "held").touch()
            while not (output / "rejected").exists():
                time.sleep(0.02)
            return directory.name
    while not (output / "held").exists():
        time.sleep(0.02)
    try:
        with run_directory(config, "", world, to_dict(config)):
            return "two runs in one directory"
    except ConfigError as error:
        (output / "rejected").touch()
        return str(error)
    finally:
        world.close()


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_second_run_is_rejected_from_a_locked_directory(tmp_path: Path, resume: str) -> None:
    first, second = run_world(_start_two_runs, tmp_path, resume, size=2)
    assert first == "one"
    assert second == f"name: another run is writing to {tmp_path}/one; wait for it or choose another --name"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"rounds: [", "is corrupt"),
        (b"\xff\xfe\x00", "is corrupt"),
        (b"", "it holds no sections"),
        (b"- 1\n- 2\n", "it holds no sections"),
        (b"[" * 5000, "is corrupt"),
    ],
)
def test_a_corrupt_config_yaml_is_reported_in_one_line(world: World, text: bytes, words: str) -> None:
    directory, _ = enter(world)
    (directory / "config.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=words) as rejection:
        enter(world, resume="auto")
    assert "\n" not in str(rejection.value)
    assert "delete it to resume" in str(rejection.value)
    (directory / "config.yaml").unlink()
    enter(world, resume="auto")


def test_a_resume_with_other_settings_is_rejected_and_keeps_config_yaml(world: World) -> None:
    directory, _ = enter(world)
    before = (directory / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"local.lr: is 0.5, but .* was started with 0.05"):
        enter(world, resume="auto", local=LocalConfig(lr=0.5))
    assert (directory / "config.yaml").read_text() == before
    with pytest.raises(ConfigError, match=r"topology.threads: is 2, but .* was started with null"):
        enter(world, resume="auto", topology=TopologyConfig(threads=2))
    enter(world, resume="auto", rounds=99, topology=TopologyConfig(timeout_s=5))
    assert "rounds: 99" in (directory / "config.yaml").read_text()


def test_a_run_of_an_older_version_is_rejected_in_one_line(world: World) -> None:
    directory, _ = enter(world)
    (directory / "config.yaml").write_text("track:\n  with: [wandb]\n")
    with pytest.raises(ConfigError, match=r"resume: .* was written by fedddp before 0\.1\.0") as rejection:
        enter(world, resume="auto")
    assert "\n" not in str(rejection.value)


def test_a_module_that_returns_no_logits_is_rejected_before_training() -> None:
    with pytest.raises(ConfigError, match="must return logits of shape"):
        Federation(module=nn.Flatten(), tracking=TrackingConfig(trackers=[], progress=False)).run()
