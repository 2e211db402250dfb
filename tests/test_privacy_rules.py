"""Which settings go together with `privacy`: each works, or is refused in one line; what a user sees of ε."""

from __future__ import annotations

import dataclasses
import io
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedddp import (
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    Federation,
    TrackingConfig,
    load_config,
    privacy,
)
from fedddp.algorithms import FedAvg
from fedddp.cli import main
from fedddp.config.files import read_yaml
from fedddp.config.loader import build, to_yaml
from fedddp.config.privacy_rules import RULES
from fedddp.config.privacy_table import COLUMNS, Feature, config_of, features, meets, reason_of
from fedddp.inference.card import model_card
from fedddp.privacy.statement import OUTSIDE, statement
from fedddp.reporting.report import write_report
from fedddp.storage.history import read_config, read_rows
from fedddp.tracking.status import Status
from fedddp.tracking.summary import summary

ROOT = Path(__file__).parent.parent
CENTRAL = privacy.CentralDP(noise_multiplier=1.0, delta=1e-3, clip=1.0)
QUIET = TrackingConfig(trackers=[], progress=False)
PAGE = (ROOT / "docs" / "privacy.md").read_text()
PAIRS = [(feature, column) for feature in features() for column in COLUMNS if meets(feature, column)]


@pytest.mark.parametrize(("feature", "column"), PAIRS, ids=lambda value: getattr(value, "title", value))
def test_a_pair_of_features_trains_or_is_refused_in_one_line(feature: Feature, column: str) -> None:
    config = refused = None
    try:
        config = config_of(feature, column)
    except ConfigError as error:
        refused = str(error)
    if config is None:
        assert refused
        assert "\n" not in refused
        assert "; " in refused, "it names a fix"
        assert reason_of(refused) in PAGE
        return
    result = Federation(config, tracking=QUIET).run()
    (row,) = result.history
    assert config.privacy is None or row["privacy/epsilon"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())


def test_the_table_of_the_page_is_generated_from_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["privacy_table.py", "--check"])
    runpy.run_path(str(ROOT / "scripts" / "privacy_table.py"), run_name="__main__")
    _, _, text = PAGE.partition("<!-- scripts/privacy_table.py -->\n")
    text, end, _ = text.partition("<!-- end -->")
    assert end
    for rule in RULES:
        reason = rule.reason.partition(";")[0]
        assert reason in text or rule.title.startswith("algorithms that"), rule.title


class Losses(FedAvg):
    """An algorithm of one's own that needs every client's loss."""

    needs_initial_loss = True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": Losses()}, "shows every client's loss to all others"),
        (
            {"privacy": dataclasses.replace(CENTRAL, delta=0.05)},
            r"privacy.delta=0.05 must be below 1 / data.clients = 0.05",
        ),
        (
            {"privacy": privacy.LocalDP(delta=0.05, epsilon=1.0, clip=1.0)},
            r"privacy.delta=0.05 must be below 1 / data.clients = 0.05",
        ),
        (
            {
                "privacy": dataclasses.replace(CENTRAL, amplification="without_replacement"),
                "cohort": CohortConfig(sampling="poisson"),
            },
            "without_replacement is of cohorts of fixed size, but cohort.sampling=poisson",
        ),
    ],
)
def test_settings_that_void_the_guarantee_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**{"privacy": CENTRAL, **changes})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"delta": 1e-5, "clip": 1.0},
            "privacy.noise_multiplier or target_epsilon must be given, and not both",
        ),
        (
            {"delta": 1e-5, "clip": 1.0, "noise_multiplier": 1.0, "target_epsilon": 1.0},
            "privacy.noise_multiplier or target_epsilon must be given, and not both",
        ),
        ({"delta": 1e-5, "noise_multiplier": 1.0}, "privacy.clip has no default; give a value"),
        ({"clip": 1.0, "noise_multiplier": 1.0}, "privacy.delta has no default; give a value"),
        ({"delta": 1.0, "clip": 1.0, "noise_multiplier": 1.0}, r"privacy.delta must be in \(0, 1\), got 1"),
        ({"delta": 1e-5, "clip": 0.0, "noise_multiplier": 1.0}, "privacy.clip must be > 0"),
    ],
)
def test_incomplete_settings_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        privacy.CentralDP(**given)


def test_yaml_flags_and_python_make_the_same_privacy() -> None:
    expected = Config(privacy=CENTRAL)
    assert build({}, COLUMNS["CentralDP"].split()) == expected
    text = "privacy: {name: CentralDP, noise_multiplier: 1, delta: 1e-3, clip: 1}"
    assert build(read_yaml(text)) == expected
    assert build(read_yaml(to_yaml(expected))) == expected
    assert build(read_yaml("privacy: none")) == build({}, ["--privacy", "none"]) == Config()
    assert build(read_yaml(text), ["--privacy", "none"]) == Config()
    with pytest.raises(ConfigError, match="privacy: unknown name 'DP'"):
        build({}, ["--privacy", "DP"])


# ---- what a user sees ----


def planned(flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `fedddp plan digits` prints on a wide terminal."""
    with pytest.MonkeyPatch.context() as terminal:
        terminal.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as ended:
            main(["plan", "digits", *flags.split()])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--privacy.target_epsilon 8 --privacy.delta 1e-4 --cohort.sampling poisson --rounds 200 "
            "--data.clients 100",
            "noise multiplier 1.04: simulated ε = 8 at δ = 0.0001 after round 200 (Poisson cohorts, q = 0.1; "
            "add or remove a client)",
        ),
        (
            "--privacy.noise_multiplier 5 --privacy.delta 1e-5 --rounds 30 --privacy.noise secret",
            "noise multiplier 5: ε = 4.866 at δ = 1e-05 after round 30 (no amplification by sampling; a "
            "client's update or zeros)",
        ),
        (
            "--privacy.noise_multiplier 5 --privacy.delta 1e-5 --rounds 30 --privacy.stop_at_epsilon 3",
            "noise multiplier 5: simulated ε = 2.876 at δ = 1e-05 after round 12 (no amplification by "
            "sampling; a client's update or zeros); the budget ends the run there, not after round 30",
        ),
    ],
)
def test_plan_answers_which_noise_and_which_epsilon(
    flags: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"privacy          {expected} " in planned(f"--privacy CentralDP --privacy.clip 1 {flags}", capsys)


def test_plan_answers_for_local_privacy(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--privacy LocalDP --privacy.epsilon 1 --privacy.delta 1e-5 --privacy.clip 1 --cohort.size 20"
    flags += " --rounds 4"
    printed = planned(flags, capsys)
    epsilon = privacy.epsilon_of(2 / 3.730632, 1e-5)
    assert f"σ = 7.461 on every element: simulated ε = {epsilon:.4g} at δ = 1e-05 after round 4" in printed


def test_plan_answers_for_examples(capsys: pytest.CaptureFixture[str]) -> None:
    """Batches of all examples: 30 steps with noise multiplier 5."""
    flags = "--privacy ExampleDP --privacy.noise_multiplier 5 --privacy.delta 1e-5 --privacy.clip 1"
    flags += " --local.steps 3 --local.batch_size 2000 --cohort.size 20 --rounds 10"
    expected = "noise multiplier 5: simulated ε = 4.866 at δ = 1e-05 after round 10 (Poisson batches, q = 1"
    assert expected in planned(flags, capsys)


def test_plan_refuses_what_a_run_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.name", "resnet8-gn", "--model.norm", "batch"]
    with pytest.raises(SystemExit):
        main(["plan", "digits", *COLUMNS["CentralDP"].split(), *flags])
    assert "running statistics" in capsys.readouterr().err


def test_the_status_shows_epsilon() -> None:
    status = Status(3)
    row = {"round": 1, "eval/accuracy": 0.5, "privacy/epsilon": 3.217, "privacy/simulated": 1}
    status.round(row)
    assert [part.text for part in status.scores()][-1] == "simulated ε 3.22"
    assert [part.text for part in status.scores(arrows=False)][-1] == "simulated epsilon 3.22"
    status.round({**row, "privacy/simulated": 0})
    assert [part.text for part in status.scores()][-1] == "ε 3.22"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a private run of two rounds."""
    config = Config(
        data=DataConfig(examples=120),
        privacy=CENTRAL,
        rounds=2,
        tracking=QUIET,
        output=str(tmp_path_factory.mktemp("runs")),
    )
    return Federation(config).run().folder


def test_the_report_the_card_and_the_last_table_state_epsilon_and_what_it_leaves_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing is the subject of other tests, and takes seconds.
    monkeypatch.setattr("fedddp.reporting.figures.encode", lambda *_, **__: b'<svg viewBox="0 0 1 1"></svg>')
    rows = read_rows(folder / "history.jsonl")
    claim = (
        f"simulated ε = {rows[-1]['privacy/epsilon']:.4g} at δ = 0.001 for each client, CentralDP, after "
        f"round 2; its noise follows from the seed; {OUTSIDE}"
    )
    assert statement(read_config(folder / "config.yaml"), rows) == claim
    assert claim.replace("'", "&#x27;") in write_report([folder]).read_text()
    assert f"| privacy | {claim} |" in model_card(folder)
    console = Console(file=io.StringIO(), width=400)
    console.print(summary(rows, folder, 2, finished=True))
    assert claim in console.file.getvalue()  # type: ignore[attr-defined]


def test_strict_and_secret_runs_make_the_shorter_claim() -> None:
    row = {"round": 7, "privacy/epsilon": 2.0, "privacy/simulated": 0}
    config = {"privacy": {"name": "LocalDP", "delta": 1e-5, "strict": True}}
    assert (
        statement(config, [row, {"round": 8}]) == "ε = 2 at δ = 1e-05 for each client, LocalDP, after round 7"
    )
    assert statement({"privacy": None}, [row]) is None
    assert statement({}, []) is None


@pytest.mark.parametrize("recipe", ["digits-dp", "digits-dpsgd"])
def test_the_recipe_meets_its_target(recipe: str) -> None:
    config = load_config(recipe)
    assert isinstance(config.privacy, privacy.CentralDP | privacy.ExampleDP)
    assert config.privacy.target_epsilon is not None
