#!/usr/bin/env python3
"""Write docs/reference/: the pages of the commands and of the public Python names, from their docstrings.

    .venv/bin/python scripts/reference.py

With `--check` nothing is written; exit code 1 means that a page is not current.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
from abc import ABC
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import docstring_parser

import fedddp
from fedddp.cli import COMMANDS, USAGE, main
from fedddp.config.reference import documented, help_text, nested, plain_settings
from fedddp.section import Section, complete

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
GENERATED = "`scripts/reference.py` writes this page from the docstrings."


def pages() -> dict[str, str]:
    """Return the text of every generated page, by file name."""
    values = {name: getattr(fedddp, name) for name in fedddp.__all__}
    namespaces = {name: value for name, value in values.items() if inspect.ismodule(value)}
    found = {"commands.md": _commands(), "python.md": _top_level(namespaces)}
    return found | {f"{name}.md": _namespace(name, module) for name, module in namespaces.items()}


# ---- commands ----


def _commands() -> str:
    lines = [
        "# Commands",
        "",
        "`fedddp --help` prints the list, `fedddp COMMAND --help` the options of a command. Settings, as in",
        "`--local.lr 0.1`, are on the page [configuration](../configuration.md).",
        "",
        GENERATED,
        "",
    ]
    settings = help_text()
    for name, place in COMMANDS.items():
        module, function = place.split(":")
        usages = [line.strip() for line in USAGE.splitlines() if line.startswith(f"  fedddp {name} ")]
        usages = [re.split(r"  +", line)[0] for line in usages] or [f"fedddp {name}"]
        meaning = _markdown(getattr(importlib.import_module(module), function))
        lines += [f"## fedddp {name}", "", "```text", usages[0], "```", "", *meaning]
        options = _options(name, settings)
        lines += ["```text", options, "```", ""] if options else []
    lines += [
        "## Exit codes",
        "",
        "| code | meaning |",
        "|--:|---|",
        "| 0 | finished |",
        "| 1 | failed while training |",
        "| 2 | the configuration or the command cannot work; one line on standard error has the fix |",
        "| 75 | stopped by a signal, with a checkpoint; `--resume auto` resumes the run |",
        "| 130 | Ctrl-C in a command that does not train |",
    ]
    return "\n".join(lines) + "\n"


def _options(command: str, settings: str) -> str:
    """Return what `fedddp command --help` prints, without the list of all `settings` or of all commands."""
    printed = io.StringIO()
    os.environ["COLUMNS"] = "80"  # of argparse
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([command, "--help"])
    own = printed.getvalue().replace(settings, "").replace(USAGE, "")
    return "\n".join(line.rstrip() for line in own.strip("\n").splitlines())


# ---- Python ----


def _top_level(namespaces: dict[str, ModuleType]) -> str:
    lines = ["# Python", "", "Public names: `from fedddp import Federation`. All others are internal.", ""]
    lines += ["| namespace | contents |", "|---|---|"]
    lines += [f"| [`fedddp.{name}`]({name}.md) | {_summary(module)} |" for name, module in namespaces.items()]
    lines += ["", GENERATED, ""]
    for name in fedddp.__all__:
        if name not in namespaces and not name.startswith("_"):
            lines += _entry(name, getattr(fedddp, name))
    return "\n".join(lines).rstrip() + "\n"


def _namespace(name: str, module: ModuleType) -> str:
    lines = [f"# fedddp.{name}", "", _summary(module), "", f"`from fedddp import {name}`. {GENERATED}", ""]
    for public in sorted(_public(module), key=lambda public: not _is_base(getattr(module, public))):
        lines += _entry(public, getattr(module, public))
    return "\n".join(lines).rstrip() + "\n"


def _public(module: ModuleType) -> list[str]:
    return list(getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]))


def _is_base(value: Any) -> bool:
    """Return whether `value` is a class to subclass, whose hooks a user overrides."""
    return inspect.isclass(value) and (inspect.isabstract(value) or ABC in value.__bases__)


def _entry(name: str, value: Any) -> Iterator[str]:
    """Yield the lines of one name."""
    yield from [f"## {name}", ""]
    section = inspect.isclass(value) and issubclass(value, Section)
    if section:
        complete(value)
    elif callable(value):
        yield from ["```py", _signature(name, value), "```", ""]
    if not (inspect.isclass(value) or inspect.isfunction(value)):  # a type, such as a union
        yield from [f"`{value}`", ""]
        return
    yield from _markdown(value)
    if section:
        yield from _settings(value)
    elif dataclasses.is_dataclass(value):
        meanings = documented(value)
        yield from _table(
            "field", [(item.name, meanings.get(item.name, "")) for item in dataclasses.fields(value)]
        )
    elif inspect.isclass(value) and "__init__" in vars(value):
        yield from _markdown(value.__init__)
    if inspect.isclass(value) and (not section or _is_base(value)):
        yield from _members(value)


def _members(cls: type) -> Iterator[str]:
    """Yield the methods and properties that a class itself defines, with their docstrings."""
    for name, member in vars(cls).items():
        is_property = isinstance(member, property)
        function = member.fget if is_property else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            title = f"{cls.__name__}.{name}"
            call = title if is_property else _signature(title, function)
            yield from [f"### {title}", "", "```py", call, "```", "", *_markdown(function)]


def _signature(name: str, value: Any) -> str:
    """Return a call as one writes it, one argument per line where it is long."""
    if inspect.isclass(value) and not _has_own_constructor(value):
        return f"class {name}"
    signature = inspect.signature(value)
    words: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        if parameter.name not in ("self", "cls"):
            stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
            kind = "" if parameter.annotation is parameter.empty else f": {_type(parameter.annotation)}"
            default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
            words.append(f"{stars}{parameter.name}{kind}{default}")
    returned = signature.return_annotation
    back = "" if returned in (signature.empty, None, "None") else f" -> {_type(returned)}"
    line = f"{name}({', '.join(words)}){back}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(words) + f",\n){back}"


def _has_own_constructor(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) or "__init__" in vars(cls)


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _settings(cls: Any) -> Iterator[str]:
    rows = [(f"`{key}`", f"`{default}`", meaning) for key, _, default, meaning in plain_settings(cls)]
    rows += [(f"`{key}`", "a section", documented(cls)[key.rpartition(".")[2]]) for key, _, _ in nested(cls)]
    if rows:
        yield from ["| setting | default | meaning |", "|---|---|---|"]
        yield from (f"| {key} | {default} | {_cell(meaning)} |" for key, default, meaning in rows)
        yield ""


def _table(title: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    if rows:
        yield from [f"| {title} | meaning |", "|---|---|"]
        yield from (f"| `{name}` | {_cell(meaning)} |" for name, meaning in rows)
        yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _summary(value: Any) -> str:
    return " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())


def _markdown(value: Any) -> Iterator[str]:
    """Yield a Google-style docstring as Markdown."""
    parsed = docstring_parser.parse(inspect.getdoc(value) or "", docstring_parser.DocstringStyle.GOOGLE)
    for text in (parsed.short_description, parsed.long_description):
        if text:
            yield from [text, ""]
    parameters = [item for item in parsed.params if item.args[0] == "param"]
    yield from _table("argument", [(item.arg_name, item.description or "") for item in parameters])
    if parsed.returns and parsed.returns.description:
        yield from [f"Returns: {' '.join(parsed.returns.description.split())}", ""]
    for error in parsed.raises:
        yield from [f"Raises `{error.type_name}`: {' '.join((error.description or '').split())}", ""]
    for example in parsed.examples:
        yield from ["```py", (example.description or "").strip(), "```", ""]


def write() -> None:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not current")
    check = parser.parse_args().check
    current = pages()
    if check and sorted(current) != sorted(path.name for path in FOLDER.iterdir()):
        sys.exit(f"error: {FOLDER} must hold {', '.join(sorted(current))}; delete the others")
    for name, text in current.items():
        page = FOLDER / name
        if not check:
            page.parent.mkdir(exist_ok=True)
            page.write_text(text, encoding="utf-8")
        elif not page.exists() or page.read_text(encoding="utf-8") != text:
            sys.exit(f"error: {page} is not current; run scripts/reference.py")


if __name__ == "__main__":
    write()
