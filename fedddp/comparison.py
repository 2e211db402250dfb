"""Comparisons: several runs on the same data, with the same seed and budget."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedddp.config.baselines import baselines_of, compared_on_clients, examples_per_round, on_clients
from fedddp.config.files import read_sections
from fedddp.config.loader import build, typed
from fedddp.config.schema import Config, fields_with
from fedddp.data.datasets import load as load_images
from fedddp.distributed.environment import Launch
from fedddp.federation import Federation
from fedddp.reporting.curves import read_all
from fedddp.reporting.paper import PaperFiles, write_paper
from fedddp.reporting.render import write
from fedddp.reporting.runs import run_folders
from fedddp.reporting.tables import target_of, terminal
from fedddp.section import ConfigError, NonNegativeInt, checked, local_path

logger = logging.getLogger(__name__)

SHARED = fields_with("common", "seed")
"""Settings that all runs of a comparison take over from the first."""


@dataclass(frozen=True)
class Comparison:
    """The runs to train and to compare."""

    folder: Path
    """Folder of the runs that are trained, and of the report."""
    configs: Mapping[str, Config]
    """The runs to train, by name; finished ones are only read."""
    finished: Sequence[Path]
    """Run directories that are compared as they are."""
    target: float | None = None
    """The score to race for, of the metric that the runs are judged by; None: that of `target_of`."""
    accuracy: float | None = None
    """The same for runs that are judged by an accuracy, in (0, 1]."""


def prepare(
    targets: Sequence[str],
    flags: Sequence[str],
    output: str | None = None,
    target: float | None = None,
    accuracy: float | None = None,
    baselines: bool = False,
) -> Comparison:
    """Return the comparison that a command line describes.

    Args:
        targets: recipes and YAML files (of a run, or with a section `compare`), run directories, and
            folders of such.
        flags: settings for all runs that are trained, as on the command line of a run.
        output: its folder; by default the folder of runs that is the only target, or one in `runs`.
        target: the score to race for, of the metric that the runs are judged by.
        accuracy: the same for runs that are judged by an accuracy, in (0, 1].
        baselines: also train the clients of the first run each alone, and on the data of all in one place.

    Raises:
        ConfigError: a target is none of these, or a configuration cannot run.
    """
    _check_goal(target, accuracy)
    targets = [str(local_path(t, "compare")) if t.startswith("~") else t for t in targets]
    output = None if output is None else str(local_path(output, "output"))
    finished: list[Path] = []
    configured: dict[str, Any] = {}
    seeded: set[str] = set()  # runs whose file gives seeds: they keep their own
    stem = "comparison"
    for name in targets:
        if Path(name).is_dir():
            finished += run_folders(Path(name), ", recipes or .yaml files")
            continue
        sections = read_sections(name)
        variants, seeds = sections.pop("compare", None), sections.pop("seeds", None)
        if len(targets) == 1:
            stem = Path(name).stem
        described = {Path(name).stem: sections} if variants is None else _variants(name, sections, variants)
        if seeds is not None:
            described = _seeded(name, described, seeds)
            seeded |= described.keys()
        for twice in configured.keys() & described.keys():
            raise ConfigError(f"{name}: there is a run {twice} already; give it another name")
        configured |= described
    if finished and flags and not configured:
        raise ConfigError(
            f"{flags[0]} is for runs that are trained, but {targets[0]} is a run directory; leave it out"
        )
    one_folder = len(targets) == 1 and Path(targets[0]).is_dir()
    folder = Path(output or (targets[0] if one_folder else Path("runs") / stem))
    configs = _built(configured, flags, seeded, folder)
    configs = compared_on_clients(_with_baselines(configs, folder) if baselines else configs)
    others = [name for name, config in configs.items() if config.task.target != "class"]
    if accuracy is not None and others:
        task = type(configs[others[0]].task).__name__
        raise ConfigError(
            f"--accuracy is for runs that are judged by it, but {others[0]} has task={task}; give --target"
        )
    return Comparison(folder, configs, finished, target, accuracy)


def _built(
    configured: Mapping[str, Any], flags: Sequence[str], seeded: set[str], folder: Path
) -> dict[str, Config]:
    """Return the configuration of every run; those that are `seeded` keep their own seed."""
    configs: dict[str, Config] = {}
    for name, sections in configured.items():
        try:
            config = build(sections, flags)
            first = next(iter(configs.values()), config)
            seed = config.seed if name in seeded else first.seed
            configs[name] = dataclasses.replace(_alike(config, name, first, folder), seed=seed)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return configs


def _with_baselines(configs: Mapping[str, Config], folder: Path) -> dict[str, Config]:
    """Return `configs`, and the baselines of the first; of each of its seeds where these have runs.

    Raises:
        ConfigError: there is none to take settings from, or a baseline of it cannot run.
    """
    if not configs:
        raise ConfigError("--baselines are of a run that is trained: give its recipe or .yaml file too")
    name, first = next(iter(configs.items()))
    found = dict(configs)
    for own in configs.values():
        if own.baseline != "none":
            raise ConfigError(f"--baselines: {own.name} has baseline={own.baseline}; leave one of them out")
    seeds = sorted({config.seed for config in configs.values()})
    for seed in seeds:
        try:
            pair = baselines_of(on_clients(dataclasses.replace(first, seed=seed)))
        except ConfigError as error:
            raise ConfigError(f"--baselines of {name}: {error}") from None
        for kind, config in pair.items():
            label = kind if len(seeds) == 1 else f"{kind}-seed={seed}"
            if label in configs:
                raise ConfigError(f"--baselines: there is a run {label} already; give it another name")
            found[label] = dataclasses.replace(_alike(config, label, first, folder), seed=seed)
    return found


def _check_goal(target: float | None, accuracy: float | None) -> None:
    if accuracy is not None and not 0 < accuracy <= 1:
        raise ConfigError(f"--accuracy must be in (0, 1], got {accuracy:g}")
    if target is not None and not math.isfinite(target):
        raise ConfigError(f"--target must be a finite number, got {target:g}")
    if target is not None and accuracy is not None:
        raise ConfigError("--target and --accuracy exclude each other; leave one out")


def _variants(target: str, common: dict[str, Any], variants: Any) -> dict[str, dict[str, Any]]:
    """Return the sections of every run that a comparison file describes."""
    if (
        not isinstance(variants, dict)
        or not variants
        or not all(isinstance(v, dict) for v in variants.values())
    ):
        raise ConfigError(
            f"{target}: compare must hold a name and sections for every run, such as "
            "`FedProx: {algorithm: {name: FedProx, mu: 0.1}}`"
        )
    for name, sections in variants.items():
        for key in (*SHARED, "rounds"):
            if key in sections:
                raise ConfigError(
                    f"{target}: compare.{name}.{key} is set for one run, but all have the same data, "
                    f"seed, clock and budget; set {key} at the top (rounds are those of the first run)"
                )
    return {str(name): _merged(common, sections) for name, sections in variants.items()}


def _seeded(target: str, described: dict[str, dict[str, Any]], seeds: Any) -> dict[str, dict[str, Any]]:
    """Return every run once for each of `seeds`."""
    try:
        numbers = checked(typed(seeds, list[NonNegativeInt]), list[NonNegativeInt], "seeds")
    except ConfigError as error:
        raise ConfigError(f"{target}: {error}") from None
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{target}: seeds must be different whole numbers, as in [0, 1, 2], got {numbers}")
    return {
        f"{name}-seed={seed}": {**sections, "seed": value}
        for name, sections in described.items()
        for value, seed in zip(seeds, numbers, strict=True)
    }


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `common` with `own` on top, section by section; another choice replaces the section."""
    merged = dict(common)
    for key, value in own.items():
        before = merged.get(key)
        same_choice = isinstance(before, dict) and isinstance(value, dict) and "name" not in value
        merged[key] = _merged(before, value) if same_choice else value  # type: ignore[arg-type]
    return merged


def _alike(config: Config, name: str, first: Config, folder: Path) -> Config:
    """Return `config` with the data, seed and clock of the first, as one of the runs in `folder`."""
    group = config.tracking.group or folder.name
    return dataclasses.replace(
        config,
        **{key: getattr(first, key) for key in SHARED},
        name=name,
        output=str(folder),
        resume="auto",
        tracking=dataclasses.replace(config.tracking, group=group),
    )


def train(comparison: Comparison) -> bool:
    """Collective. Train what is not finished; return False if a run was asked to stop."""
    for number, (name, config) in enumerate(_budgeted(comparison.configs), 1):
        if Launch.from_environment().is_coordinator:
            logger.info("%s (%d of %d): %d rounds", name, number, len(comparison.configs), config.rounds)
        if not Federation(config).run().finished:
            return False
    return True


def _budgeted(configs: Mapping[str, Config]) -> Iterator[tuple[str, Config]]:
    """Yield all runs with the rounds that train on as many examples as the first, evaluated as often.

    The data, which is the same for all, is read after the first is trained, which may download it.
    """
    if not configs:
        return
    (name, first), *others = configs.items()
    yield name, first
    if others:
        images, _ = load_images(first.data, first.task.target)
        _, sizes = first.data.split(images, first.seed)
        for other, config in others:
            budget, examples = (examples_per_round(one, sizes) for one in (first, config))
            yield other, _stretched(config, first, budget / examples if examples else 1.0)


def _stretched(config: Config, first: Config, factor: float) -> Config:
    """Return `config` with `factor` times the rounds of `first`, and between evaluations and checkpoints."""

    def stretch(rounds: int) -> int:
        return max(1, round(rounds * factor))

    return dataclasses.replace(
        config,
        rounds=stretch(first.rounds),
        evaluation=dataclasses.replace(
            config.evaluation,
            every=stretch(first.evaluation.every),
            stop_after=stretch(first.evaluation.stop_after) if first.evaluation.stop_after else 0,
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every=stretch(first.checkpoint.every)),
    )


def report(comparison: Comparison, console: Console, paper: PaperFiles) -> list[Path]:
    """Print the table, and write it with the picture, the page, and the files for a paper; return the files.

    Raises:
        ValueError: a run cannot be compared.
        OSError: a file cannot be written.
    """
    folders = [*comparison.finished, *(comparison.folder / name for name in comparison.configs)]
    curves = read_all(folders)
    metric = curves[0].metric
    if comparison.accuracy is not None and not metric.in_percent:
        raise ConfigError(f"--accuracy is not for runs that are judged by {metric.key}; give --target")
    given = comparison.accuracy if comparison.target is None else comparison.target
    target = target_of(curves) if given is None else given
    for_paper = write_paper(curves, target, paper)
    console.print(terminal(curves, target, console.width))
    return [*write(curves, comparison.folder, target, f"Comparison: {comparison.folder.name}"), *for_paper]
