"""The house of docs/design.md: modules import from floors below their own, and few name torch.distributed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedddp"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
MAY_NAME_DISTRIBUTED = {"topology.py", "launch.py", "testing.py"}
MAY_READ_ENVIRONMENT = {"launch.py", "testing.py", "cli.py"}
TIMES_OF_DAY = re.compile(r"\btime\.(time|time_ns|localtime|gmtime|ctime|strftime)\b|\bdatetime\.")


def floors() -> dict[str, int]:
    """Return the floor of every module or package in the table of docs/design.md."""
    rows = re.findall(r"^\| (\d+) \| (`[^|]+`) \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    return {name.strip("/"): int(floor) for floor, names in rows for name in re.findall(r"`([^`]+)`", names)}


def room(parts: tuple[str, ...]) -> str:
    """Return the table's name of the module with the path `parts` inside fedddp."""
    return parts[0].removesuffix(".py") if len(parts) > 1 else f"{parts[0].removesuffix('.py')}.py"


def own_imports(path: Path) -> Iterator[str]:
    """Yield the rooms that `path` imports from, those only for annotations left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = tuple(name.split(".")[1:])
            if name.startswith("fedddp.") and parts != ("__version__",):
                yield parts[0] if (PACKAGE / parts[0]).is_dir() else f"{parts[0]}.py"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    house, own = floors(), room(path.relative_to(PACKAGE).parts)
    assert own in house, f"give {own} a floor in docs/design.md"
    for other in own_imports(path):
        assert other == own or house[other] < house[own], f"{own} (floor {house[own]}) imports {other}"


def test_table_names_what_there_is() -> None:
    for name in floors():
        assert (PACKAGE / name).exists(), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_few_speak_to_torch_distributed_and_read_the_environment(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Import | ast.ImportFrom) else ""
        if path.name not in MAY_NAME_DISTRIBUTED:
            assert "torch.distributed" not in text
        if path.name not in MAY_READ_ENVIRONMENT:
            assert text not in ("os.environ", "os.getenv")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_depends_on_the_time_of_day(path: Path) -> None:
    """The clock may jump; `timedelta` is a length of time."""
    assert not TIMES_OF_DAY.search(ast.unparse(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < 440
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 70, node.name
