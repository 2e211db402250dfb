"""The commands that look before a run: `plan`, `partition`, `recipes`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fedddp.commands.console import fail, is_coordinator, load_configuration, say, show
from fedddp.distributed.environment import Launch


def partition(rest: list[str]) -> None:
    """Print how the data are split over the clients; with `--figure FILE` draw it too."""
    rest, figure = _figure(rest)
    config, _ = load_configuration(rest)
    from fedddp.data.datasets import load
    from fedddp.data.description import describe
    from fedddp.reporting.partition_table import table
    from fedddp.reporting.split_figures import SHOWN, save_split
    from fedddp.training.clients import client_names

    try:
        train, _ = load(config.data, config.task.target)
        split, _ = config.data.split(train, config.seed)
        names = train.class_names or tuple(map(str, range(train.classes)))
        about: dict[str, Any] = {"names": client_names(config.data, train), "target": train.target}
        if figure is not None and is_coordinator():
            save_split(describe(split, train.labels, train.classes, SHOWN, **about), names, figure)
    except (ValueError, OSError) as error:
        fail(str(error))
    show(table(describe(split, train.labels, train.classes, **about), names))
    if figure is not None and is_coordinator():
        say(str(figure))


def _figure(rest: list[str]) -> tuple[list[str], Path | None]:
    """Return the arguments without `--figure FILE`, and the file; None where it is not given."""
    from fedddp.reporting.figures import KINDS, check_file

    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--figure")
    try:
        own, others = options.parse_known_args(rest)
        return others, check_file(own.figure, KINDS, "--figure")
    except argparse.ArgumentError as error:
        fail(f"--figure: {error.message}; give a .pdf, .svg or .png file")
    except ValueError as error:
        fail(str(error))


def dry_run_table(rest: list[str]) -> None:
    """Print the dry run of a configuration."""
    rest, ranks = _ranks(rest)
    config, name = load_configuration(rest, ranks)
    from fedddp.reporting.dry_run import dry_run

    try:
        table = dry_run(
            dataclasses.replace(config, name=config.name or name),
            ranks or Launch.from_environment().world_size,
        )
    except (ValueError, OSError) as error:
        fail(str(error))
    show(table)


def _ranks(rest: list[str]) -> tuple[list[str], int]:
    """Return the arguments without `--ranks N`, and N, or 0 where it is not given."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--ranks", type=int)
    try:
        own, others = options.parse_known_args(rest)
    except argparse.ArgumentError as error:
        fail(f"--ranks: {error.message}")
    if own.ranks is not None and own.ranks < 1:
        fail(f"--ranks must be >= 1, got {own.ranks}; it is how many ranks the launcher will start")
    return others, own.ranks or 0


def recipes(_: list[str]) -> None:
    """Print the configurations that ship with fedddp."""
    from rich.table import Table

    from fedddp.recipes import recipes

    table = Table("recipe", "what it trains", box=None, header_style="bold")
    # Each dataset first with FedAvg, then with other algorithms.
    for name, description in sorted(
        recipes().items(), key=lambda item: (item[0].startswith("digits-"), item[0])
    ):
        table.add_row(name, description)
    show(table)
