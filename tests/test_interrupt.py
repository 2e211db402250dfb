"""Signals at odd times: Ctrl-C in a program that trains several runs, and signals while a command starts."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fedddp import CohortConfig, Config, DataConfig, Federation, ModelConfig, TrackingConfig, load_config
from fedddp.cli import main
from fedddp.commands.console import STOPPED
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


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_run_starts_stops_it_at_its_first_safe_point(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def load_later(*arguments: object) -> Config:
        os.kill(os.getpid(), number)
        return load_config(*arguments)  # type: ignore[arg-type]

    handler = signal.getsignal(number)
    command = ["run", "digits", "--rounds", "1", "--tracking.progress", "false"]
    with monkeypatch.context() as patch:
        patch.setattr("fedddp.config.loader.load_config", load_later)
        with pytest.raises(SystemExit) as stopped:
            main(command)
    assert stopped.value.code == STOPPED
    assert Path("runs/digits/history.jsonl").read_text() == ""
    assert signal.getsignal(number) == handler
    with pytest.raises(SystemExit) as finished:
        main([*command, "--name", "next"])
    assert finished.value.code == 0, "the signal was for the command before"


def test_ctrl_c_before_the_run_starts_ends_the_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Config:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedddp.config.loader.load_config", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["run", "digits"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""
