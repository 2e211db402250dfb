"""From a recipe, a YAML file and flags to a `Config`, and back to YAML."""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml

from fedddp.config.files import OBJECTS, Text, is_null, read_sections, read_yaml
from fedddp.config.schema import Config, fields_with
from fedddp.section import (
    RENAMED,
    ConfigError,
    Section,
    class_name,
    default_of,
    field_hints,
    find_choice,
    key_of,
    nearest,
    options,
    section_in,
    settings,
    unknown_key,
)

TRUTH = {"true": True, "false": False}


def load_config(target: str | None = None, flags: Sequence[str] = ()) -> Config:
    """Return the configuration of a recipe or a YAML file, with command-line `flags` on top.

    Args:
        target: name of a recipe, path of a .yaml file, or None for the defaults.
        flags: such as `["--algorithm", "FedProx", "--algorithm.mu", "0.1"]`.

    Raises:
        ConfigError: anything wrong, in one line.
    """
    sections = read_sections(target) if target else {}
    if "compare" in sections:
        raise ConfigError(
            f"{target} describes several runs; train and compare them with `fedddp compare {target}`"
        )
    if OBJECTS in sections:
        raise ConfigError(
            f"{target} is of a run with objects that only its program has ({', '.join(sections[OBJECTS])}); "
            "repeat it from Python with the same module=, train= and test="
        )
    return build(sections, flags)


def build(sections: Mapping[str, Any], flags: Sequence[str] = ()) -> Config:
    """Return the configuration of `sections`, what a YAML file holds; otherwise as `load_config`."""
    merged = dict(sections)
    # Choices first, whatever the order of the flags: `--algorithm.mu 1 --algorithm FedProx`.
    for key, value in sorted(_parsed(flags), key=lambda flag: flag[0].count(".")):
        merged = _with(merged, Config, key.split("."), value)
    return typing.cast(Config, _section(Config, merged))


# ---- recipes and files ----


# ---- flags ----


def _parsed(flags: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of every flag."""
    words = iter(flags)
    for word in words:
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"unexpected argument {word!r}; settings are given as --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{key} has no value; give one, as in --{key} VALUE")
        yield key, Text(value)


def _with(sections: Mapping[str, Any], cls: Any, path: list[str], value: Text) -> dict[str, Any]:
    """Return `sections` of `cls` with the flag at `path` set to `value`."""
    name, *rest = path
    hints = field_hints(cls)
    if name not in hints:
        raise ConfigError(_unknown(cls, path))
    kind, before = section_in(hints[name]), sections.get(name)
    if kind is None:
        if rest:
            raise ConfigError(_unknown(cls, path))
        return {**sections, name: value}
    if not rest:
        parsed = _from_flag(value)
        if isinstance(parsed, Mapping):
            return {**sections, name: parsed}
        optional = any(option is type(None) for option, _ in options(hints[name]))
        if kind.chosen_by_name and not (optional and is_null(value)):
            # Another choice begins with its own defaults.
            find_choice(kind, str(value), key_of(cls, name))
            return {**sections, name: {"name": value}}
        if is_null(value):
            return {**sections, name: value}
        raise ConfigError(_not_a_section(kind, key_of(cls, name), value))
    section = _mapping(kind, before, key_of(cls, name))
    return {**sections, name: _with(section, _chosen(kind, section, cls, name), rest, value)}


def _unknown(cls: Any, path: list[str]) -> str:
    """Return what to report of an unknown flag at `path` below `cls`."""
    dotted = ".".join(path)
    full = key_of(cls, dotted)
    for length in range(len(path), 0, -1):
        if key_of(cls, ".".join(path[:length])) in RENAMED:
            return unknown_key(cls, ".".join(path[:length]))
    if len(path) == 1:
        return unknown_key(cls, dotted)
    near = nearest(full, [key for key, _, _ in settings(Config)])
    return f"unknown key '{full}'{near}" if near else unknown_key(cls, path[0])


# ---- sections to objects ----


def _section(cls: Any, given: Mapping[str, Any]) -> Any:
    """Construct `cls` from what a file and flags hold of it."""
    hints = field_hints(cls)
    values: dict[str, Any] = {}
    for name, value in given.items():
        key = key_of(cls, str(name))
        if name not in hints:
            raise ConfigError(unknown_key(cls, str(name)))
        kind = section_in(hints[name])
        if kind is None:
            values[name] = typed(value, hints[name])
            continue
        optional = any(option is type(None) for option, _ in options(hints[name]))
        if is_null(value):
            if optional:
                values[name] = None
            elif value:  # else a section whose lines are all comments: its defaults
                raise ConfigError(_not_a_section(kind, key, value))
            continue
        section = _mapping(kind, value, key)
        chosen = _chosen(kind, section, cls, name)
        own = {key: item for key, item in section.items() if key != "name" or not kind.chosen_by_name}
        try:
            values[name] = _section(chosen, own)
        except ConfigError as error:  # a family that stands in two places knows the first only
            raise ConfigError(str(error).replace(f"{kind.key}.", f"{key}.")) from None
    return cls(**values)


def _mapping(kind: Any, value: Any, key: str) -> dict[str, Any]:
    """Return the settings in `value`, of a section: a mapping, or the name of a choice."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    if kind.chosen_by_name:
        return {"name": value}
    raise ConfigError(_not_a_section(kind, key, value))


def _chosen(kind: Any, section: Mapping[str, Any], owner: Any, name: str) -> Any:
    """Return the class that `section` chooses: by its name, or the default of the field `name` of `owner`."""
    if not kind.chosen_by_name:
        return kind
    if "name" in section:
        return find_choice(kind, section["name"], key_of(owner, name))
    default = next(default_of(item) for item in dataclasses.fields(owner) if item.name == name)
    return find_choice(kind, "none", key_of(owner, name)) if default is None else type(default)


def _not_a_section(kind: Any, key: str, value: object) -> str:
    names = f", {key}.".join(field_hints(kind))
    return f"{key} has settings of its own, got {value}; set one of them: {key}.{names}"


def typed(value: Any, hint: Any) -> Any:
    """Return YAML's `value` as the type `hint` reads it; where it does not fit, the section refuses it."""
    kinds = [kind for kind, _ in options(hint)]
    if is_null(value) and type(None) in kinds:
        return None
    for kind in kinds:
        fits, typed = _read(value, kind)
        if fits:
            return typed
    return _untyped(value) if value else None


def _read(value: Any, kind: Any) -> tuple[bool, Any]:
    """Return whether `value` can be read as the plain type `kind`, and the value as that type has it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True, _untyped(value)
    if origin in (list, dict):
        return _read_container(_from_flag(value) if isinstance(value, Text) else value, origin, inner)
    if not isinstance(value, Text):
        return False, value
    if kind is str:
        return True, str(value)
    if kind is bool:
        return value.lower() in TRUTH, TRUTH.get(value.lower())
    if origin is Literal:
        found = [one for one in inner if str(one) == value]
        return bool(found), found[0] if found else value
    try:
        return True, kind(value)  # int or float
    except (TypeError, ValueError):
        return False, value


def _read_container(value: Any, origin: Any, inner: tuple[Any, ...]) -> tuple[bool, Any]:
    if origin is list and isinstance(value, list):
        return True, [typed(item, inner[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        return True, {str(key): typed(item, inner[1]) for key, item in value.items()}
    return False, value


def _from_flag(value: Text) -> Any:
    """Return the list or mapping that a flag's text holds."""
    try:
        return read_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return value


def _untyped(value: Any) -> Any:
    """Return a value of any type: numbers, truth and null as they are written, everything else as text."""
    if isinstance(value, list):
        return [_untyped(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _untyped(item) for key, item in value.items()}
    if not isinstance(value, Text) or value.quoted:
        return value if not isinstance(value, Text) else str(value)
    if is_null(value):
        return None
    for kind in (bool, int, float):
        fits, typed = _read(value, kind)
        if fits:
            return typed
    return str(value)


# ---- and back ----


def to_dict(value: Any) -> Any:
    """Return a configuration as plain data, in the form that a YAML file has."""
    if isinstance(value, Section):
        named: dict[str, Any] = {"name": class_name(type(value))} if value.chosen_by_name else {}
        return named | {item.name: to_dict(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def to_yaml(config: Config) -> str:
    """Return the YAML of `config`; `load_config` makes the same configuration of it."""
    return dump_yaml(to_dict(config))


def digest(config: Config) -> str:
    """Return a digest of the settings that decide what a run computes."""
    names = fields_with("experiment", "common", "seed", "replay", "budget")
    decisive = {name: value for name, value in to_dict(config).items() if name in names}
    return hashlib.blake2b(dump_yaml(decisive).encode(), digest_size=8).hexdigest()


def dump_yaml(value: Any) -> str:
    """Return plain data as YAML, which `read_yaml` and every other reader understand alike."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that mean null."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return the node of a text."""
        same = isinstance(_untyped(Text(text)), str)  # else it is null, true, or a number to the reader
        style = None if same else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
