"""The commands that train: `run` and `compare`."""

from __future__ import annotations

import argparse
import itertools
import shlex

from fedddp.commands.console import (
    PRINT,
    fail,
    help_is_asked,
    is_coordinator,
    load_configuration,
    on_terminal,
    reporting,
    say,
    show,
    stop,
)
from fedddp.commands.options import OPTIONS_HELP, logging_as, show_profile, split_options
from fedddp.commands.report import add_paper_options, paper_files
from fedddp.distributed.environment import Launch


def run(rest: list[str]) -> None:
    """Train one run."""
    options = split_options(rest)
    _check_folder(options.words)
    if not options.quiet and on_terminal() and is_coordinator() and not {PRINT, "-h", "--help"} & {*rest}:
        say("loading PyTorch ...")  # takes seconds
    if {"-h", "--help"} & {*rest} and is_coordinator():
        say(OPTIONS_HELP, end="")
    config, name = load_configuration(options.words)
    from fedddp.federation import Federation, Interrupted
    from fedddp.tracking.summary import summary

    with reporting(), logging_as(options):
        try:
            result = Federation(config, default_name=name).run()
        except Interrupted as interruption:
            result = interruption.result
    if result.history and config.tracking.progress and not options.quiet:
        show(summary(result.history, result.folder, config.rounds, finished=result.finished))
        if config.tracking.profile:
            show_profile(result.folder)
    if not result.finished:
        stop(f"run {shlex.join(_with_flags(rest, name=result.folder.name, resume='auto'))}")
    if is_coordinator():
        say(f"run directory: {result.folder}")


def _check_folder(words: list[str]) -> None:
    """Refuse a name that another run has, before the seconds that torch takes."""
    from fedddp.config.files import OBJECTS, is_null, read_sections
    from fedddp.distributed.environment import Launch
    from fedddp.section import ConfigError
    from fedddp.storage.run_folder import find_folder

    if not words or words[0].startswith("-") or {PRINT, "-h", "--help"} & {*words}:
        return
    try:
        given = {"output": "runs", "resume": "never", **read_sections(words[0])}
        for place, word in enumerate(words):
            key, equals, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and key in ("output", "name", "resume"):
                given[key] = value if equals else "".join(words[place + 1 : place + 2])
        if OBJECTS in given:  # reported when the configuration is read
            return
        name = given.get("name")
        name = None if is_null(name) or str(name).lower() in ("null", "none") else str(name)
        find_folder(str(given["output"]), name, "run", str(given["resume"]), Launch.from_environment())
    except ConfigError as error:
        fail(str(error))
    except OSError:  # reported where the directory is made
        return


def _with_flags(rest: list[str], **flags: str) -> list[str]:
    """Return the arguments `rest` with these flags, which replace those of the same name."""
    kept, words = [], iter(rest)
    for word in words:
        if word.startswith("--") and word[2:].partition("=")[0] in flags:
            if "=" not in word:
                next(words, None)
            continue
        kept.append(word)
    for name, value in flags.items():
        kept += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    return kept


def compare_runs(rest: list[str]) -> None:
    """Train what is not trained yet, and compare all runs."""
    from fedddp import comparison as compare
    from fedddp.distributed.launch import choose_device
    from fedddp.federation import Interrupted
    from fedddp.tracking.progress import QuietConsole

    options = argparse.ArgumentParser(
        prog="fedddp compare",
        usage="fedddp compare RECIPE|FILE|RUN ... [--output FOLDER] [--baselines] [--target X] "
        "[--figure FILE] [--panel P] [--table FILE] [--section.key value ...]",
        description="Train what is not trained yet; compare all runs in a table, a picture, a page.",
        epilog="A folder stands for all runs in it. Settings are for all runs trained: fedddp run --help.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    options.add_argument("--output", metavar="FOLDER", help="folder of the runs and the report")
    options.add_argument(
        "--baselines",
        action="store_true",
        help="also train what a federation is measured against, with the settings of the first run: each "
        "client alone (local only), and the data of all in one place (pooled); needs data.holdout, or "
        "clients that own test data",
    )
    options.add_argument(
        "--target",
        metavar="X",
        type=float,
        help="score to race for, of the metric that the runs are judged by: accuracy (0.9 is 90 %%), mean "
        "IoU, F1, average precision, or test loss; by default 95 %% of the best",
    )
    options.add_argument(
        "--accuracy", metavar="A", type=float, help="the same, for runs judged by accuracy alone; in (0, 1]"
    )
    add_paper_options(options)
    if help_is_asked(options, rest):
        return
    targets = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    if not targets:
        fail("give recipes, .yaml files or run directories, e.g. `fedddp compare compare-paradigms`")
    try:
        own, flags = options.parse_known_args(rest[len(targets) :])
        paper = paper_files(own)
        comparison = compare.prepare(targets, flags, own.output, own.target, own.accuracy, own.baselines)
        for config in comparison.configs.values():
            choose_device(config.topology, Launch.from_environment())
    except (ValueError, argparse.ArgumentError) as error:
        fail(str(error))
    with reporting():
        try:
            finished = compare.train(comparison)
        except Interrupted:
            finished = False
        if finished and is_coordinator():
            for path in compare.report(comparison, QuietConsole(), paper):
                say(str(path))
    if not finished:
        stop(f"compare {shlex.join(rest)}")
