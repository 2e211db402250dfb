"""The pages under docs/: generated ones are current, snippets run, commands work, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from fedddp.cli import main

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_configuration_is_current() -> None:
    page = ROOT / "docs" / "configuration.md"
    before = page.read_text()
    runpy.run_path(str(ROOT / "scripts" / "configuration"), run_name="__main__")
    assert page.read_text() == before, "run scripts/configuration"


@pytest.mark.usefixtures("no_dashboards")
def test_examples_of_extending_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    page = ROOT / "docs" / "extending.md"
    snippets, commands = blocks(page, "python"), blocks(page, "bash")
    assert len(snippets) == len(commands) == 4
    for snippet in snippets:
        file = tmp_path / snippet.splitlines()[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(snippet)
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "fedddp"
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--data.examples", "200"])
        assert not stop.value.code, command
    assert len(list(tmp_path.glob("runs/own-*/model.safetensors"))) == 4


@pytest.mark.usefixtures("no_dashboards")
def test_quickstart_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "quickstart.md"
    (snippet,) = blocks(page, "python")
    exec(compile(snippet, "quickstart.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) > 0.3
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    assert lines[0] == "./scripts/quickstart"
    for line in lines[1:]:
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(line)[1:])
        assert not stop.value.code, line
    assert {path.name for path in Path("runs").iterdir()} >= {"alone", "prox"}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_no_snippet_is_left_untested(page: Path) -> None:
    """Python on a page is run by a test of that page; commands start what the tests know."""
    tested = {"quickstart", "extending"}
    assert page.stem in tested or not blocks(page, "python")
