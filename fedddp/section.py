"""What a section of the configuration is: a frozen dataclass that is checked where it is made.

YAML, the command line and Python all end in a section's constructor, so each refuses the same values in the
same words: the key, the rule, the value and the fix.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import operator
import os
import pkgutil
import types
import typing
from abc import ABC, ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, dataclass_transform

from annotated_types import Ge, Gt, Interval, Le, Lt

LARGEST = 2**31 - 1
"""Largest count; products of two of them still fit into 64 bits."""

PositiveInt = Annotated[int, Ge(1), Le(LARGEST)]
NonNegativeInt = Annotated[int, Ge(0), Le(LARGEST)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]

EXECUTION = {"role": "execution"}
"""Metadata of a field that decides where and how a run is computed, and no number; a resume may change it."""

RENAMED = {
    "track": "tracking",
    "track.with": "tracking.trackers",
    "tracking.with": "tracking.trackers",
    "data.skew": "data.feature_shift",
    "clock.speed.visit_s": "clock.speed.overhead_s",
}
"""Keys of fedddp before 0.1.0 and what they are called now."""


COMPARISONS: dict[type, tuple[Callable[[Any, Any], Any], str]] = {
    Ge: (operator.ge, "ge"),
    Gt: (operator.gt, "gt"),
    Le: (operator.le, "le"),
    Lt: (operator.lt, "lt"),
}
SIGNS = {operator.ge: ">=", operator.gt: ">", operator.le: "<=", operator.lt: "<"}


class ConfigError(ValueError):
    """A configuration that cannot run: one line with the key, the value, the rule and the fix."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class SectionType(ABCMeta):
    """Makes every construction of a section go through the same checks."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        """Check names, types, choices and ranges, then construct; a refusal names the whole key."""
        complete(cls)
        if args:
            raise ConfigError(
                f"{cls.__name__} takes keywords only, got {args[0]!r}; write {cls.__name__}(...=...)"
            )
        hints = field_hints(cls)
        for name in given:
            if name not in hints:
                raise ConfigError(unknown_key(cls, name))
        values = {name: checked(value, hints[name], key_of(cls, name)) for name, value in given.items()}
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            if item.name not in values and not has_default(item):
                raise ConfigError(f"{key_of(cls, item.name)} has no default; give a value")
        try:
            return super().__call__(**values)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(key_of(cls, str(error))) from None


class Section(metaclass=SectionType):
    """Base of all sections and of the classes that are chosen by name.

    A subclass is a frozen dataclass whose fields are its settings; without the decorator it becomes one.
    Types, choices (`Literal`) and ranges (`Annotated[int, Ge(1)]`, with a string for the fix) are checked
    before construction. `__post_init__` is for rules over several fields; its ValueError starts with the
    name of a field.
    """

    key: ClassVar[str] = ""
    """Where the section stands in a configuration, such as "data.partition"; the same for a whole family."""
    chosen_by_name: ClassVar[bool] = False
    """Whether the section is one of several classes: `algorithm: {name: FedProx, mu: 0.1}`."""


def local_path(text: str, key: str) -> Path:
    """Return the path in the setting `key`; `~` is the home folder.

    Raises:
        ConfigError: the home folder is not known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}={text}: {str(error).rstrip('.')}; write the folder out") from None


def complete(cls: Any) -> None:
    """Make dataclasses of `cls` and of its bases where the decorator was left out."""
    for base in reversed(cls.__mro__):
        if (
            isinstance(base, SectionType)
            and base is not Section
            and "__dataclass_fields__" not in base.__dict__
        ):
            dataclasses.dataclass(frozen=True, kw_only=True)(typing.cast(type, base))


def has_default(item: dataclasses.Field[Any]) -> bool:
    """Return whether a field may be left out."""
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING


def default_of(item: dataclasses.Field[Any]) -> Any:
    """Return a field's default; None where it has none."""
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


@functools.cache
def field_hints(cls: Any) -> dict[str, Any]:
    """Return the type of every setting of `cls`, with its ranges, by name."""
    complete(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def key_of(cls: Any, name: str) -> str:
    """Return the whole key of the setting `name` of `cls`."""
    return f"{cls.key}.{name}" if cls.key else name


# ---- values ----


def checked(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the type `hint` has it: NumPy scalars as numbers, paths as text, integers as floats.

    Raises:
        ConfigError: it is of another type, no valid choice, or out of range.
    """
    value = _plain(value)
    for kind, constraints in options(hint):
        fits, converted = _fitted(value, kind, key)
        if fits:
            fix = "".join(f"; {text}" for text in constraints if isinstance(text, str))
            for rule in constraints:
                if not isinstance(rule, str) and not _holds(converted, rule):
                    raise ConfigError(f"{key} must be {_rule(rule)}, got {_shown(value)}{fix}")
            if isinstance(converted, float) and not math.isfinite(converted):
                raise ConfigError(f"{key} must be finite, got {_shown(value)}{fix}")
            return converted
    raise ConfigError(f"{key} must be {words(hint)}, got {_shown(value)}{_fix(value, hint)}")


def options(hint: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the types that `hint` allows, each with its constraints; None comes last."""
    if typing.get_origin(hint) is Annotated:
        kind, *constraints = typing.get_args(hint)
        return [(one, (*own, *constraints)) for one, own in options(kind)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        found = [option for one in typing.get_args(hint) for option in options(one)]
        return sorted(found, key=lambda option: option[0] is types.NoneType)
    return [(hint, ())]


def section_in(hint: Any) -> Any:
    """Return the section class in `hint`, looking through `| None`; None where there is none."""
    return next((kind for kind, _ in options(hint) if isinstance(kind, SectionType)), None)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # arrays and scalars of NumPy and torch
        return value.tolist()
    return value


def _fitted(value: Any, kind: Any, key: str) -> tuple[bool, Any]:
    """Return whether `value` is of the plain type `kind`, and the value as that type has it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is Any:
        return True, value
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner), value
    if kind is float:
        return number, float(value) if number else value
    if kind is int:
        return number and isinstance(value, int), value
    if origin is list:
        fits = isinstance(value, list | tuple)
        return fits, [checked(v, inner[0], f"{key}[{i}]") for i, v in enumerate(value)] if fits else value
    if origin is dict:
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else value
    if section_in(kind) is not None and not kind.chosen_by_name:
        return type(value) is kind, value  # a subclass could not be written to the run's record
    return isinstance(value, kind), value


def _holds(value: Any, rule: Any) -> bool:
    if isinstance(rule, Interval):
        return all(_holds(value, one) for one in rule)
    compare, name = COMPARISONS[type(rule)]
    return bool(compare(value, getattr(rule, name)))


def _rule(rule: Any) -> str:
    """Return a range in words."""
    if isinstance(rule, Interval):
        low, high = ("[", rule.ge) if rule.ge is not None else ("(", rule.gt)
        end, top = ("]", rule.le) if rule.le is not None else (")", rule.lt)
        return f"in {low}{high}, {top}{end}"
    compare, name = COMPARISONS[type(rule)]
    return f"{SIGNS[compare]} {getattr(rule, name)}"


def range_of(hint: Any) -> str:
    """Return the range of a setting in words, such as ">= 1"; empty where there is none."""
    rules = [rule for _, constraints in options(hint) for rule in constraints if not isinstance(rule, str)]
    rules = [rule for rule in rules if not (isinstance(rule, Le) and float(rule.le) >= LARGEST)]  # type: ignore[arg-type]
    return ", ".join(_rule(rule) for rule in rules)


def words(hint: Any) -> str:
    """Return what a value of the type `hint` is, in words."""
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Any: "a value"}
    parts: list[str] = []
    for kind, _ in options(hint):
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin is Literal:
            parts.append(" or ".join(", ".join(map(str, inner)).rsplit(", ", 1)))
        elif origin is list:
            parts.append(f"a list, as in {'[a, b]' if inner == (str,) else '[1, 2]'}")
        elif origin is dict:
            parts.append("a mapping, as in {key: value}")
        elif section_in(kind) is not None:
            known = f", one of {', '.join(sorted(choices(kind)))}" if kind.chosen_by_name else ""
            article = "an" if kind.__name__[0] in "AEIOU" else "a"
            parts.append(f"{article} {kind.__name__}{known}")
        else:
            parts.append(names.get(kind, "null"))
    return " or ".join(parts)


def _shown(value: Any) -> str:
    plain = isinstance(value, str) and not _numeric(value)
    text = value if plain else "null" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _fix(value: Any, hint: Any) -> str:
    kind = section_in(hint)
    if kind is None:
        return ""
    if isinstance(value, str) and value in choices(kind):
        return f"; in Python pass an object: {value}()"
    if isinstance(value, kind):
        return f"; a subclass is not recorded in config.yaml, pass a {kind.__name__} itself"
    return ""


# ---- names ----


def choices(base: Any) -> dict[str, Any]:
    """Return the concrete classes of the family `base` that are loaded, by name."""
    abstract = inspect.isabstract(base) or ABC in base.__bases__
    found = {} if abstract or not base.chosen_by_name else {class_name(base): base}
    for child in base.__subclasses__():
        found |= choices(child)
    return found


def class_name(cls: type) -> str:
    """Return the bare name of fedddp's own classes, the dotted path of a user's."""
    return cls.__name__ if cls.__module__.startswith("fedddp.") else f"{cls.__module__}.{cls.__qualname__}"


def find_choice(base: Any, name: Any, key: str) -> Any:
    """Return the class of the family `base` with that name or dotted path.

    Raises:
        ConfigError: there is none.
    """
    known = choices(base)
    if isinstance(name, str) and name in known:
        return known[name]
    if isinstance(name, str) and "." in name:
        module, _, leaf = name.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), leaf)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ConfigError(f"{key}: cannot import {name!r}: {error}") from None
        if isinstance(cls, type) and issubclass(cls, base):
            complete(cls)
            return cls
        raise ConfigError(f"{key}: {name!r} is not a subclass of {base.__module__}.{base.__name__}")
    raise ConfigError(
        f"{key}: unknown name {name!r}; choose one of {', '.join(sorted(known))}, or the dotted path of your "
        f"own{nearest(str(name), known)}"
    )


def find_function(path: str, name: str, known: Iterable[str], example: str) -> Callable[..., Any]:
    """Return the user's function at the dotted `path`, the value of the setting `name`.

    Args:
        path: such as "my_lab.cohorts.newest".
        name: the setting's name in its section.
        known: values that are no paths.
        example: the function's form, such as "f(round_index, rounds)"; its arguments are positional.

    Raises:
        ValueError: there is none, or it takes other arguments.
    """
    if "." not in path:
        raise ValueError(
            f"{name} must be {' or '.join(', '.join(known).rsplit(', ', 1))}, got {path}; or give the dotted "
            f"path of your own {example}{nearest(path, known)}"
        )
    try:
        function: Callable[..., Any] = pkgutil.resolve_name(path)
        inspect.signature(function).bind(*range(example.count(",") + 1))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{name}={path}: {error}; give the dotted path of a function {example}") from None
    return function


def settings(cls: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each setting below `cls`, all choices included: its key, its type, and its class."""
    for name, hint in field_hints(cls).items():
        yield key_of(cls, name), hint, cls
        kind = section_in(hint)
        if kind is not None:
            for option in choices(kind).values() if kind.chosen_by_name else [kind]:
                yield from settings(option)


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a suggestion for a misspelt `word`; empty where none is near."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5 if len(word) < 4 else 0.55)
    if not close:  # another case is no misspelling to difflib
        close = [name for name in names if name.lower() == word.lower()]
    return f". Did you mean '{prefix}{close[0]}'?" if close else ""


def unknown_key(cls: Any, name: str) -> str:
    """Return what to report of a setting that `cls` does not have, with its new name or the nearest one."""
    key, own = key_of(cls, name), list(field_hints(cls))
    if key in RENAMED:
        return f"{key} is now {RENAMED[key]}"
    family = next((base for base in cls.__mro__[::-1] if "key" in base.__dict__ and base is not Section), cls)
    owners = [title for title, option in choices(family).items() if name in field_hints(option)]
    if owners:
        return (
            f"unknown key '{key}': {name} is a setting of {', '.join(owners)}, not of {class_name(cls)}; "
            "choose another class, or leave it out"
        )
    near = nearest(name, own, f"{cls.key}." if cls.key else "")
    below = [known for known, _, _ in settings(cls) if known.rpartition(".")[2] == name]
    if not near and below:
        near = f". Did you mean '{below[0]}'?"
    if not near:
        near = f"; {cls.key or 'the top level'} has {', '.join(own)}"
    return f"unknown key '{key}'{near}"
