"""Recipes and YAML files as they are written, without torch: what is in them is checked by `loader`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from fedddp.recipes import FOLDER, recipes
from fedddp.section import ConfigError, nearest
from fedddp.storage.history import read_text

MOST_VALUES, MOST_LEVELS = 100_000, 50

BEGINNINGS = dict.fromkeys(("quickstart", "start", "demo", "example", "tutorial"), "digits")
OBJECTS = "objects"
"""Section of a run's config.yaml that describes the user's own module and datasets."""

NULL = ("null", "none", "~", "")


def is_null(value: Any) -> bool:
    """Return whether a scalar of YAML or of a flag means "not set"."""
    return value is None or (isinstance(value, Text) and not value.quoted and value.lower() in NULL)


class Text(str):
    """A scalar of YAML or of a flag as it was written; its meaning depends on the setting's type."""

    quoted = False


def read_sections(target: str) -> dict[str, Any]:
    """Return what the recipe or YAML file `target` holds, unchecked; scalars are `Text`.

    Raises:
        ConfigError: there is no such recipe or file, or it is no YAML with sections.
    """
    path = Path(target)
    if path.suffix not in (".yaml", ".yml"):
        if target not in recipes():
            raise ConfigError(
                f"unknown recipe {target!r}; `fedddp recipes` lists them, or give the path of a .yaml file"
                f"{_near_recipe(target)}"
            )
        path = FOLDER / f"{target}.yaml"
    try:
        content = read_yaml(read_text(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a recipe or a .yaml file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # encodings, deep nesting too
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if is_null(content):
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections such as `data:`, got {type(content).__name__.lower()}")
    return content


def _near_recipe(target: str) -> str:
    file = next((f"{target}{end}" for end in (".yaml", ".yml") if os.path.isfile(f"{target}{end}")), None)
    return nearest(file or BEGINNINGS.get(target, target), [file] if file else recipes())


class _Loader(yaml.SafeLoader):
    """Reads every scalar as `Text`."""

    def construct_scalar(self, node: Any) -> Text:
        """Return the text and whether it was quoted."""
        text = Text(super().construct_scalar(node))
        text.quoted = node.style is not None
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; a key that stands twice is an error."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key.value, str) and key.value != "<<" and key.value in lines:
                raise ValueError(f"{key.value} stands twice (lines {lines[key.value]} and {line}); join them")
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep=True)


_Loader.yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_scalar)


def read_yaml(text: str) -> Any:
    """Return the value of a YAML document whose scalars are `Text`.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is no YAML.
    """
    value = yaml.load(text, Loader=_Loader)
    _count(value, 0, 0)
    return value


def _count(value: Any, count: int, depth: int) -> int:
    """Return how many values `value` holds, on top of `count`; aliases make a short text a long one.

    Raises:
        ValueError: too many, or too deeply nested.
    """
    count += 1
    if count > MOST_VALUES or depth > MOST_LEVELS:
        raise ValueError(
            f"it holds more than {MOST_VALUES:,} values or {MOST_LEVELS} levels, aliases counted"
        )
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        count = _count(child, count, depth + 1)
    return count
