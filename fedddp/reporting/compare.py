"""Several runs on the same data, with the same seed and budget, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedddp.config.loader import load_sections, read_sections
from fedddp.config.schema import ConfigError, Run
from fedddp.data.datasets import load as load_images
from fedddp.federation import Federation
from fedddp.reporting.curves import over_seeds, read
from fedddp.reporting.render import target_of, terminal, write
from fedddp.simulation.clock import examples_trained

SHARED = ("data", "seed", "clock")
"""What all configurations of a comparison take over from the first."""


@dataclass(frozen=True)
class Comparison:
    """What a command line asks for."""

    folder: Path
    """Where the runs that are trained, and the report, go."""
    runs: Mapping[str, Run]
    """What is to be trained, by name; those that are finished already cost nothing."""
    finished: Sequence[Path]
    """Run directories that are compared as they are."""
    accuracy: float | None
    """The accuracy to race for, in (0, 1]; by default 95 % of the best."""


def plan(
    targets: Sequence[str], flags: Sequence[str], output: str | None = None, accuracy: float | None = None
) -> Comparison:
    """Return what is to be trained and compared.

    Args:
        targets: recipes and YAML files (of a run, or with a section `compare`), run directories, and
            folders of such.
        flags: settings for all that is trained, as on the command line of a run.
        output: where it goes; by default the folder of runs that is the only target, or one in `runs`.
        accuracy: see `Comparison`.

    Raises:
        ConfigError: a target is none of these, or a configuration cannot run.
    """
    if accuracy is not None and not 0 < accuracy <= 1:
        raise ConfigError(f"--accuracy must be in (0, 1], got {accuracy:g}")
    finished: list[Path] = []
    configured: dict[str, Any] = {}
    stem = "comparison"
    for target in targets:
        if Path(target).is_dir():
            finished += _run_folders(Path(target))
            continue
        sections = read_sections(target)
        variants = sections.pop("compare", None)
        if len(targets) == 1:
            stem = Path(target).stem
        described = (
            {Path(target).stem: sections} if variants is None else _variants(target, sections, variants)
        )
        for name in configured.keys() & described.keys():
            raise ConfigError(f"{target}: there is a run {name} already; give it another name")
        configured |= described
    if finished and flags and not configured:
        raise ConfigError(
            f"{flags[0]} is for runs that are trained, but {targets[0]} is a run directory; leave it out"
        )
    one_folder = len(targets) == 1 and Path(targets[0]).is_dir()
    folder = Path(output or (targets[0] if one_folder else Path("runs") / stem))
    runs: dict[str, Run] = {}
    for name, sections in configured.items():
        try:
            run = load_sections(sections, flags)
            runs[name] = _alike(run, name, next(iter(runs.values()), run), folder)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return Comparison(folder, runs, finished, accuracy)


def _run_folders(folder: Path) -> list[Path]:
    """Return `folder` if it is a run, else all the runs in it."""
    found = (
        [folder]
        if (folder / "config.yaml").exists()
        else sorted(p.parent for p in folder.glob("*/config.yaml"))
    )
    if not found:
        raise ConfigError(
            f"{folder} holds no runs; give run directories, a folder of them, recipes or .yaml files"
        )
    return found


def _variants(target: str, common: dict[str, Any], variants: Any) -> dict[str, dict[str, Any]]:
    """Return the sections of every run that a comparison file describes."""
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
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


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `common` with `own` on top, section by section; another choice replaces the whole section."""
    merged = dict(common)
    for key, value in own.items():
        before = merged.get(key)
        same_choice = isinstance(before, dict) and isinstance(value, dict) and "name" not in value
        merged[key] = _merged(before, value) if same_choice else value  # type: ignore[arg-type]
    return merged


def _alike(run: Run, name: str, first: Run, folder: Path) -> Run:
    """Return `run` with the data, seed and clock of the first, as one of the runs in `folder`."""
    group = run.track.group or folder.name
    return dataclasses.replace(
        run,
        **{key: getattr(first, key) for key in SHARED},
        name=name,
        output=str(folder),
        resume="auto",
        track=dataclasses.replace(run.track, group=group),
    )


def train(comparison: Comparison, *, speak: bool) -> bool:
    """Collective. Train what is not finished; return False if the run was asked to stop."""
    for number, (name, run) in enumerate(_budgeted(comparison.runs), 1):
        if speak:
            print(f"{name} ({number} of {len(comparison.runs)}): {run.rounds} rounds", flush=True)
        if not Federation(run).run().finished:
            return False
    return True


def _budgeted(runs: Mapping[str, Run]) -> Iterator[tuple[str, Run]]:
    """Yield all runs with the rounds that make as many examples as those of the first, measured as often.

    The data, which is that of all, is looked at when the first is trained: it may have to download it.
    """
    if not runs:
        return
    (name, first), *others = runs.items()
    yield name, first
    if others:
        images, _ = load_images(first.data)
        _, sizes = first.data.split(images, first.seed)
        for other, run in others:
            # Clients are sampled uniformly, so a visit is to the mean client.
            budget, examples = (
                one.cohort.size * examples_trained(one.local, sizes).mean() for one in (first, run)
            )
            yield other, _stretched(run, first, float(budget / examples) if examples else 1.0)


def _stretched(run: Run, first: Run, factor: float) -> Run:
    """Return `run` with `factor` times the rounds of `first`, from beginning to end and between events."""

    def stretch(rounds: int) -> int:
        return max(1, round(rounds * factor))

    return dataclasses.replace(
        run,
        rounds=stretch(first.rounds),
        evaluation=dataclasses.replace(run.evaluation, every=stretch(first.evaluation.every)),
        checkpoint=dataclasses.replace(run.checkpoint, every=stretch(first.checkpoint.every)),
    )


def report(comparison: Comparison, console: Console) -> list[Path]:
    """Show the table, and write it with the picture and the page; return the files.

    Raises:
        ValueError: a run cannot be compared.
        OSError: a file cannot be written.
    """
    folders = [*comparison.finished, *(comparison.folder / name for name in comparison.runs)]
    curves = over_seeds([read(folder) for folder in folders])
    target = comparison.accuracy or target_of(curves)
    console.print(terminal(curves, target, console.width))
    return write(curves, comparison.folder, target, f"Comparison: {comparison.folder.name}")
