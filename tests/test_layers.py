"""The packages import each other without a cycle; few modules use torch.distributed or the environment."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedddp"
MODULES = sorted(PACKAGE.rglob("*.py"))
LINES, FUNCTION_LINES = 400, 60
MAY_NAME_DISTRIBUTED = {"distributed/world.py", "distributed/launch.py", "testing.py"}
MAY_READ_ENVIRONMENT = {
    "__init__.py",  # before torch is imported
    "distributed/environment.py",
    "distributed/launch.py",
    "testing.py",
    "commands/console.py",
}
TIMES_OF_DAY = re.compile(r"\btime\.(time|time_ns|localtime|gmtime|ctime|strftime)\b|\bdatetime\.")

MAY_READ_CLOCK = {"storage/run_record.py"}

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


def unit(parts: tuple[str, ...]) -> str:
    """Return the package, or the module at the top, that the dotted path `parts` inside fedddp belongs to."""
    return parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Yield the units that `path` imports, those for annotations only (`TYPE_CHECKING`) included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = tuple(name.split(".")[1:])
            if name.startswith("fedddp.") and parts != ("__version__",):
                yield unit(parts)


def imports_between_units() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        own = unit(path.relative_to(PACKAGE).parts)
        if own != "__init__":  # the public names: resolved on first use
            graph.setdefault(own, set()).update(other for other in imported(path) if other != own)
    return graph


def test_packages_import_each_other_without_a_cycle() -> None:
    graph = imports_between_units()
    assert set().union(*graph.values()) <= graph.keys(), "modules import modules, not the public names"
    units = set(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    assert units >= {
        "rng",
        "distributed",
        "data",
        "algorithms",
        "config",
        "training",
        "federation",
        "cli",
    }


def test_the_design_page_describes_every_package() -> None:
    rows = re.findall(r"^\| `([\w/.]+)` \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    described = {unit((row.strip("/"),)) for row in rows}
    assert described == imports_between_units().keys()


@each_module
def test_few_modules_use_torch_distributed_and_the_environment(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Import | ast.ImportFrom) else ""
        if name not in MAY_NAME_DISTRIBUTED:
            assert "torch.distributed" not in text
        if name not in MAY_READ_ENVIRONMENT:
            assert text not in ("os.environ", "os.getenv")


@each_module
def test_no_module_reads_the_time_of_day(path: Path) -> None:
    """A machine's clock may jump; `timedelta` is a length of time. Only the record of a launch has a date."""
    reads_clock = str(path.relative_to(PACKAGE)) in MAY_READ_CLOCK
    assert reads_clock or not TIMES_OF_DAY.search(ast.unparse(ast.parse(path.read_text())))


def test_the_dry_run_does_not_import_the_charts() -> None:
    text = (PACKAGE / "reporting" / "dry_run.py").read_text()
    assert not re.search(r"matplotlib|fedddp\.reporting|reporting import", text)


def test_contributing_names_the_limits_of_files_and_functions() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert re.search(rf"fewer than {LINES} lines", text)
    assert re.search(rf"functions fewer than {FUNCTION_LINES}\b", text)


@each_module
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 < FUNCTION_LINES, node.name
