"""Every recipe that ships with the package trains, and every algorithm and rule has one and is documented."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from fedddp import Federation, TrackingConfig, load_config
from fedddp.aggregation import Aggregation, Mean
from fedddp.algorithms import Algorithm, AsynchronousAlgorithm
from fedddp.config.baselines import in_effect
from fedddp.recipes import recipes
from fedddp.section import choices
from fedddp.storage.history import main_metric

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "algorithms.md"
ON_DIGITS = [name for name in recipes() if name.startswith("digits")]
ON_SCENES = [name for name in recipes() if name.startswith("scenes")]
OURS = {
    name: cls
    for base in (Algorithm, Aggregation)
    for name, cls in choices(base).items()
    if cls.__module__.startswith("fedddp.")
}
"""The algorithms and rules of the package, by name."""
ON_THE_PAGE = {
    name: cls for name, cls in OURS.items() if not issubclass(cls, AsynchronousAlgorithm) and cls is not Mean
}


def rows_of_the_page() -> dict[str, str]:
    """Return the rows of the tables of docs/algorithms.md that begin with a name, by it."""
    rows = re.findall(r"^(\| `([\w-]+)` \|.*)", PAGE.read_text(), re.MULTILINE)
    return {name: row for row, name in rows}


@pytest.mark.parametrize("name", [*ON_DIGITS, *ON_SCENES])
def test_recipes_train(name: str) -> None:
    config = load_config(name)
    config = dataclasses.replace(
        config,
        rounds=1,
        data=dataclasses.replace(config.data, examples=300 if name in ON_DIGITS else 60),
        local=dataclasses.replace(config.local, epochs=1),
        tracking=TrackingConfig(trackers=[], progress=False),
    )
    (row,) = Federation(config).run().history
    assert row["train/loss"] > 0
    judged = main_metric(row)
    assert judged is not None
    on_clients = not in_effect(config).algorithm.has_global_model
    accuracy = "clients/accuracy_mean" if on_clients else "eval/accuracy"
    assert (judged == accuracy) == (name in ON_DIGITS)
    assert 0 <= row[judged] <= 1


def test_every_algorithm_and_rule_has_a_recipe() -> None:
    configs = [load_config(name) for name in ON_DIGITS]
    used = {type(chosen).__name__ for config in configs for chosen in (config.algorithm, config.aggregation)}
    assert OURS.keys() <= used
    assert len(OURS) >= 28


def test_every_algorithm_and_rule_has_a_row_in_the_docs() -> None:
    assert ON_THE_PAGE.keys() <= rows_of_the_page().keys()
    assert len(ON_THE_PAGE) >= 24


def test_the_page_of_algorithms_names_tests_that_exist_and_every_recipe() -> None:
    text = PAGE.read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert named
    for test in named:
        assert f"def {test}(" in tests, test
    listed = {name for name in rows_of_the_page() if name.startswith("digits")}
    synchronous = {n for n in ON_DIGITS if not isinstance(load_config(n).algorithm, AsynchronousAlgorithm)}
    assert listed == synchronous


@pytest.mark.parametrize("name", ON_THE_PAGE)
def test_the_page_of_algorithms_has_the_settings_and_their_defaults(name: str) -> None:
    cls: Any = ON_THE_PAGE[name]
    row = rows_of_the_page()[name]
    shown = dict(re.findall(r"`(\w+)` (-?\d[\d.e-]*)", row))
    defaults = {item.name: getattr(cls(), item.name) for item in dataclasses.fields(cls)}
    for setting, value in shown.items():
        assert defaults[setting] == float(value), setting
    # What a class adds to its base it must name, with the default where that is a number.
    added = [key for key in vars(cls).get("__annotations__", {}) if key in defaults]
    for setting in added:
        assert f"`{setting}`" in row, setting
        if type(defaults[setting]) is float:
            assert setting in shown, setting


def test_the_page_of_algorithms_shows_many_defaults() -> None:
    rows = rows_of_the_page()
    assert sum(len(re.findall(r"`\w+` -?\d", rows[name])) for name in ON_THE_PAGE) >= 25
