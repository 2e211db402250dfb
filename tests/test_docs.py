"""The pages under docs/: programs and commands run as they stand, links and reference are current.

They train on fewer digits than a reader does, and for two rounds where the page names no number.
"""

from __future__ import annotations

import ast
import gc
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from pages import (
    ROOT,
    assert_target_exists,
    blocks,
    commands,
    keep_some_digits,
    run_part,
    sections,
    snippets,
    targets,
    without_numbers,
)

from fedddp import load_config
from fedddp.aggregation import Aggregation
from fedddp.algorithms import Algorithm
from fedddp.config.reference import page as configuration
from fedddp.section import choices, class_name
from fedddp.simulation.attacks import Attack

FOLDER = ROOT / "docs"
DOCS = {str(path.relative_to(FOLDER).with_suffix("")): path for path in sorted(FOLDER.rglob("*.md"))}
EXAMPLES = {title: text for title, text in sections(DOCS["examples"].read_text()).items() if blocks(text)}
PARTS = {
    f"{page}: {title}": text
    for page in (
        "examples",
        "extending",
        "tasks",
        "algorithms",
        "asynchronous",
        "compare",
        "compression",
        "monitoring",
        "privacy",
        "secure-aggregation",
    )
    for title, text in sections(DOCS[page].read_text()).items()
    if commands(text) or snippets(text)
}
"""What a reader can run on its own: the sections of these pages."""

WHOLE = [
    "index",
    "quickstart",
    "concepts",
    "reports",
    "use",
    *(name for name in DOCS if name.startswith("tutorials/")),
]
"""Pages that a reader types from top to bottom."""

ALL_DIGITS = ("use", "compare: Comparing runs")
"""What shows a blank where there was no mistake, or where a score was not reached."""

RUN_BY_OTHER_TESTS = {
    "./scripts/quickstart": "tests/test_scripts.py",
    "torchrun --standalone --nproc-per-node 2 -m fedddp compare compare-paradigms": "tests/test_compare.py",
}
BATCH = ("sbatch ", "'FEDDDP_TORCHRUN=")
"""Commands for a cluster; tests/slurm submits the scripts."""


@pytest.fixture
def user(no_dashboards: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Be a user in an empty folder, at a terminal of 100 columns, whose modules are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    gc.freeze()  # so that collections look only at what the page makes
    with pytest.MonkeyPatch.context() as terminal:
        terminal.setenv("COLUMNS", "100")
        yield
    own = [name for name in sys.modules if name.partition(".")[0] == "my_lab"]
    for name in own:
        del sys.modules[name]
    if own:
        gc.collect()  # a class that is gone is no choice any more
    gc.unfreeze()


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("part", PARTS)
def test_a_section_runs_as_it_stands_and_prints_what_it_shows(
    part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if part not in ALL_DIGITS:
        keep_some_digits(monkeypatch)
    run_part(PARTS[part], capsys, tuple(RUN_BY_OTHER_TESTS))


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("page", WHOLE)
def test_a_page_runs_from_top_to_bottom_and_prints_what_it_shows(
    page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if page not in ALL_DIGITS:
        keep_some_digits(monkeypatch)
    run_part(DOCS[page].read_text(), capsys, (*RUN_BY_OTHER_TESTS, *BATCH))
    made = {path.name for path in Path("runs").iterdir()} if Path("runs").exists() else set()
    named = set(re.findall(r"--name ([\w-]+)", DOCS[page].read_text()))
    assert named - {"digits"} <= made


def test_commands_left_to_other_tests_are_named_there() -> None:
    for command, test in RUN_BY_OTHER_TESTS.items():
        assert command.rpartition("fedddp ")[2].removeprefix("./") in (ROOT / test).read_text(), command


def test_python_stands_only_on_pages_that_are_run() -> None:
    run = {*WHOLE, "tracking", *(part.partition(":")[0] for part in PARTS)}  # tracking: tests/test_metrics.py
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


# ---- the site ----


class Page(HTMLParser):
    """What a page of the site links to, loads and can be linked to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.ids: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.ids |= {given["id"]} if "id" in given else set()
        target = given.get("href", given.get("src"))
        if target is not None:
            hint = given.get("rel") in ("canonical", "next", "prev", "icon")  # for machines
            loads = tag in ("script", "img") or (tag == "link" and not hint)
            (self.loaded if loads else self.links).add(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site strictly, in a copy of its sources."""
    pytest.importorskip("zensical")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(FOLDER, folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert built.returncode == 0, re.sub(r"\x1b\[[\d;]*m", "", built.stderr)
    return folder / "site"


def test_every_page_is_in_the_navigation_once_and_has_no_plugin() -> None:
    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from files(inner)

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(files(settings["nav"])) == sorted(f"{name}.md" for name in DOCS)
    assert "plugins" not in settings


def test_links_pictures_and_titles_of_the_site_exist(site: Path) -> None:
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}
    assert len(pages) == len(DOCS)
    for file, page in pages.items():
        for target in page.links | page.loaded:
            address, _, anchor = target.partition("#")
            if address.startswith(("https://", "mailto:")):
                continue
            linked = (file.parent / unquote(address)).resolve() if address else file
            linked = linked / "index.html" if linked.is_dir() else linked
            assert linked.is_file(), f"{file.relative_to(site)}: {target}"
            if anchor and linked in pages and not anchor.startswith("__"):
                assert unquote(anchor) in pages[linked].ids, f"{file.relative_to(site)}: {target}"


def test_the_site_loads_nothing_from_other_servers(site: Path) -> None:
    for file in site.rglob("*.html"):
        away = {target for target in Page(file).loaded if re.match(r"(https?:)?//", target)}
        assert away == set(), file


def test_the_pages_of_commands_and_names_are_generated_from_their_docstrings() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "reference.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- the notebook ----


@pytest.mark.usefixtures("no_dashboards")
def test_the_notebook_runs_and_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((FOLDER / "notebook.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names: dict[str, object] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        last = tree.body[-1] if isinstance(tree.body[-1], ast.Expr) else None
        del tree.body[len(tree.body) - bool(last) :]
        exec(compile(tree, "notebook.ipynb", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "notebook.ipynb", "eval"), names) if last else None
        printed = {"stream": capsys.readouterr().out, "execute_result": repr(value)}
        for output in cell["outputs"]:
            if output["output_type"] in printed:  # else a picture, or the bar
                shown = output.get("text") or output["data"]["text/plain"]
                assert without_numbers("".join(shown)) == without_numbers(printed[output["output_type"]])
    assert Path("runs/notebook/model.safetensors").exists()


# ---- the cluster ----


@pytest.mark.parametrize("page", ["README.md", "docs/slurm.md", "docs/tutorials/slurm.md"])
def test_batch_lines_give_a_configuration_that_loads(page: str) -> None:
    lines = [line for line in commands((ROOT / page).read_text()) if "federated.sbatch" in line]
    assert lines
    for line in lines:
        words = shlex.split(line)
        target, *flags = words[words.index("slurm/federated.sbatch") + 1 :]
        load_config(target.replace("my-run.yaml", "digits"), flags)
