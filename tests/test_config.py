"""From recipes, YAML files and flags to a configuration, and back to YAML."""

from __future__ import annotations

import itertools
import math
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml

from fedddp import (
    Config,
    ConfigError,
    DataConfig,
    FeatureShift,
    Federation,
    LocalConfig,
    ModelConfig,
    TopologyConfig,
    TrackingConfig,
    load_config,
)
from fedddp.algorithms import FedAsync, FedAvg, FedAvgM, FedBuff, FedProx, Hinge, Polynomial, ServerOptimizer
from fedddp.config.loader import digest, to_dict, to_yaml
from fedddp.data.partition import Dirichlet, Shards
from fedddp.recipes import recipes
from fedddp.section import options, settings
from fedddp.simulation.attacks import LabelFlip
from fedddp.simulation.clock import SpeedTable, Virtual

OF_ONE_RUN = [name for name in recipes() if not name.startswith("compare-")]


def read(text: str, *flags: str) -> Config:
    """Return the configuration of a YAML file with `text`."""
    file = Path("run.yaml")
    file.write_text(text, encoding="utf-8")
    return load_config(str(file), flags)


def refusal(text: str, *flags: str) -> str:
    """Return the line with which a YAML file or its flags are refused."""
    with pytest.raises(ConfigError) as error:
        read(text, *flags)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- there and back ----


@pytest.mark.parametrize("recipe", OF_ONE_RUN)
def test_recipes_make_the_same_configuration_again_from_their_yaml(recipe: str) -> None:
    config = load_config(recipe)
    assert read(to_yaml(config)) == config
    assert digest(read(to_yaml(config))) == digest(config)
    assert len(recipes()[recipe]) > 10, "the first line describes it"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "none", "data": DataConfig(root="~", dataset="digits")},
        {"name": "010", "output": "", "replay": None},
        {"name": "1e-3", "output": "true", "tracking": TrackingConfig(tags=["none", "null", "1", "", "a b"])},
        {"output": "a: b # c", "tracking": TrackingConfig(project="'quoted'", group="Null", trackers=[])},
        {"output": "zwei\nZeilen", "tracking": TrackingConfig(project="ünï")},
        {"data": DataConfig(feature_shift=FeatureShift(noise=1e-12), partition=Dirichlet(alpha=1e-5))},
        {"algorithm": FedAsync(alpha=0.5, staleness=Hinge(a=1e-9, b=0)), "rounds": 2**31 - 1},
        {
            "algorithm": ServerOptimizer(
                optimizer="Adam", options={"eps": 1e-9, "betas": [0.9, 0.99], "amsgrad": True}
            )
        },
        {"clock": Virtual(speed=SpeedTable(factors=[1.0, 2.5]), deadline_s=None), "attacks": LabelFlip()},
        {"model": ModelConfig(freeze=["none", "layer1"])},
    ],
    ids=str,
)
def test_any_configuration_comes_back_from_its_yaml(changes: dict[str, Any]) -> None:
    config = Config(**changes)
    assert read(to_yaml(config)) == config
    # Any other reader sees the same values: numbers are numbers and texts are texts.
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)


def test_the_digest_covers_what_decides_the_result() -> None:
    base = digest(Config())
    same = Config(output="elsewhere", name="a", tracking=TrackingConfig(trackers=[]), resume="auto")
    assert digest(same) == base
    others = [
        Config(seed=1),
        Config(rounds=11),
        Config(local=LocalConfig(lr=0.051)),
        Config(algorithm=FedAvg(momentum=0.1)),
        Config(data=DataConfig(clients=21)),
    ]
    assert len({base, *map(digest, others)}) == len(others) + 1


# ---- files ----


def test_flags_win_over_the_file_and_the_file_over_defaults() -> None:
    file = yaml.safe_dump({"rounds": 7, "algorithm": {"name": "FedProx", "mu": 0.5}, "seed": 3})
    config = read(file, "--rounds", "9", "--algorithm.mu", "0.25")
    assert (config.rounds, config.seed, config.local) == (9, 3, LocalConfig())
    assert config.algorithm == FedProx(mu=0.25)
    switched = read(file, "--algorithm", "FedAvgM", "--algorithm.momentum", "0.3")
    assert switched.algorithm == FedAvgM(momentum=0.3)
    steps = load_config("digits", ["--local.steps", "4", "--tracking.trackers", "[tensorboard]"])
    assert (steps.local.steps, steps.tracking.trackers) == (4, ["tensorboard"])
    assert steps.local.lr == load_config("digits").local.lr


@pytest.mark.parametrize("text", ["", "# nothing\n", "null", "---\n", "local:\n  # lr: 0.1\n", "data: {}"])
def test_an_empty_file_and_an_empty_section_have_the_defaults(text: str) -> None:
    assert read(text) == load_config() == Config()


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("seed: 1\nrounds: 2\nseed: 2\n", "seed", "lines 1 and 3"),
        ("local:\n  lr: 1\n  lr: 2\n", "lr", "lines 2 and 3"),
        ("local: {lr: 1}\nlocal: {epochs: 2}\n", "local", "lines 1 and 2"),
        ("algorithm: {name: FedAvg, name: FedProx}", "name", "lines 1 and 1"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, key: str, lines: str) -> None:
    line = refusal(text)
    assert f"{key} stands twice ({lines})" in line
    assert line.startswith("run.yaml ")


def test_a_section_may_take_over_the_settings_of_another() -> None:
    """Of merged settings the section's own counts, then the first of several."""
    config = read("local: {<<: [{lr: 0.3, epochs: 3}, {lr: 0.4, momentum: 0.5}], lr: 0.2}\n")
    assert config.local == LocalConfig(lr=0.2, epochs=3, momentum=0.5)
    shared = "data: &shared {clients: 7}\nclock: {speed: {<<: *shared}}"
    assert "unknown key 'clock.speed.clients'" in refusal(shared)
    assert "expected a mapping" in refusal("local: {<<: 3}")


def levels(depth: int, opening: str, closing: str) -> str:
    return "tracking: {tags: " + opening * depth + "x" + closing * depth + "}"


LONG = {
    "aliases of lists": "\n".join(
        f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9) if n else 'x'}]" for n in range(12)
    ),
    "aliases of mappings": "\n".join(
        f"m{n}: &m{n} {{{', '.join(f'k{k}: *m{n - 1}' for k in range(9)) if n else 'x: 1'}}}"
        for n in range(12)
    ),
    "merged mappings": "m0: &m0 {x: 1}\n"
    + "\n".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 4)),
    "nested lists": levels(400, "[", "]"),
    "nested mappings": levels(400, "{a: ", "}"),
    "nested a little": levels(51, "[", "]"),
    "never closed": "[" * 400,
}
"""Files of at most a few thousand bytes that describe more than any configuration."""


@pytest.mark.parametrize("kind", LONG)
def test_a_file_that_describes_too_much_is_refused_at_once(kind: str) -> None:
    line = refusal(LONG[kind])
    assert line.startswith(("run.yaml is not valid YAML: ", "unknown key 'm0'")), line
    assert len(line) < 300
    if kind.startswith(("aliases", "nested a little")):
        assert line.endswith("it holds more than 100,000 values or 50 levels, aliases counted")


@pytest.mark.parametrize("kind", LONG)
def test_a_flag_that_describes_too_much_is_refused_at_once(kind: str) -> None:
    assert len(refusal("", "--tracking.tags", "{" + LONG[kind].replace("\n", ", ") + "}")) < 300


def test_aliases_within_the_budget_are_read() -> None:
    tags = ", ".join(["*tag"] * 1000)
    assert read(f"name: &tag x\ntracking: {{tags: [{tags}]}}").tracking.tags == ["x"] * 1000


def settings_of(kind: type) -> list[Any]:
    """Return every setting that is a number of that type, or a list of them: its key, and its class."""
    found = []
    for key, hint, cls in settings(Config):
        kinds = [inner for one, _ in options(hint) for inner in (one, *get_args(one))]
        if kind in kinds and cls.__module__.startswith("fedddp."):
            found.append(
                pytest.param(
                    key, cls, any(get_origin(one) is list for one in kinds), id=f"{cls.__name__} {key}"
                )
            )
    return found


def test_numbers_are_found_in_all_sections() -> None:
    assert len(settings_of(int)) > 30
    assert len(settings_of(float)) > 60


@pytest.mark.parametrize(("key", "cls", "in_list"), settings_of(int))
def test_no_whole_number_is_larger_than_the_arithmetic_of_a_run(key: str, cls: Any, in_list: bool) -> None:
    name = key.rpartition(".")[2]
    for number in (2**63, 10**30, -(10**30)):
        with pytest.raises(ConfigError) as error:
            cls(**{name: [number] if in_list else number})
        assert str(error.value).startswith(f"{key} must be "), error.value
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "cls", "in_list"), settings_of(float))
def test_no_number_is_infinite_or_undefined(key: str, cls: Any, in_list: bool) -> None:
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(ConfigError) as error:
            cls(**{key.rpartition(".")[2]: [number] if in_list else number})
        assert str(error.value).startswith(key)
        assert "must be" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("rounds", "2147483648", "rounds must be <= 2147483647, got 2147483648"),
        ("local.batch_size", "1" + "0" * 99, "local.batch_size must be <= 2147483647, got 1000"),
        ("local.steps", "3000000000", "local.steps must be <= 2147483647, got 3000000000"),
        ("data.image_size", "99999999", "data.image_size must be in [1, 16384], got 99999999"),
        ("topology.timeout_s", "1e300", "topology.timeout_s must be "),
        ("topology.timeout_s", "0", "topology.timeout_s must be "),
        ("seed", "9223372036854775808", "seed must be <= 9223372036854775807"),
        ("rounds", "9" * 5000, "rounds must be a whole number, got "),
    ],
)
def test_huge_numbers_are_refused_in_one_line_that_is_not_long(flag: str, value: str, words: str) -> None:
    line = refusal("", f"--{flag}", value)
    assert line.startswith(words)
    assert len(line) < 300


def test_the_longest_time_to_wait_is_one_that_torch_can_wait() -> None:
    year = TopologyConfig(timeout_s=365 * 24 * 3600)
    assert timedelta(seconds=year.timeout_s) // timedelta(days=1) == 365
    assert "topology.timeout_s must be" in refusal("", "--topology.timeout_s", str(365 * 24 * 3600 + 1))


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "../a", "a b", "a\n", "~", "a\\b", "a:b", "ü/"])
def test_a_name_is_one_folder_in_output(name: str) -> None:
    with pytest.raises(ConfigError, match="^name must be letters, digits and"):
        Config(name=name)
    if name != "~":  # "not set", where it is no text of Python
        assert refusal("", f"--name={name}").startswith("name must be letters, digits and")


@pytest.mark.parametrize("name", ["a..b", "..a", ".a", "a.", "-", "--x", "=", "é", "a=b+c", "-1"])
def test_a_name_may_look_odd(name: str) -> None:
    assert load_config(None, [f"--name={name}"]).name == name


def test_a_scalar_means_what_the_type_of_its_setting_makes_of_it() -> None:
    config = read("rounds: 010\nname: 010\nlocal: {lr: 1e-3, weight_decay: 1, channels_last: True}\n")
    assert (config.rounds, config.name) == (10, "010")
    assert (config.local.lr, config.local.weight_decay) == (0.001, 1.0)
    assert config.local.channels_last is True
    assert load_config(None, ["--rounds", "010", "--local.lr", "1e-3", "--name", "010"]) == Config(
        rounds=10, local=LocalConfig(lr=0.001), name="010"
    )
    assert read("tracking: {tags: [1, 2.50, yes, null]}").tracking.tags == ["1", "2.50", "yes", "null"]
    assert read("data: {augment: none}").data.augment == "none"
    assert read("data: {root: none, dataset: digits}").data.root == "none", "not optional, so a text"
    options = read("algorithm: {name: ServerOptimizer, options: {eps: 1e-3, amsgrad: true}}")
    assert options.algorithm == ServerOptimizer(options={"eps": 0.001, "amsgrad": True})


@pytest.mark.parametrize("null", ["none", "null", "None", "NULL", "~", ""])
def test_none_and_null_mean_that_an_optional_setting_is_not_set(null: str) -> None:
    text = f"local: {{steps: 3, clip_norm: {null}}}\nname: {null}\ndata: {{feature_shift: {null}}}\n"
    config = read(text)
    assert (config.local.clip_norm, config.name, config.data.feature_shift) == (None, None, None)
    flags = ["--local.clip_norm", null, "--name", null, "--data.feature_shift", null]
    set_before = "local: {steps: 3, clip_norm: 1}\nname: a\ndata: {feature_shift: {noise: 0.1}}\n"
    assert read(set_before, *flags) == config


def test_a_quoted_none_is_a_text() -> None:
    config = read("name: 'none'\nreplay: \"null\"\nalgorithm: FedAsync\n")
    assert (config.name, config.replay) == ("none", "null")
    assert read(to_yaml(config)) == config
    assert "local.steps must be a whole number or null, got none" in refusal("local: {steps: 'none'}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds: 5.0", "rounds must be a whole number, got "),
        ("rounds: 1e3", "rounds must be a whole number, got "),
        ("rounds: 0x10", "rounds must be a whole number, got 0x10"),
        ("rounds: 2024-01-01", "rounds must be a whole number, got 2024-01-01"),
        ("rounds: [1]", "rounds must be a whole number, got [1]"),
        ("rounds: null", "rounds must be a whole number, got null"),
        ("data: {download: yes}", "data.download must be true or false, got yes"),
        ("local: [1]", "local has settings of its own, got ['1']; set one of them: local.epochs"),
        ("algorithm: [FedProx]", "algorithm: unknown name"),
        ("algorithm: {name: [FedProx]}", "algorithm: unknown name"),
        ("algorithm: {name: FedProx, my: 0.1}", "Did you mean 'algorithm.mu'?"),
        (
            "data: {partition: {alpha: 3}}",
            "alpha is a setting of Dirichlet, ClientDirichlet, ",
        ),
        ("1: 2", "unknown key '1'; the top level has data, model"),
        ("? [a]\n: 1", "not valid YAML"),
        ("rounds: 1\n---\nrounds: 2", "not valid YAML"),
        ("rounds: !!python/object:os.system x", "not valid YAML"),
        ("a: &a\n  b: *a", "run.yaml"),
    ],
)
def test_what_no_setting_can_read_is_refused(text: str, words: str) -> None:
    assert words in refusal(text)


# ---- flags ----


def test_another_class_starts_from_its_own_defaults() -> None:
    """Before the redesign the recipe's `momentum: 0.7` silently stayed."""
    assert load_config("digits").algorithm == FedAvg(momentum=0.7)
    assert load_config("digits", ["--algorithm", "FedAvgM"]).algorithm == FedAvgM()
    assert load_config("digits", ["--algorithm", "FedAvg"]).algorithm == FedAvg()
    assert load_config("digits", ["--data.partition", "Shards"]).data.partition == Shards()
    config = load_config("digits", ["--algorithm.momentum", "0.2"])
    assert config.algorithm == FedAvg(momentum=0.2), "the recipe's class stays"
    nested = read("algorithm: {name: FedBuff, staleness: {name: Polynomial, exponent: 2}, buffer_size: 3}")
    assert nested.algorithm == FedBuff(staleness=Polynomial(exponent=2), buffer_size=3)
    flags = ("--algorithm.staleness", "Hinge")
    file = "algorithm: {name: FedBuff, staleness: {name: Polynomial, exponent: 2}, buffer_size: 3}"
    assert read(file, *flags).algorithm == FedBuff(staleness=Hinge(), buffer_size=3)


def test_flags_mean_the_same_in_any_order() -> None:
    pairs = [
        ("--algorithm", "FedAsync"),
        ("--algorithm.staleness", "Hinge"),
        ("--algorithm.staleness.a", "3"),
        ("--algorithm.alpha", "0.5"),
    ]
    expected = FedAsync(alpha=0.5, staleness=Hinge(a=3.0))
    for order in itertools.permutations(pairs):
        assert load_config("digits", [word for pair in order for word in pair]).algorithm == expected
    again = load_config(None, ["--rounds=3", "--seed", "1", "--rounds", "4"])
    assert again.rounds == 4, "the last of two equal flags counts"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rounds"], "--rounds has no value; give one, as in --rounds VALUE"),
        (["--rounds", "--seed", "3"], "--rounds has no value"),
        (["--"], "unexpected argument '--'"),
        (["rounds", "3"], "unexpected argument 'rounds'; settings are given as --section.key value"),
        (["--local.lr.x", "3"], "unknown key 'local.lr.x'. Did you mean 'local.lr'?"),
        (["--model", "none"], "model has settings of its own, got none; set one of them: model.name"),
        (["--data.partition", "Dirichlett"], "Did you mean 'Dirichlet'?"),
        (["--tracking.trackers", "["], "tracking.trackers must be a list, as in [a, b], got ["),
        (
            ["--clock.speed", "SpeedTable", "--clock.speed.factors", "[1, 0]"],
            "clock.speed.factors[1] must be > 0",
        ),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], words: str) -> None:
    assert words in refusal("", *flags)


@pytest.mark.parametrize("value", ["-1", "-0.5"])
def test_a_negative_number_is_a_value(value: str) -> None:
    assert f"got {float(value)}" in refusal("", "--local.lr", value)


# ---- keys of before ----


@pytest.mark.parametrize(
    ("old", "new", "sections"),
    [
        ("track", "tracking", {"track": {"progress": "false"}}),
        ("track", "tracking", {"track": {"with": ["wandb"]}}),
        ("tracking.with", "tracking.trackers", {"tracking": {"with": ["wandb"]}}),
        ("data.skew", "data.feature_shift", {"data": {"skew": {"noise": "0.1"}}}),
        ("clock.speed.visit_s", "clock.speed.overhead_s", {"clock": {"speed": {"visit_s": "1"}}}),
    ],
)
def test_keys_of_before_are_refused_with_their_new_names(
    old: str, new: str, sections: dict[str, Any]
) -> None:
    assert refusal(yaml.safe_dump(sections)) == f"{old} is now {new}"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--track.with", "track.with is now tracking.trackers"),
        ("--tracking.with", "tracking.with is now tracking.trackers"),
        ("--track", "track is now tracking"),
        ("--track.project", "track is now tracking"),
        ("--data.skew", "data.skew is now data.feature_shift"),
        ("--data.skew.noise", "data.skew is now data.feature_shift"),
        ("--clock.speed.visit_s", "clock.speed.visit_s is now clock.speed.overhead_s"),
    ],
)
def test_flags_of_before_are_refused_with_their_new_names(flag: str, words: str) -> None:
    assert refusal("", flag, "1") == words


def test_python_keywords_of_before_are_refused_with_their_new_names() -> None:
    old: list[tuple[Any, str, str]] = [
        (Federation, "track", "track is now tracking"),
        (DataConfig, "skew", "data.skew is now data.feature_shift"),
        (SpeedTable, "visit_s", "clock.speed.visit_s is now clock.speed.overhead_s"),
    ]
    for cls, keyword, words in old:
        with pytest.raises(ConfigError) as error:
            cls(**{keyword: 1.0})
        assert str(error.value) == words
