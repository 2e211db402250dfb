"""The pages under docs/: programs and commands run as they stand, links and reference are current."""

from __future__ import annotations

import ast
import gc
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import ROOT, assert_target_exists, blocks, commands, run_part, sections, snippets, targets

from fedddp.aggregation import Aggregation
from fedddp.algorithms import Algorithm
from fedddp.config.reference import page as configuration
from fedddp.section import choices, class_name
from fedddp.simulation.attacks import Attack

DOCS = {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))}
EXAMPLES = {title: text for title, text in sections(DOCS["examples"].read_text()).items() if blocks(text)}
PARTS = {
    f"{page}: {title}": text
    for page in ("examples", "extending", "algorithms", "asynchronous", "compare")
    for title, text in sections(DOCS[page].read_text()).items()
    if commands(text) or snippets(text)
}
"""What a reader can run on its own: the sections of these pages."""

RUN_BY_OTHER_TESTS = {
    "./scripts/quickstart": "tests/test_scripts.py",
    "torchrun --standalone --nproc-per-node 2 -m fedddp compare compare-paradigms": "tests/test_compare.py",
}


@pytest.fixture
def user(no_dashboards: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Be a user in an empty folder, at a terminal of 100 columns, whose modules are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.MonkeyPatch.context() as terminal:
        terminal.setenv("COLUMNS", "100")
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]
    gc.collect()  # a class that is gone is no choice any more


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("part", PARTS)
def test_a_section_runs_as_it_stands_and_prints_what_it_shows(
    part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_part(PARTS[part], capsys, tuple(RUN_BY_OTHER_TESTS))


@pytest.mark.usefixtures("user")
def test_the_quickstart_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    run_part(DOCS["quickstart"].read_text(), capsys, tuple(RUN_BY_OTHER_TESTS))
    assert {path.name for path in Path("runs").iterdir()} == {"alone", "prox", "prox-again", "run"}


def test_commands_left_to_other_tests_are_named_there() -> None:
    for command, test in RUN_BY_OTHER_TESTS.items():
        assert command.rpartition("fedddp ")[2].removeprefix("./") in (ROOT / test).read_text(), command


def test_python_stands_only_on_pages_that_are_run() -> None:
    run = {"quickstart", *(part.partition(":")[0] for part in PARTS)}
    with_python = {name for name, path in DOCS.items() if "```python" in path.read_text()}
    assert with_python <= run


def test_the_five_tasks_are_as_short_as_promised() -> None:
    module, algorithm, rule, sweep, trained = (
        ast.parse(snippet) for text in EXAMPLES.values() for snippet in snippets(text)
    )
    assert len([line for line in module.body if not isinstance(line, ast.Import | ast.ImportFrom)]) == 6
    for tree, hook, arguments in (
        (algorithm, "correct", ["self", "context"]),
        (rule, "aggregate", ["self", "updates", "weights"]),
    ):
        (written,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
        (function,) = (node for node in written.body if isinstance(node, ast.FunctionDef))
        assert written.decorator_list == []
        assert (function.name, [argument.arg for argument in function.args.args]) == (hook, arguments)
    assert len(sweep.body) == 4  # import, configuration, comprehension, summary
    assert "load_model" in ast.unparse(trained.body[3])
    assert {"evaluate(", "predict("} <= set(re.findall(r"\w+\(", ast.unparse(trained)))


@pytest.mark.parametrize("page", DOCS)
def test_links_lead_to_pages_and_titles_that_exist(page: str) -> None:
    for target in targets(DOCS[page].read_text()):
        assert_target_exists(target, DOCS[page])


def test_the_page_of_settings_is_generated_from_the_classes() -> None:
    current = DOCS["configuration"].read_text() == configuration()
    assert current, "docs/configuration.md is out of date; run scripts/configuration.py"


def test_the_page_of_algorithms_counts_what_ships() -> None:
    def shipped(base: type) -> int:
        return len([cls for cls in choices(base).values() if "." not in class_name(cls)])

    counted = re.search(
        r"trains (\d+) federated algorithms with (\d+) aggregation rules and (\d+) attacks",
        DOCS["algorithms"].read_text(),
    )
    assert counted
    assert [int(number) for number in counted.groups()] == [
        shipped(Algorithm),
        shipped(Aggregation),
        shipped(Attack) - 1,  # NoAttack is none
    ]
