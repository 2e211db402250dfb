"""From YAML and the command line to a run's configuration, and back.

YAML, command line and Python end in the same constructors, so they fail with the same words.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from fedddp.aggregation import Mean
from fedddp.algorithms.asynchronous import Staleness
from fedddp.attacks import Attack
from fedddp.clock import Clock, Speed
from fedddp.config import ConfigError, Run
from fedddp.data.partition import Partition
from fedddp.method import Method
from fedddp.vision.tasks import Task

RECIPES = Path(__file__).parent / "recipes"

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
    parser = make_parser()
    flags = [re.sub(r"^--track\.with(?==|$)", "--track.with_", flag) for flag in arguments]
    try:
        parsed = parser.parse_args(["--config", yaml.safe_dump(given), *flags])
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_one_line(error, flags)) from None
    return typing.cast(Run, _construct(Run, parsed, ""))


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of a run's flags."""
    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=True, subclasses_enabled=list(CHOICES)
    )
    parser = jsonargparse.ArgumentParser(
        prog="fedddp run RECIPE|FILE", exit_on_error=False, allow_abbrev=False, add_help=False
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"unknown key '{prefix}{key}'{_nearest(str(key), known)}")
        hint = _class_of(hints[known[key]])
        if hint in CHOICES and isinstance(value, dict):
            rest = dict(value)
            name = rest.pop("name", None)
            chosen = _find(hint, name, f"{prefix}{key}") if name else _default_class(cls, known[key])
            path = f"{chosen.__module__}.{chosen.__qualname__}"
            inner[key] = {
                "class_path": path,
                "init_args": _outer_to_inner(rest, chosen, f"{prefix}{key}."),
            }
        elif hint in CHOICES and isinstance(value, str):
            chosen = _find(hint, value, f"{prefix}{key}")
            inner[key] = {"class_path": f"{chosen.__module__}.{chosen.__qualname__}"}
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
            inner[known[key]] = _outer_to_inner(value, hint, f"{prefix}{key}.")
        else:
            inner[known[key]] = value
    return inner


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
        arguments[item.name] = value
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    if not close:  # a change of case is no typing error
        close = [name for name in known if name.lower() == word.lower()]
    return f". Did you mean '{close[0]}'?" if close else ""


def _one_line(error: Exception, flags: Sequence[str]) -> str:
    """Turn a parser's message into one line that names the key, the value and the way out."""
    text = " ".join(str(error).split()).replace("with_", "with")
    unknown = re.search(r"(?:nrecognized arguments: --|does not accept option ')([\w.]+)", text)
    option = re.search(r"Option '([\w.]+)' is not accepted", text)
    if unknown or option:
        flag = next((f[2:].split("=")[0] for f in flags if _is_unknown(f, unknown or option)), "")
        name = flag or (unknown or option).group(1)  # type: ignore[union-attr]
        return f"unknown key '{name}'{_nearest(name, _flag_names(flags))}"
    key = re.search(r'Parser key "([\w.]+)": ?(.*)', text)
    if key:
        return f"{key.group(1).replace('.init_args', '')}: {key.group(2)}"
    return text


def _is_unknown(flag: str, match: re.Match[str] | None) -> bool:
    name = flag.removeprefix("--").split("=")[0]
    return (
        match is not None
        and flag.startswith("--")
        and (name == match.group(1) or name.endswith(f".{match.group(1)}"))
    )


def _flag_names(flags: Sequence[str]) -> list[str]:
    """Return every key that could have been meant, the chosen classes' fields included."""
    names: list[str] = []

    def walk(cls: type, prefix: str) -> None:
        for item in dataclasses.fields(cls):
            name = f"{prefix}{item.name.removesuffix('_')}"
            names.append(name)
            hint = _class_of(typing.get_type_hints(cls)[item.name])
            for option in choices(hint).values() if hint in CHOICES else [hint]:
                if dataclasses.is_dataclass(option):
                    walk(typing.cast(type, option), f"{name}.")

    walk(Run, "")
    return list(dict.fromkeys(names))
