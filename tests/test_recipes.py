"""Every recipe that ships with the package trains, and every method has one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fedddp import Federation, Method, Track
from fedddp.aggregation import Mean
from fedddp.config.loader import choices, load, recipes

ROOT = Path(__file__).parent.parent
ON_DIGITS = [name for name in recipes() if name.startswith("digits")]


@pytest.mark.parametrize("name", ON_DIGITS)
def test_recipes_train(name: str) -> None:
    run = load(name)
    run = dataclasses.replace(
        run,
        rounds=1,
        data=dataclasses.replace(run.data, examples=300),
        local=dataclasses.replace(run.local, epochs=1),
        track=Track(with_=[], progress=False),
    )
    (row,) = Federation(run).run().history
    assert row["train/loss"] > 0
    assert 0 <= row["eval/accuracy"] <= 1


def test_every_method_and_rule_has_a_recipe() -> None:
    runs = [load(name) for name in ON_DIGITS]
    used = {type(run.algorithm).__name__ for run in runs} | {type(run.aggregation).__name__ for run in runs}
    ours = {
        n for base in (Method, Mean) for n, c in choices(base).items() if c.__module__.startswith("fedddp.")
    }
    assert ours <= used


def test_every_method_and_rule_has_a_row_in_the_docs() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    for base in (Method, Mean):
        for name, cls in choices(base).items():
            if cls.__module__.startswith(("fedddp.algorithms", "fedddp.aggregation.robust")):
                assert getattr(cls, "asynchronous", False) or name in rows, name


def test_the_page_of_methods_names_tests_that_exist_and_every_recipe() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert named
    for test in named:
        assert f"def {test}(" in tests, test
    listed = re.findall(r"^\| `(digits[\w-]*)` \|", text, re.MULTILINE)
    assert set(listed) == {name for name in ON_DIGITS if not load(name).algorithm.asynchronous}


@pytest.mark.parametrize("base", [Method, Mean])
def test_the_page_of_methods_has_the_defaults(base: type) -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    for name, cls in choices(base).items():
        row = re.search(rf"^\| `{name}` \|.*", text, re.MULTILINE)
        for key, value in re.findall(r"`(\w+)` (-?[\d.e-]+)", row.group() if row else ""):
            assert getattr(cls(), key) == float(value), (name, key)
