"""Profiles: the trace is readable, its phases are those of the table, and the model has the same bits."""

from __future__ import annotations

import gzip
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedddp import CohortConfig, DataConfig, Federation, ModelConfig, TrackingConfig, algorithms
from fedddp.cli import main
from fedddp.commands.options import split_options


def train(name: str, profile: int, rounds: int = 5, **more: Any) -> Path:
    """Train a small run; return its directory."""
    return (
        Federation(
            data=DataConfig(dataset="digits", examples=60, clients=4),
            model=ModelConfig(name="2nn"),
            cohort=CohortConfig(size=2),
            tracking=TrackingConfig(trackers=[], progress=False, profile=profile),
            rounds=rounds,
            name=name,
            **more,
        )
        .run()
        .folder
    )


def events_of(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Return the complete events of a trace."""
    with gzip.open(folder / f"profile/rank-{rank}.json.gz", "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def table_of(folder: Path) -> dict[str, list[str]]:
    """Return the rows of the phases, by their names."""
    phases, _ = (folder / "profile/rank-0.txt").read_text().split("\n\n")[:2]
    rows = [line.split() for line in phases.splitlines()]
    assert rows[0] == ["phase", "seconds", "times", "share"]
    return {row[0]: row[1:] for row in rows[1:]}


def test_a_profile_has_the_rounds_asked_for_and_leaves_the_bits_of_the_model() -> None:
    profiled, plain = train("profiled", 2), train("plain", 0)
    assert (profiled / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert not (plain / "profile").exists()
    events = events_of(profiled)
    steps = [event["name"] for event in events if event["name"].startswith("ProfilerStep#")]
    assert sorted(set(steps)) == ["ProfilerStep#2", "ProfilerStep#3"], "two rounds warm up"
    counts = Counter(event["name"] for event in events if event["name"].startswith("phase: "))
    assert counts["phase: train"] == counts["phase: aggregate"] == counts["phase: evaluate"] == 2
    assert any(event["name"] == "aten::addmm" for event in events)
    rows = table_of(profiled)
    for phase in ("train", "evaluate"):
        seconds = sum(event["dur"] for event in events if event["name"] == f"phase: {phase}") / 1e6
        assert float(rows[phase][0]) == pytest.approx(seconds, abs=0.002), phase
        assert rows[phase][1] == "2"
    shares = sum(float(row[row.index("%") - 1]) for row in rows.values())
    assert shares == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize(("rounds", "wanted", "found"), [(1, 3, [0]), (2, 1, [1]), (4, 9, [0, 1, 2, 3])])
def test_a_short_run_is_profiled_as_far_as_it_goes(rounds: int, wanted: int, found: list[int]) -> None:
    names = {event["name"] for event in events_of(train("short", wanted, rounds))}
    assert {name for name in names if name.startswith("ProfilerStep#")} == {
        f"ProfilerStep#{n}" for n in found
    }


def test_an_asynchronous_run_is_profiled_too() -> None:
    folder = train("async", 1, 3, algorithm=algorithms.FedBuff(buffer_size=2))
    assert any(event["name"] == "phase: step" for event in events_of(folder))


def test_a_profile_that_cannot_be_written_costs_the_profile_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path("runs/full").mkdir(parents=True)
    Path("runs/full/profile").write_text("a file where a folder should be")
    assert (train("full", 1) / "model.safetensors").exists()
    assert "runs/full/profile: cannot write the profile" in caplog.text


def test_the_command_prints_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    command = "run digits --data.examples 100 --tracking.trackers [] --rounds 3 --profile 1"
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command))
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "profile of rank 0 (runs/digits/profile/rank-0.json.gz opens in ui.perfetto.dev)" in printed.out
    assert " operator " in printed.out
    assert max(map(len, printed.out.splitlines())) <= 130


@pytest.mark.parametrize(
    ("words", "rest"),
    [
        ("digits --profile", "digits --tracking.profile 3"),
        ("digits --profile 5 --rounds 2", "digits --rounds 2 --tracking.profile 5"),
        ("digits --profile=5", "digits --tracking.profile 5"),
        ("--profile --rounds 2 digits", "--rounds 2 digits --tracking.profile 3"),
        ("digits --quiet --rounds 2", "digits --rounds 2"),
        ("digits --verbose", "digits"),
    ],
)
def test_options_are_taken_out_of_the_settings(words: str, rest: str) -> None:
    options = split_options(words.split())
    assert options.words == rest.split()
    assert (options.quiet, options.verbose) == ("--quiet" in words, "--verbose" in words)
