"""The mutation script: which wrong changes it makes, that its lists fit the package, and what it prints."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import scripts/mutate.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutate", module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def changes(mutate: ModuleType, source: str) -> set[str]:
    return {mutant.change for mutant in mutate.mutants_in("tiny.py", source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = b + c", {"b + c -> (b - c)"}),
        ("a = b - c", {"b - c -> (b + c)"}),
        ("a = b * c / d", {"b * c / d -> (b * c * d)", "b * c -> (b / c)"}),
        ("a = b // c", {"b // c -> (b * c)"}),
        ("a = b % c", {"b % c -> (b // c)"}),
        ("a = b ** c", {"b ** c -> (b * c)"}),
        ("a = b < c", {"b < c -> (b <= c)"}),
        ("a = b >= c", {"b >= c -> (b > c)"}),
        ("a = b < c == d", {"b < c == d -> (b <= c == d)", "b < c == d -> (b < c != d)"}),
        ("a = b is c", {"b is c -> (b is not c)"}),
        ("a = b not in c", {"b not in c -> (b in c)"}),
        ("a = b and c", {"b and c -> (b or c)"}),
        ("a = b or c or d", {"b or c or d -> (b and c and d)"}),
        ("a = not b", {"not b -> (b)"}),
        ("a = -b", {"-b -> (b)"}),
        ("a = 3", {"3 -> 4"}),
        ("a = 0.5", {"0.5 -> 0.75"}),
        ("a = 0.0", {"0.0 -> 1.0"}),
        ("a = True", {"True -> False"}),
        ("a = 'text'", set()),
        ("a = max(b, c)", {"max -> min"}),
        ("a = b.sub_(c)", {"b.sub_ -> (b.add_)"}),
        ("f(a)", {"f(a) -> pass"}),
        ("a += b", {"a += b -> pass", "a += b -> a -= b"}),
        ("a |= b", {"a |= b -> pass"}),
    ],
)
def test_each_kind_of_expression_has_its_wrong_changes(
    mutate: ModuleType, source: str, expected: set[str]
) -> None:
    assert {change.replace("  ->  ", " -> ") for change in changes(mutate, source)} == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring."""',
        "def f(a: int = 3) -> Literal[4]:\n    yield",
        "@decorated(1)\ndef f():\n    return a",
        "a: int = 3",
        "a: int = field(default=3)",
        "raise ValueError(f'{a + 1}')",
        "assert a > 1",
        "a = f'{b + 1}'",
        "a = zip(b, c, strict=True)",
    ],
)
def test_docstrings_defaults_annotations_messages_and_checks_stay(mutate: ModuleType, source: str) -> None:
    assert changes(mutate, source) == set()


def test_a_mutant_replaces_its_own_bytes_only(mutate: ModuleType) -> None:
    source = 'é = "ü"\ndef f(a):\n    return (a +\n            1), "ö"\n'
    (mutant,) = (m for m in mutate.mutants_in("tiny.py", source) if "+" in m.before)
    encoded = source.encode()
    changed = encoded[: mutant.start] + mutant.after.encode() + encoded[mutant.end :]
    assert changed.decode() == 'é = "ü"\ndef f(a):\n    return ((a - 1)), "ö"\n'
    assert (mutant.line, mutant.text) == (3, "return (a +")
    assert str(mutant) == "fedddp/tiny.py:3: a + 1  ->  (a - 1)"


def test_every_explained_mutant_is_one_of_the_package(mutate: ModuleType) -> None:
    package = ROOT / "fedddp"
    found = {
        (mutant.text, mutant.change)
        for file in package.rglob("*.py")
        for mutant in mutate.mutants_in(file.relative_to(package).as_posix(), file.read_text())
    }
    assert len(found) > 1000
    gone = mutate.EXPLAINED.keys() - found
    assert not gone, f"no line of the package has these any more; remove them: {gone}"
    assert all(mutate.EXPLAINED.values()), "each has its reason"
    assert not {(m.text, m.change) for m in mutate.mutants_of(mutate.MODULES)} & mutate.EXPLAINED.keys()


def test_every_module_has_near_tests_and_they_exist(mutate: ModuleType) -> None:
    for files, _ in mutate.NEAREST.values():
        assert all((ROOT / "tests" / f"test_{name}.py").exists() for name in files)
    for module in {mutant.module for mutant in mutate.mutants_of(mutate.MODULES)}:
        assert any(f"{module}/".startswith(f"{key}/") for key in mutate.NEAREST), module
    for key in mutate.NEAREST:
        assert list(mutate.mutants_of([key])), f"the package has no {key}"


TINY = """def larger(a, b):
    return max(a, b) + 0
"""
TEST = """from fedddp.tiny import larger


def test_larger():
    assert larger(2, 3) == 3
"""
ENDLESS = """import time


def test_endless():
    while True:
        time.sleep(1)
"""


@pytest.fixture
def tiny(mutate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let the script work on a package of one module, with one test."""
    root = tmp_path / "tiny"
    files = {"fedddp/tiny.py": TINY, "fedddp/__init__.py": "", "tests/test_tiny.py": TEST}
    for name, text in {**files, "tests/test_endless.py": ENDLESS}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(mutate, "ROOT", root)
    monkeypatch.setattr(mutate, "NEAREST", {"tiny": (("tiny",), ""), "endless": (("endless",), "")})
    with pytest.MonkeyPatch.context() as plugins:
        plugins.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # whose imports take most of the time
        yield root


def processes_in(folder: Path) -> Iterator[str]:
    """Yield the processes whose working directory is `folder`."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (process / "cwd").resolve(strict=True) == folder:
                yield process.name


def test_a_line_of_a_tiny_package_prints_one_line_per_mutant_and_a_table(
    mutate: ModuleType, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--modules", "tiny", "--only", "fedddp/tiny.py:2")
    monkeypatch.setattr(sys, "argv", ["mutate.py", *flags])
    assert mutate.main() == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "3 of 3 mutants of tiny"
    assert lines[:3] == [
        "caught   fedddp/tiny.py:2: 0  ->  1",
        "caught   fedddp/tiny.py:2: max  ->  min",
        "SURVIVED fedddp/tiny.py:2: max(a, b) + 0  ->  (max(a, b) - 0)",
    ]
    assert re.search(r"all +│ 3 +│ 2 \(67%\)", lines[-2])
    assert (tiny / "fedddp" / "tiny.py").read_text() == TINY


def test_tests_that_do_not_end_in_time_have_failed_and_are_killed(
    mutate: ModuleType, tiny: Path, tmp_path: Path
) -> None:
    copy = mutate.Copy(tmp_path / "copy")
    assert copy.passes("tiny", 30.0)
    assert not copy.passes("endless", 2.0)
    assert not list(processes_in(copy.folder))


def test_tests_that_fail_without_a_change_end_the_script(
    mutate: ModuleType, tiny: Path, tmp_path: Path
) -> None:
    (tiny / "tests" / "test_tiny.py").write_text(TEST.replace("== 3", "== 4"))
    mutant, *_ = mutate.mutants_of(["tiny"])
    with pytest.raises(SystemExit, match="error: tests of tiny fail without a change: .* tests/test_tiny.py"):
        mutate.Copy(tmp_path / "copy").catches(mutant)
