"""Callbacks: what they are called with, that they do not change the run, and what happens when one raises."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedddp import (
    Callback,
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    Result,
    TrackingConfig,
    load_config,
)
from fedddp.algorithms import FedBuff
from fedddp.config.loader import to_dict
from fedddp.storage.history import read_rows
from fedddp.storage.run_record import read_warnings
from fedddp.testing import run_world

BASE = Config(
    data=DataConfig(clients=4, examples=200),
    model=ModelConfig(norm="sync"),
    local=LocalConfig(steps=1, batch_size=20),
    cohort=CohortConfig(size=2),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=3,
)


class Recording(Callback):
    """Writes what it is called with into files beside the run."""

    def __init__(self, raises_in: str = "") -> None:
        self.raises_in = raises_in
        self.calls: list[tuple[Any, ...]] = []

    def on_run_start(self, config: Config, folder: Path) -> None:
        self.calls.append(("start", config.rounds, folder.name))
        self._perhaps_raise("start")

    def on_round_end(self, round: int, metrics: dict[str, Any], model: nn.Module) -> None:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.calls.append(("round", round, metrics, state, model.training))
        self._perhaps_raise("round")

    def on_run_end(self, result: Result) -> None:
        self.calls.append(("end", result.finished, len(result.history)))
        self._perhaps_raise("end")

    def _perhaps_raise(self, hook: str) -> None:
        if hook == self.raises_in:
            raise RuntimeError(f"no luck in {hook}\nsecond line")


class Meddling(Callback):
    """Draws at random, takes its time, and spoils the model that it is given."""

    def on_round_end(self, round: int, metrics: dict[str, Any], model: nn.Module) -> None:
        time.sleep(0.5)
        random.random()
        np.random.rand()
        torch.rand(3)
        model.train()
        metrics.clear()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        model.half().float().to(memory_format=torch.channels_last).double()


def run(output: Path, *callbacks: Callback | str, **changes: Any) -> Result:
    config = dataclasses.replace(BASE, output=str(output), **changes)
    return Federation(config, callbacks=callbacks).run()


@pytest.mark.parametrize("algorithm", [None, FedBuff(buffer_size=2)])
def test_a_callback_is_given_each_round_with_its_row_and_its_model(tmp_path: Path, algorithm: Any) -> None:
    recording = Recording()
    result = run(tmp_path, recording, **({"algorithm": algorithm} if algorithm else {}))
    assert recording.calls[0] == ("start", 3, "run")
    assert recording.calls[-1] == ("end", True, 3)
    rounds = recording.calls[1:-1]
    assert [call[1] for call in rounds] == [1, 2, 3]
    assert [json.loads(json.dumps(call[2])) for call in rounds] == result.history
    assert not any(call[4] for call in rounds), "the model is in evaluation mode"
    final = load_file(result.folder / "model.safetensors")
    assert all(torch.equal(rounds[-1][3][name], tensor) for name, tensor in final.items())
    assert not all(torch.equal(rounds[0][3][name], tensor) for name, tensor in final.items())


@pytest.mark.parametrize("algorithm", [None, FedBuff(buffer_size=2)])
def test_a_callback_does_not_change_the_run(tmp_path: Path, algorithm: Any) -> None:
    changes = {"algorithm": algorithm} if algorithm else {}
    plain, meddled = run(tmp_path / "a", **changes), run(tmp_path / "b", Meddling(), **changes)
    files = [result.folder / "model.safetensors" for result in (plain, meddled)]
    assert files[0].read_bytes() == files[1].read_bytes()
    seconds_left_out = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in result.history]
        for result in (plain, meddled)
    ]
    assert seconds_left_out[0] == seconds_left_out[1]
    logged = json.loads((meddled.folder / "run.json").read_text())["sessions"][0]
    begun, ended = (datetime.fromisoformat(logged[key]) for key in ("started", "ended"))
    longest = (ended - begun).total_seconds() + 2  # both to the second
    assert sum(row["time/round"] for row in meddled.history) <= longest - 1.0, (
        "two calls lie between the rows"
    )


def test_a_callback_that_raises_loses_no_round(tmp_path: Path) -> None:
    class Raises(Callback):
        def on_round_end(self, round: int, metrics: dict[str, Any], model: nn.Module) -> None:
            if round == 3:
                raise RuntimeError("after the last round")

    with pytest.raises(RuntimeError, match="after the last round"):
        run(tmp_path, Raises())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-00003"]
    error = json.loads((tmp_path / "run" / "run.json").read_text())["error"]
    assert error.startswith("after the last round; raised by the callback ")


@pytest.mark.parametrize("hook", ["start", "round", "end"])
def test_a_callback_that_raises_ends_the_run_and_is_named(tmp_path: Path, hook: str) -> None:
    with pytest.raises(RuntimeError, match=f"no luck in {hook}") as raised:
        run(tmp_path, Recording(hook))
    (note,) = raised.value.__notes__
    assert "Recording.on_" in note
    assert "callback_errors=drop" in note
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("hook", ["start", "round", "end"])
def test_a_callback_that_raises_can_be_dropped(tmp_path: Path, hook: str) -> None:
    failing, other = Recording(hook), Recording()
    result = run(tmp_path, failing, other, callback_errors="drop")
    assert result.finished
    assert [call[0] for call in failing.calls][-1] == hook, "it is not called again"
    assert [call[0] for call in other.calls] == ["start", "round", "round", "round", "end"]
    (line,) = read_warnings(result.folder)
    assert f"RuntimeError: no luck in {hook}; the run continues without it" in line
    assert "second line" not in line


COUNTED = """
import fedddp

class Counted(fedddp.Callback):
    def on_round_end(self, round, metrics, model):
        with open(PATH, "a") as file:
            file.write(f"{round} ")

ready = Counted()

class NeedsArguments(fedddp.Callback):
    def __init__(self, x): pass

class Other: pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's; what its callback writes is in the returned file."""
    written = tmp_path / "rounds.txt"
    (tmp_path / "own_callbacks.py").write_text(COUNTED.replace("PATH", repr(str(written))))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_callbacks", None)
    return written


@pytest.mark.parametrize("path", ["own_callbacks.Counted", "own_callbacks.ready"])
def test_callbacks_are_named_by_dotted_path_in_yaml_on_the_command_line_and_in_python(
    tmp_path: Path, own_module: Path, path: str
) -> None:
    run(tmp_path / "a", path)
    file = tmp_path / "own.yaml"
    file.write_text(f"callbacks: [{path}]\nrounds: 2\ncohort: {{size: 2}}\ndata: {{clients: 4}}\n")
    flags = ["--tracking.trackers", "[]", "--tracking.progress", "false", "--local.steps", "1"]
    config = load_config(str(file), [*flags, "--output", str(tmp_path / "b")])
    result = Federation(config).run()
    assert to_dict(config)["callbacks"] == [path]
    assert f"- {path}" in (result.folder / "config.yaml").read_text()
    Federation(load_config("digits", [*flags, "--callbacks", f"[{path}]", "--rounds", "1"]))
    assert own_module.read_text() == "1 2 3 1 2 "


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("own_callbacks.Missing", "cannot make 'own_callbacks.Missing'"),
        ("no_such_module.Callback", "cannot make 'no_such_module.Callback'"),
        ("Callback", "cannot make 'Callback'"),
        ("own_callbacks.NeedsArguments", "class without arguments"),
        ("own_callbacks.Other", "Other is no fedddp.Callback"),
        (Recording, "Recording is no fedddp.Callback; subclass it; pass an object of it, not the class"),
        (print, "builtin_function_or_method is no fedddp.Callback"),
    ],
    ids=["missing", "module", "bare", "arguments", "other", "class", "function"],
)
@pytest.mark.usefixtures("own_module")
def test_what_is_no_callback_is_refused_before_the_run(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "a", given)
    assert not (tmp_path / "a").exists()


def rounds_seen() -> list[int]:
    recording = Recording()
    config = dataclasses.replace(BASE, output=str(Path.cwd()), name="world")
    Federation(config, callbacks=[recording]).run()
    return [call[1] for call in recording.calls if call[0] == "round"]


def test_only_the_coordinator_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_world(rounds_seen, size=2) == [[1, 2, 3], []]
    assert len(read_rows(tmp_path / "world" / "history.jsonl")) == 3
