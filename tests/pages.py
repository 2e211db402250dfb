"""Markdown pages as tests read them: sections, code blocks and commands, and how these are run."""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from launching import type_on_this_rank

from fedddp.cli import main
from fedddp.data import digits
from fedddp.testing import run_world

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/fedddp/fedddp/blob/main/"


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    text: str
    after: str
    """The page's text between the previous block and this one."""


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, or of a part of one."""
    found, end = [], 0
    for block in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        found.append(Block(block[1], block[2], text[end : block.start()]))
        end = block.end()
    return found


def snippets(text: str) -> list[str]:
    """Return the Python of a page that is a program, not the content of a module."""
    return [block.text for block in blocks(text) if block.language == "python" and not _file(block)]


def commands(text: str) -> list[str]:
    """Return the lines to type of a page, without comments, continuation lines joined."""
    scripts = [block.text.replace("\\\n", "") for block in blocks(text) if block.language == "bash"]
    words = [shlex.split(line, comments=True) for script in scripts for line in script.splitlines()]
    return [shlex.join(line) for line in words if line]


def sections(text: str) -> dict[str, str]:
    """Return the text of a page by title; a line of code that starts with one # is a comment."""
    parts = re.split(r"(?:\A#|^##+) (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def targets(text: str) -> list[str]:
    """Return what a page links to."""
    return re.findall(r"\]\(([^)]+)\)", text)


def assert_target_exists(target: str, page: Path) -> None:
    """Fail where a link of `page` leads nowhere; addresses of others on the web are not fetched."""
    name, _, anchor = target.partition("#")
    if name.startswith(REPOSITORY):
        assert (ROOT / name.removeprefix(REPOSITORY)).exists(), target
    if name.startswith("https://"):
        return
    linked = page.parent / name if name else page
    assert linked.exists(), target
    if anchor:
        titles = [re.sub(r"[^\w -]", "", title.lower()) for title in sections(linked.read_text())]
        assert anchor in [title.replace(" ", "-") for title in titles], target


def keep_some_digits(patch: pytest.MonkeyPatch) -> None:
    """Train on a quarter of the digits: what a page prints stays, but for numbers, which are not compared."""
    pixels, labels = digits._read()
    patch.setattr(digits, "_read", lambda: (pixels[::4], labels[::4]))


def shortened(command: str) -> str:
    """Return a command whose run has two rounds where the page leaves their number to the configuration."""
    unnamed = command.startswith("fedddp run ") and "--rounds" not in command
    return f"{command} --rounds 2" if unnamed else command


def _type_with_some_digits(command: str) -> tuple[object, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        keep_some_digits(patch)
        return type_on_this_rank(command)


def run_command(command: str) -> None:
    """Run `fedddp ...` or `python FILE` here, or `torchrun ... -m fedddp ...` on as many ranks as it starts.

    The ranks are those of `run_world`: torchrun itself is tested by tests/e2e.
    """
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        ranks = int(arguments[arguments.index("--nproc-per-node") + 1])
        typed = shlex.join(arguments[arguments.index("fedddp") + 1 :])
        results = run_world(_type_with_some_digits, typed, size=ranks)
        assert [code for code, _ in results] == [0] * ranks, results
        return
    if program == "python":
        (file,) = arguments
        runpy.run_path(file, run_name="__main__")
        return
    assert program == "fedddp", command
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code, command


def run_part(text: str, capsys: pytest.CaptureFixture[str], elsewhere: tuple[str, ...] = ()) -> None:
    """Run a page, or a part of one, as it stands: write its files, type its commands, run its programs.

    A block of output that follows one that was run must be the end of what that printed; numbers, which
    depend on the machine, may differ.

    Args:
        text: the page.
        capsys: the test's.
        elsewhere: beginnings of commands that are left out, because other tests run them.
    """
    printed = ""
    for block in blocks(text):
        if block.language == "text":
            if printed and not block.after.strip():
                assert without_numbers(printed).endswith(without_numbers(block.text)), printed
            continue
        file = _file(block)
        printed = ""
        if file:
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text)
        elif block.language == "python":
            Path("program.py").write_text(block.text)
            runpy.run_path("program.py", run_name="__main__")
            printed = capsys.readouterr().out
        elif block.language == "bash":
            mine = [c for c in commands(f"```bash\n{block.text}```") if not c.startswith(elsewhere)]
            for command in mine:
                run_command(shortened(command))
            printed = capsys.readouterr().out


def _file(block: Block) -> Path | None:
    """Return the file whose content a block is: its first line names it."""
    named = re.match(r"# ([\w/-]+\.(?:py|yaml))\b", block.text)
    return Path(named[1]) if named else None


def without_numbers(text: str) -> str:
    """Return a text with # for numbers, which depend on the machine, and one space between words.

    How many they are, in a row of a table and in rows, depends on it too: a confusion matrix has some.
    """
    lines = [" ".join(re.sub(r"\d[\d.,:]*( %)?", "#", line).split()) for line in text.splitlines()]
    alike = [re.sub(r"#( #)+", "#", line) for line in lines if line]
    return " ".join(line for line, _ in itertools.groupby(alike))
