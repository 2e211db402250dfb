"""A learning-rate schedule of one's own, by its dotted path."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedddp import ConfigError, Federation, LocalConfig, load_config

returned: object = None


def halved(round_index: int, rounds: int) -> float:
    assert 0 <= round_index < rounds
    return 0.5


def cooling(round_index: int, rounds: int) -> float:
    return (rounds - round_index) / rounds


def returning(round_index: int, rounds: int) -> object:
    return returned


def test_a_schedule_of_your_own_is_a_factor_of_the_learning_rate() -> None:
    local = LocalConfig(lr=0.8, schedule=f"{__name__}.cooling")
    assert [local.lr_at(index, 4) for index in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_a_run_trains_with_it(no_dashboards: None, tmp_path: Path) -> None:
    config = load_config("digits", ["--rounds", "2", "--data.examples", "200", "--output", str(tmp_path)])
    assert config.local.lr == 0.2
    for name, local in {
        "own": dataclasses.replace(config.local, schedule=f"{__name__}.halved"),
        "plain": dataclasses.replace(config.local, lr=0.1),
        "full": config.local,
    }.items():
        Federation(config, local=local, name=name).run()
    own, plain, full = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "plain", "full"))
    assert all(torch.equal(own[name], plain[name]) for name in own)
    assert not all(torch.equal(own[name], full[name]) for name in own)


@pytest.mark.parametrize("value", [0, -0.1, float("nan"), float("inf"), "0.1", None])
def test_what_is_no_positive_number_is_refused(value: object) -> None:
    global returned  # noqa: PLW0603 - what the function below this name returns
    returned = value
    with pytest.raises(ValueError, match=r"^local\.schedule=.* must return a number > 0, got .* in round 3"):
        LocalConfig(schedule=f"{__name__}.returning").lr_at(3, 5)


@pytest.mark.parametrize(
    ("schedule", "refusal"),
    [
        (
            "cosin",
            r"^local\.schedule must be constant, cosine or step, got cosin; .*Did you mean 'cosine'\?$",
        ),
        (
            f"{__name__}.missing",
            r"^local\.schedule=.*missing.*; give the dotted path of a function f\(round_index",
        ),
        ("math.pi", r"^local\.schedule=math\.pi: .*not a callable.*; give the dotted path"),
        ("no_such_lab.warm", r"^local\.schedule=no_such_lab\.warm: No module named .*; give the dotted path"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_before_the_run(schedule: str, refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        LocalConfig(schedule=schedule)
