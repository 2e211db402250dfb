"""Every setting with its default and meaning: the text of `--help`, and docs/configuration.md."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import docstring_parser

from fedddp.config.loader import to_dict
from fedddp.config.schema import Config
from fedddp.section import choices, complete, default_of, field_hints, key_of, section_in, words

WIDTH = 80

HEAD = """\
# Configuration

A run is described by one YAML file, by flags (`--local.lr 0.1`), or by both: flags override the file. A class
that is chosen by name is written `algorithm: FedProx` or `algorithm: {name: FedProx, mu: 0.1}` in YAML and
`--algorithm FedProx --algorithm.mu 0.1` on the command line; the dotted path of your own class works
everywhere (see [extending](extending.md)). In Python the same classes are the arguments:
`Federation(algorithm=algorithms.FedProx(mu=0.1))`.

In YAML and on the command line, `none` and `null` mean "not set"; quote them to mean the words.

`scripts/configuration.py` writes this page from the classes themselves.
"""

USAGE = """\
usage: fedddp run RECIPE|FILE [--section.key value ...]

A class that is chosen by name is followed by its own settings, such as
`FedProx` below `--algorithm`.
"""


def documented(cls: Any) -> dict[str, str]:
    """Return the docstring below each field of `cls`, those it inherits included."""
    found: dict[str, str] = {}
    owner: type
    for owner in reversed(cls.__mro__):
        if hasattr(owner, "__dataclass_fields__"):
            if owner not in _MEANINGS:
                _MEANINGS[owner] = _documented_in(owner)
            found |= _MEANINGS[owner]
    return found


_MEANINGS: WeakKeyDictionary[type, dict[str, str]] = WeakKeyDictionary()
"""What was read already: all choices of a kind inherit from one class, and to parse its source takes long."""


def _documented_in(owner: type) -> dict[str, str]:
    try:
        parsed = docstring_parser.parse_from_object(owner).params
    except (OSError, TypeError, KeyError):  # a class without a source file, as one that was typed in
        parsed = []
    return {p.arg_name: " ".join((p.description or "").split()) for p in parsed}


def summary(cls: type) -> str:
    """Return the first paragraph of a class's docstring on one line."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def plain_settings(cls: Any) -> Iterator[tuple[str, Any, str, str]]:
    """Yield key, type, default and meaning of each setting of `cls` that is no section itself."""
    complete(cls)  # a user's class without the decorator, of which no object was made yet
    defaults = {item.name: default_of(item) for item in dataclasses.fields(cls)}
    meanings = documented(cls)  # once: it parses the source
    for name, hint in field_hints(cls).items():
        if section_in(hint) is None:
            value = to_dict(defaults[name])
            shown = {"None": "none", "True": "true", "False": "false"}.get(str(value), str(value))
            yield key_of(cls, name), hint, shown, meanings.get(name, "")


def nested(cls: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, class and default of each setting of `cls` that is a section."""
    complete(cls)
    for item in dataclasses.fields(cls):
        kind = section_in(field_hints(cls)[item.name])
        if kind is not None:
            yield key_of(cls, item.name), kind, default_of(item)


def help_text() -> str:
    """Return every setting, with its type, default and meaning, for a terminal of 80 columns."""
    return "\n".join([USAGE, *_help(Config, 2)]) + "\n"


def _help(cls: Any, indent: int) -> Iterator[str]:
    for key, hint, default, meaning in plain_settings(cls):
        yield _wrapped(f"--{key} ({words(hint)}; default: {default or '(empty)'})", indent)
        yield _wrapped(meaning, indent + 4, hanging=0)
    for key, kind, default in nested(cls):
        yield ""
        if not kind.chosen_by_name:
            yield _wrapped(f"{key}: {summary(kind)}", indent)
            yield from _help(kind, indent)
            continue
        yield _wrapped(f"--{key} NAME (default: {_chosen(default)}): {summary(kind)}", indent)
        if kind.key != key:
            yield _wrapped(f"The choices of --{kind.key}, with their settings below --{key}.", indent + 2)
            continue
        for name, option in sorted(choices(kind).items()):
            yield _wrapped(f"{name}: {summary(option)}", indent + 2)
            yield from _help(option, indent + 6)


def _chosen(default: Any) -> str:
    return "none" if default is None else type(default).__name__


def _wrapped(text: str, indent: int, hanging: int = 4) -> str:
    margins = (" " * indent, " " * (indent + hanging))
    return textwrap.fill(text, WIDTH, initial_indent=margins[0], subsequent_indent=margins[1])


def page() -> str:
    """Return docs/configuration.md."""
    lines = "\n".join(["## At the top level", "", *_page(Config)])
    return f"{HEAD}\n{lines.rstrip()}\n"


def _page(cls: Any) -> Iterator[str]:
    rows = list(plain_settings(cls))
    if rows:
        yield from ["| setting | default | meaning |", "|---|---|---|"]
        for key, _, default, meaning in rows:
            yield f"| `{key}` | `{default}` | {meaning.replace('|', chr(92) + '|')} |"
        yield ""
    for key, kind, default in nested(cls):
        yield from [f"## {key}", "", documented(cls)[key.rpartition(".")[2]], ""]
        if not kind.chosen_by_name:
            yield from _page(kind)
            continue
        yield from [f"Default: `{_chosen(default)}`.", ""]
        if kind.key != key:
            yield from [f"The choices of `{kind.key}`, with their settings below `{key}`.", ""]
            continue
        for title, option in sorted(choices(kind).items()):
            if "." not in title:  # no user's own
                yield from [f"**`{title}`**: {summary(option)}", ""]
                yield from _page(option)
