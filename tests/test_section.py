"""A section refuses a bad value in the same words from Python, from a YAML file and from a flag."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import annotated_types as at
import numpy as np
import pytest
import torch
import yaml
from torch import nn

from fedddp import Config, ConfigError, DataConfig, FeatureShift, Federation, TrackingConfig
from fedddp.algorithms import FedAvg, FedAvgM, FedBuff, FedProx, Polynomial
from fedddp.algorithms.local import LocalConfig
from fedddp.config.loader import load_config, to_yaml
from fedddp.config.reference import documented
from fedddp.section import Section, choices, class_name, field_hints, options, range_of, section_in, settings

# ---- the table: for every choice and range of every section a value just outside ----


class Case(NamedTuple):
    """A value that a field of a section must refuse."""

    cls: Any
    field: str
    key: str
    bad: Any
    """The value as Python has it; its text, in YAML and in a flag, is its `str`."""
    refusal: str
    """Words that the message starts with: the key, the rule and the value."""


def make(cls: Any, *values: Any, **given: Any) -> Any:
    """Construct `cls` of arguments that a type checker would refuse."""
    return cls(*values, **given)


def just_outside(rule: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    """Yield the values next to the ends of a range, and the range in words."""

    def next_to(bound: Any, direction: float) -> Any:
        return (
            int(bound) + int(math.copysign(1, direction)) if kind is int else math.nextafter(bound, direction)
        )

    match rule:
        case at.Ge(bound):
            yield next_to(bound, -math.inf), f">= {bound}"
        case at.Gt(bound):
            yield kind(bound), f"> {bound}"
        case at.Le(bound):
            yield next_to(bound, math.inf), f"<= {bound}"
        case at.Interval():
            low = next_to(rule.ge, -math.inf) if rule.gt is None else kind(rule.gt)
            high = next_to(rule.le, math.inf) if rule.lt is None else kind(rule.lt)
            left = f"[{rule.ge}" if rule.gt is None else f"({rule.gt}"
            right = f"{rule.le}]" if rule.lt is None else f"{rule.lt})"
            yield low, f"in {left}, {right}"
            yield high, f"in {left}, {right}"
        case _:
            raise AssertionError(f"the table does not know the rule {rule}")


def cases_of(cls: Any, key: str, hint: Any) -> Iterator[Case]:
    """Yield what the setting `key` of `cls` must refuse."""
    name = key.rpartition(".")[2]
    null = " or null" if type(None) in (kind for kind, _ in options(hint)) else ""
    types = " or ".join(words for kind, _ in options(hint) for _, words in of_another_type(kind))
    for kind, constraints in options(hint):
        for rule in constraints:
            if not isinstance(rule, str):
                for bad, words in just_outside(rule, kind):
                    yield Case(cls, name, key, bad, f"{key} must be {words}, got {bad}")
        for bad, _ in of_another_type(kind):
            yield Case(cls, name, key, bad, f"{key} must be {types}{null}, got {bad}")
        if kind is float:
            for number in (math.nan, math.inf, -math.inf):  # of which the range may speak first
                yield Case(cls, name, key, number, f"{key} must be ")
        if get_origin(kind) is list:
            for case in cases_of(cls, f"{key}[0]", get_args(kind)[0]):
                yield case._replace(field=name, bad=[case.bad])


def of_another_type(kind: Any) -> Iterator[tuple[Any, str]]:
    """Yield a value that is not of the type `kind`, and the type in words."""
    if get_origin(kind) is Literal:
        *first, last = get_args(kind)
        yield "typo", f"{', '.join(first)} or {last}" if first else last
    elif kind in (int, float, bool):
        words = {int: (1.5, "a whole number"), float: ("many", "a number"), bool: ("maybe", "true or false")}
        yield words[kind]


def table() -> Iterator[Case]:
    seen = set()
    for key, hint, cls in settings(Config):
        if class_name(cls) == cls.__name__ and (key, cls) not in seen:  # fedddp's own classes
            seen.add((key, cls))
            yield from cases_of(cls, key, hint)


TABLE = list(table())


def place(cls: Any, key: str, owner: Any = Config) -> dict[str, Any] | None:
    """Return the sections around the setting `key` of `cls`, with the classes that lead to it chosen."""
    if owner is cls and "." not in key:
        return {}
    name, _, rest = key.partition(".")
    kind = section_in(field_hints(owner)[name]) if name in field_hints(owner) else None
    if kind is None:
        return None
    for title, option in choices(kind).items() if kind.chosen_by_name else [("", kind)]:
        inner = place(cls, rest, option)
        if inner is not None:
            return {name: ({"name": title} if title else {}) | inner}
    return None


def flags_of(sections: dict[str, Any], prefix: str = "--") -> list[str]:
    """Return the flags that say the same as a YAML file with `sections`."""
    flags = []
    for name, value in sections.items():
        if isinstance(value, dict):
            flags += flags_of(value, f"{prefix}{name}.")
        else:
            chosen = name == "name" and prefix not in ("--", "--model.")
            text = f"[{', '.join(value)}]" if isinstance(value, list) else value
            flags += [prefix.removesuffix(".") if chosen else prefix + name, text]
    return flags


def message(refused: Callable[[], object]) -> str:
    """Return the message with which `refused` is refused."""
    with pytest.raises(ConfigError) as error:
        refused()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case.cls.__name__}.{case.field}={case.bad}")
def test_yaml_flags_and_python_refuse_a_bad_value_in_the_same_words(case: Case, tmp_path: Path) -> None:
    sections = place(case.cls, case.key.partition("[")[0])
    assert sections is not None, "the loader cannot reach the class"
    inmost = sections
    while any(isinstance(value, dict) for value in inmost.values()):
        inmost = next(value for value in inmost.values() if isinstance(value, dict))
    bad = case.bad[0] if isinstance(case.bad, list) else case.bad
    inmost[case.field] = [str(bad)] if isinstance(case.bad, list) else str(bad)
    file = tmp_path / "run.yaml"
    unquoted = yaml.safe_dump(sections, sort_keys=False).replace(f"'{bad}'", str(bad))
    file.write_text(unquoted)

    in_python = message(lambda: case.cls(**{case.field: case.bad}))
    assert in_python.startswith(case.refusal)
    assert f"got {bad}" in in_python
    assert message(lambda: load_config(str(file))) == in_python
    assert message(lambda: load_config(None, flags_of(sections))) == in_python


def test_the_table_has_every_choice_and_range() -> None:
    tested = {(case.cls, case.field, case.refusal) for case in TABLE}
    ours = [c for c in settings(Config) if class_name(c[2]) == c[2].__name__]
    for key, hint, cls in ours:
        for kind, constraints in options(hint):
            inner = options(get_args(kind)[0])[0][1] if get_origin(kind) is list else ()
            checked = get_origin(kind) is Literal or any(
                not isinstance(r, str) for r in (*constraints, *inner)
            )
            name = key.rpartition(".")[2]
            assert not checked or any(c is cls and f == name for c, f, _ in tested), (key, cls)
    assert len(TABLE) > 250
    assert (LocalConfig, "optimizer", "local.optimizer must be sgd, adam or adamw, got typo") in tested
    assert (LocalConfig, "precision", "local.precision must be fp32, bf16 or fp16, got typo") in tested
    assert (Config, "rounds", "rounds must be >= 1, got 0") in tested
    assert (FedProx, "mu", "algorithm.mu must be >= 0, got -5e-324") in tested
    assert (LocalConfig, "momentum", "local.momentum must be in [0, 1), got 1.0") in tested


def test_a_range_in_the_documentation_of_a_setting_is_checked() -> None:
    for key, hint, cls in settings(Config):
        if class_name(cls) != cls.__name__:
            continue
        text = documented(cls)[key.rpartition(".")[2]]
        ranges = re.findall(r">=? -?[\d.]*\d(?:e-?\d+)?|in [\[(][\d.]+, [\d.]+[\])]", text)
        kinds = [kind for kind, _ in options(hint)]
        inner = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), hint)
        assert not ranges or range_of(inner) in ranges, (cls, key, text)


# ---- names ----


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: make(LocalConfig, epoch=3), "unknown key 'local.epoch'. Did you mean 'local.epochs'?"),
        (lambda: make(Federation, round=5), "unknown key 'round'. Did you mean 'rounds'?"),
        (lambda: make(Federation, lr=0.1), "unknown key 'lr'. Did you mean 'local.lr'?"),
        (
            lambda: make(FedProx, momentun=0.5),
            "unknown key 'algorithm.momentun'. Did you mean 'algorithm.momentum'?",
        ),
        (
            lambda: make(FedAvg, temperature=0.1),
            "unknown key 'algorithm.temperature': temperature is a setting of MOON, not of FedAvg; "
            "choose another class, or leave it out",
        ),
        (
            lambda: make(TrackingConfig, zebra=1),
            "unknown key 'tracking.zebra'; tracking has trackers, project, group, tags, mode, report, "
            "pictures, progress, profile",
        ),
        (lambda: make(LocalConfig, 3), "LocalConfig takes keywords only, got 3; write LocalConfig(...=...)"),
        (lambda: make(Config, "digits"), "Config takes keywords only, got 'digits'; write Config(...=...)"),
    ],
)
def test_python_names_the_nearest_setting(made: Callable[[], object], words: str) -> None:
    assert message(made) == words


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"algorithm": "FedProx"},
            ("algorithm must be an Algorithm, one of", "got FedProx; in Python pass an object: FedProx()"),
        ),
        ({"model": nn.Linear(1, 1)}, ("model must be a ModelConfig, got Linear; pass a module as module=",)),
        ({"model": "lenet"}, ("model must be a ModelConfig, got lenet",)),
        ({"module": "lenet"}, ("module must be an nn.Module or a function that makes one, got str",)),
        ({"local": {"lr": 0.1}}, ("local must be a LocalConfig, got {'lr': 0.1}",)),
        ({"data": LocalConfig()}, ("data must be a DataConfig, got LocalConfig(",)),
        ({"aggregation": FedAvg()}, ("aggregation must be an Aggregation, one of Bulyan, ", "got FedAvg(")),
        ({"rounds": "5"}, ("rounds must be a whole number, got '5'",)),
        ({"rounds": None}, ("rounds must be a whole number, got null",)),
        ({"rounds": True}, ("rounds must be a whole number, got True",)),
        ({"test": [1]}, ("test is given without train",)),
        ({"track": TrackingConfig()}, ("track is now tracking",)),
    ],
)
def test_federation_refuses_objects_of_another_kind(given: dict[str, Any], words: tuple[str, ...]) -> None:
    text = message(lambda: make(Federation, **given))
    assert all(word in text for word in words), text


def test_rules_over_several_fields_name_the_whole_key() -> None:
    text = message(lambda: LocalConfig(optimizer="adam", momentum=0.9))
    assert text == "local.momentum=0.9 is for sgd, got optimizer=adam"


# ---- values that are accepted ----


def test_numbers_of_numpy_and_torch_and_paths_are_accepted() -> None:
    local = make(LocalConfig, lr=np.float64(0.1), epochs=np.int64(3), steps=torch.tensor(2))
    assert local == LocalConfig(lr=0.1, epochs=3, steps=2)
    assert [type(value) for value in (local.lr, local.epochs, local.steps)] == [float, int, int]
    assert make(LocalConfig, channels_last=np.bool_(True)).channels_last is True
    assert type(make(LocalConfig, lr=np.float32(0.5)).lr) is float
    assert type(LocalConfig(lr=1).lr) is float
    data = make(DataConfig, root=Path("a") / "b")
    assert (data.root, type(data.root)) == ("a/b", str)
    config = make(Config, output=Path("out"), seed=np.uint8(7), local=local)
    assert (config.output, config.seed) == ("out", 7)
    again = yaml.safe_load(to_yaml(config))
    assert (again["output"], again["seed"], again["local"]["lr"]) == ("out", 7, 0.1)
    assert make(TrackingConfig, trackers=("wandb",)).trackers == ["wandb"]


def test_a_vector_is_not_a_number() -> None:
    assert "local.lr must be a number" in message(lambda: make(LocalConfig, lr=np.ones(2)))


# ---- sections of one's own ----


class Undecorated(FedProx):
    """FedProx with one setting more, and without the decorator."""

    extra: Annotated[int, at.Ge(2), "2 is a good start"] = 5
    """A setting, >= 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decorated(FedProx):
    """FedProx with one setting more."""

    extra: Annotated[int, at.Ge(2), "2 is a good start"] = 5
    """A setting, >= 2."""


class Grandchild(Undecorated):
    """A subclass of a subclass, with a rule over two fields."""

    more: float

    def __post_init__(self) -> None:
        if self.more > self.extra:
            raise ValueError(f"more={self.more} is more than extra={self.extra}; lower it")


@pytest.mark.parametrize("cls", [Undecorated, Decorated])
def test_a_subclass_with_and_without_the_decorator_is_checked_alike(cls: type[Any]) -> None:
    assert [item.name for item in dataclasses.fields(cls(mu=0.3))] == ["lr", "momentum", "mu", "extra"]
    assert (cls(mu=0.3).mu, cls().extra, cls(extra=7).extra) == (0.3, 5, 7)
    assert cls(extra=3) == cls(extra=3) != cls(extra=4)
    assert f"{cls.__name__}(" in repr(cls())
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().extra = 3
    assert message(lambda: cls(extra=1)) == "algorithm.extra must be >= 2, got 1; 2 is a good start"
    assert "Did you mean 'algorithm.extra'?" in message(lambda: cls(extras=1))
    config = load_config(None, ["--algorithm", f"{__name__}.{cls.__name__}", "--algorithm.extra", "9"])
    assert config.algorithm == cls(extra=9)
    refused = ["--algorithm", f"{__name__}.{cls.__name__}", "--algorithm.extra", "1"]
    assert message(lambda: load_config(None, refused)) == message(lambda: cls(extra=1))


def test_a_setting_without_a_default_must_be_given() -> None:
    assert message(lambda: make(Grandchild)) == "algorithm.more has no default; give a value"
    path = f"{__name__}.Grandchild"
    assert message(lambda: load_config(None, ["--algorithm", path])) == message(lambda: make(Grandchild))
    assert Grandchild(more=1).more == 1.0
    assert message(lambda: Grandchild(more=6.0)) == "algorithm.more=6.0 is more than extra=5; lower it"


def test_a_subclass_of_a_section_that_is_not_chosen_by_name_is_refused() -> None:
    """config.yaml could not say which class it was."""

    class OwnLocal(LocalConfig):
        """Local training with one setting more."""

        extra: int = 1
        """A setting."""

    assert OwnLocal(extra=2).extra == 2
    text = message(lambda: Config(local=OwnLocal()))
    assert "local must be a LocalConfig" in text
    assert "pass a LocalConfig itself" in text


def test_what_cannot_be_chosen_is_no_choice() -> None:
    for _, hint, _ in settings(Config):
        kind = section_in(hint)
        if kind is not None and kind.chosen_by_name:
            for name, cls in choices(kind).items():
                assert cls is not kind, f"{name} is the base class"
                assert not inspect.isabstract(cls), name
                assert issubclass(cls, Section)


def test_replacing_a_field_is_checked_too() -> None:
    assert message(lambda: dataclasses.replace(LocalConfig(), lr=-1.0)) == "local.lr must be > 0, got -1.0"
    changed = dataclasses.replace(FedBuff(), staleness=Polynomial(exponent=1.0))
    assert isinstance(changed.staleness, Polynomial)
    assert changed.staleness.exponent == 1.0
    shifted = dataclasses.replace(DataConfig(), feature_shift=FeatureShift(rotation=10))
    assert shifted.feature_shift is not None
    assert shifted.feature_shift.rotation == 10.0
    assert dataclasses.replace(FedAvgM(), lr=0.5).momentum == FedAvgM().momentum
