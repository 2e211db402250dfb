"""Ctrl-C in a program that trains several runs, and what the command line makes of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fedddp import CohortConfig, Config, DataConfig, Federation, ModelConfig, TrackingConfig
from fedddp.cli import STOPPED, main
from fedddp.distributed.world import World
from fedddp.federation import Interrupted
from fedddp.testing import run_world

pytestmark = pytest.mark.usefixtures("no_dashboards")


def train(seed: int) -> bool:
    """Train a small run; return whether it finished."""
    config = Config(
        data=DataConfig(dataset="digits", examples=60, clients=4),
        model=ModelConfig(name="2nn"),
        cohort=CohortConfig(size=2),
        tracking=TrackingConfig(trackers=[], progress=False),
        rounds=3,
        seed=seed,
        name=f"seed-{seed}",
    )
    return Federation(config).run().finished


def interrupt_at_the_first_check(patch: pytest.MonkeyPatch, rank: int = 0) -> None:
    """Send this process the signal of Ctrl-C when its rank first looks for a request to stop."""
    stop_requested = World.stop_requested
    sent: list[int] = []

    def interrupted(world: World) -> bool:
        if world.rank == rank and not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return stop_requested(world)

    patch.setattr(World, "stop_requested", interrupted)


def test_ctrl_c_ends_a_loop_over_runs_after_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at_the_first_check(monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="resume runs/seed-0 with resume='auto'") as interruption:
        [train(seed) for seed in (0, 1)]
    assert isinstance(interruption.value, Interrupted)
    assert not interruption.value.result.finished
    assert list(Path("runs/seed-0/checkpoints").iterdir())
    assert not Path("runs/seed-1").exists()


def interrupted_on_rank_1() -> str:
    """Return how the run ends on this rank when another rank's process gets Ctrl-C."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at_the_first_check(patch, rank=1)
        try:
            train(0)
        except Interrupted:
            return "interrupted"
    return "finished"


def test_ctrl_c_on_one_rank_interrupts_all() -> None:
    assert run_world(interrupted_on_rank_1, size=2) == ["interrupted"] * 2


def test_a_signal_other_than_ctrl_c_returns_an_unfinished_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "stop_requested", lambda world: True)
    assert not train(0)


def test_the_command_line_prints_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at_the_first_check(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main(["run", "digits", "--rounds", "2", "--tracking.progress", "false"])
    assert stopped.value.code == STOPPED
    assert "Stopped. Resume with the same launcher and: fedddp run digits" in capsys.readouterr().out
