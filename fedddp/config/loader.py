"""From YAML and the command line to a run's configuration, and back.

YAML, command line and Python end in the same constructors, so they fail with the same words.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from fedddp.aggregation import Mean
from fedddp.algorithms.algorithm import Method
from fedddp.algorithms.asynchronous import Staleness
from fedddp.config.schema import ConfigError, Run
from fedddp.data.partition import Partition
from fedddp.simulation.attacks import Attack
from fedddp.simulation.clock import Clock, Speed
from fedddp.tasks.task import Task

RECIPES = Path(__file__).parent.parent / "recipes"

CHOICES: tuple[type, ...] = (Partition, Method, Mean, Attack, Task, Clock, Speed, Staleness)
"""Bases whose subclass is chosen by name: `algorithm: {name: FedProx, mu: 0.1}`."""


def load(target: str | None, arguments: Sequence[str] = ()) -> Run:
    """Return the run of a recipe's name or a YAML file, with command-line `arguments` on top.

    Args:
        target: name of a recipe, path of a YAML file, or None for the defaults.
        arguments: such as `["--algorithm", "FedProx", "--algorithm.mu", "0.1"]`.

    Raises:
        ConfigError: anything wrong, in one line.
    """
    sections = read_sections(target) if target else {}
    if "compare" in sections:
        raise ConfigError(
            f"{target} describes several runs; train and compare them with `fedddp compare {target}`"
        )
    return load_sections(sections, arguments)


def load_sections(sections: dict[str, Any], arguments: Sequence[str] = ()) -> Run:
    """Return the run of `sections`, what a YAML file holds; otherwise as `load`."""
    given = _outer_to_inner(sections)
    flags = _checked(arguments)
    try:
        parsed = make_parser().parse_args(["--config", yaml.safe_dump(given), *flags])
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_one_line(error)) from None
    return typing.cast(Run, _construct(Run, parsed, ""))


def help_text() -> str:
    """Return every setting with its meaning and default."""
    return make_parser().format_help().replace("--track.with_", "--track.with")


@functools.cache
def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of a run's flags."""
    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=True, subclasses_enabled=list(CHOICES)
    )
    parser = jsonargparse.ArgumentParser(
        usage="fedddp run RECIPE|FILE [--section.key value ...]",
        description="Those of a class that is chosen by name: fedddp run digits --algorithm.help FedProx",
        print_config=None,
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--config", action="config", help=jsonargparse.SUPPRESS)
    parser.add_class_arguments(Run, None, fail_untyped=True)
    return parser


def to_dict(value: Any) -> Any:
    """Return a configuration as plain data, in the form that `load` reads."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named: dict[str, Any] = {}
        if isinstance(value, CHOICES):
            named["name"] = _class_name(type(value))
        for item in dataclasses.fields(value):
            named[item.name.removesuffix("_")] = to_dict(getattr(value, item.name))
        return named
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def to_yaml(run: Run) -> str:
    """Return the YAML of `run`; `load` makes the same run of it."""
    return yaml.safe_dump(to_dict(run), sort_keys=False, allow_unicode=True)


def recipes() -> dict[str, str]:
    """Return the recipes that ship with the package: name to the comment in their first line."""
    found = sorted(RECIPES.glob("*.yaml"))
    return {path.stem: path.read_text().splitlines()[0].lstrip("# ") for path in found}


def read_sections(target: str) -> dict[str, Any]:
    """Return what the recipe or YAML file `target` holds, unchecked.

    Raises:
        ConfigError: there is no such recipe or file, or it is no YAML with sections.
    """
    path = Path(target)
    if path.suffix not in (".yaml", ".yml"):
        names = [recipe.stem for recipe in RECIPES.glob("*.yaml")]
        if target not in names:
            raise ConfigError(
                f"unknown recipe {target!r}{_nearest(target, names)}; `fedddp recipes` lists them, "
                "or give the path of a .yaml file"
            )
        path = RECIPES / f"{target}.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a recipe or a .yaml file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates, encodings, deep nesting too
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(content or {}, dict):
        raise ConfigError(f"{path} must hold sections such as `data:`, got {type(content).__name__}")
    return content or {}


def _outer_to_inner(given: dict[str, Any], cls: type = Run, prefix: str = "") -> dict[str, Any]:
    """Turn `{name: FedProx, mu: 1}` into what the parser reads, and refuse keys nobody knows."""
    hints = typing.get_type_hints(cls)
    known = {item.name.removesuffix("_"): item.name for item in dataclasses.fields(cls)}
    inner: dict[str, Any] = {}
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise ConfigError(_unknown(key, cls))
        hint = _class_of(hints[known[name]])
        if hint in CHOICES and value is not None:
            rest = dict(value) if isinstance(value, dict) else {"name": value}
            asked = rest.pop("name", None)
            chosen = _find(hint, asked, key) if asked else _default_class(cls, known[name])
            inner[name] = {"class_path": _path(chosen), "init_args": _outer_to_inner(rest, chosen, f"{key}.")}
        elif not dataclasses.is_dataclass(hint):
            inner[known[name]] = value
        elif isinstance(value, dict):
            inner[known[name]] = _outer_to_inner(value, typing.cast(type, hint), f"{key}.")
        elif value is not None:  # a section whose lines are all comments is None
            raise ConfigError(_not_a_section(key, hint, value))
    return inner


def _checked(arguments: Sequence[str]) -> list[str]:
    """Return the flags in the form that the parser reads, and refuse what it would explain badly."""
    if any(word.endswith(".help") for word in arguments):
        return [*arguments]  # the parser shows the help of a class, and exits
    words, given = iter(arguments), []
    for word in words:
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"unexpected argument {word!r}; settings are given as --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{key} has no value; give one, as in --{key} VALUE")
        given.append((key, value))
    bases = {key: kind for key, _, hint, _ in _known() if (kind := _class_of(hint)) in CHOICES}
    given = [(k, _path(_find(bases[k], value, k)) if k in bases else value) for k, value in given]
    known = {key: (inner, _class_of(hint)) for key, inner, hint, _ in _known()}  # a user's class included
    for key, value in given:
        if key not in known:
            raise ConfigError(_unknown(key))
        if key not in bases and dataclasses.is_dataclass(known[key][1]):
            raise ConfigError(_not_a_section(key, known[key][1], value))
    return [f"--{known[key][0]}={value}" for key, value in given]


def _known(cls: Any = Run, prefix: str = "", inner: str = "") -> Iterator[tuple[str, str, Any, type]]:
    """Yield each key that can be set as users write it and as the parser does, its type, and whose it is."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        key, path, hint = prefix + item.name.removesuffix("_"), inner + item.name, hints[item.name]
        yield key, path, hint, cls
        kind = _class_of(hint)
        for option in choices(kind).values() if kind in CHOICES else [kind]:
            if dataclasses.is_dataclass(option):
                yield from _known(option, f"{key}.", f"{path}.")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _class_of(hint: Any) -> Any:
    """Return the class in `hint`, looking through `| None`."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return options[0] if len(options) == 1 and typing.get_origin(hint) is not list else hint


def _default_class(cls: type, name: str) -> type:
    (item,) = (f for f in dataclasses.fields(cls) if f.name == name)
    return type(item.default if item.default_factory is dataclasses.MISSING else item.default_factory())


def choices(base: type[Any]) -> dict[str, type]:
    """Return the concrete subclasses of `base` (itself included) that are loaded, by name."""
    found: dict[str, type] = {} if inspect.isabstract(base) else {_class_name(base): base}
    for child in base.__subclasses__():
        found |= choices(child)
    return found


def _class_name(cls: type) -> str:
    """Return the bare name of our own classes, the dotted path of a user's."""
    return cls.__name__ if cls.__module__.startswith("fedddp.") else f"{cls.__module__}.{cls.__qualname__}"


def _find(base: type, name: Any, key: str) -> type:
    known = choices(base)
    if name in known:
        return known[name]
    if isinstance(name, str) and "." in name:
        module, _, leaf = name.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), leaf)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{key}: cannot import {name!r}: {error}") from None
        if isinstance(cls, type) and issubclass(cls, base):
            return cls
        raise ConfigError(f"{key}: {name!r} is not a subclass of {base.__module__}.{base.__name__}")
    raise ConfigError(
        f"{key}: unknown name {name!r}{_nearest(str(name), known)}; choose one of "
        f"{', '.join(sorted(known))}, or the dotted path of your own"
    )


def _construct(cls: type, parsed: Any, prefix: str) -> Any:
    """Build `cls` from parsed values, inside out, so that a refusal names its section."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for item in dataclasses.fields(cls):
        value = parsed[item.name]
        hint = _class_of(hints[item.name])
        key = f"{prefix}{item.name.removesuffix('_')}"
        if isinstance(value, jsonargparse.Namespace) and "class_path" in value:
            chosen = _find(hint, value.class_path, key)
            value = _construct(chosen, value.get("init_args") or {}, f"{key}.")
        elif isinstance(value, jsonargparse.Namespace):
            value = _construct(hint, value, f"{key}.")
        if value is None and type(None) not in typing.get_args(hints[item.name]):
            raise ConfigError(f"{key}: has no value; give one, or leave the key out")
        arguments[item.name] = value
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if not close:  # a change of case is no typing error
        close = [name for name in names if name.lower() == word.lower()]
    return f". Did you mean '{prefix}{close[0]}'?" if close else ""


def _unknown(key: str, cls: type | None = None) -> str:
    """Say of a key that nobody knows, or that `cls` does not have, which was probably meant."""
    owners: dict[str, list[str]] = {}
    for name, _, _, owner in _known():
        owners.setdefault(name, []).append(_class_name(owner))
    section, _, leaf = key.rpartition(".")
    if key in owners and cls is not None:
        whose = f"a setting of {', '.join(owners[key])}, not of {_class_name(cls)}"
        return f"unknown key '{key}': {leaf} is {whose}; choose another class, or leave it out"
    prefix = f"{section}." if section else ""
    beside = [name.removeprefix(prefix) for name in owners if name.rpartition(".")[0] == section]
    near = _nearest(leaf, beside, prefix)
    elsewhere = [name for name in owners if name.rpartition(".")[2] == leaf]
    if near or not (beside or elsewhere):
        return f"unknown key '{key}'{near or _nearest(key, owners)}"
    if elsewhere:
        return f"unknown key '{key}'. Did you mean '{elsewhere[0]}'?"
    return f"unknown key '{key}'; {section or 'at the top'} has {', '.join(beside)}"


def _not_a_section(key: str, cls: Any, value: object) -> str:
    names = [item.name.removesuffix("_") for item in dataclasses.fields(cls)]
    return f"{key} has settings of its own, got {value!r}; set one of them: {key}.{f', {key}.'.join(names)}"


def _one_line(error: Exception) -> str:
    """Turn the parser's message into one line that names the key, the value, the rule and the way out."""
    text = " ".join(str(error).split())
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', text)).replace("with_", "with")
    option = re.search(r"class_path '([\w.]+)': Option '(\w+)' is not accepted$", text)
    if option:
        module, _, name = option[1].rpartition(".")
        return _unknown(f"{key}.{option[2]}", getattr(importlib.import_module(module), name))
    hints = {name: hint for name, _, hint, _ in _known()}
    value = re.search(r"(?:Got|Given) value: (.*)$", text)
    return f"{key} must be {_words(hints[key])}, got {value[1]}" if value and key in hints else text


def _words(hint: Any) -> str:
    """Return what a value of the type `hint` is, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(", ".join(map(str, inner)).rsplit(", ", 1))
    if origin is list:
        return f"a list, as in {'[a, b]' if inner == (str,) else '[1, 2]'}"
    if origin is dict:
        return "a mapping, as in {key: value}"
    if inner:
        return " or ".join(map(_words, inner))
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "null")
