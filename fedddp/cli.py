"""The command line: parse the command, call it, and exit."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable

from fedddp.commands.console import fail, logging_to_console, say
from fedddp.distributed.signals import stop_signals_held

COMMANDS = {
    "run": "fedddp.commands.train:run",
    "compare": "fedddp.commands.train:compare_runs",
    "report": "fedddp.commands.report:report",
    "plan": "fedddp.commands.preview:dry_run_table",
    "partition": "fedddp.commands.preview:partition",
    "recipes": "fedddp.commands.preview:recipes",
    "runs": "fedddp.commands.runs:runs",
    "show": "fedddp.commands.show:show_run",
    "watch": "fedddp.commands.watch:watch",
    "init": "fedddp.commands.init:init",
    "slurm": "fedddp.commands.slurm:slurm",
    "eval": "fedddp.commands.use:evaluate",
    "predict": "fedddp.commands.use:predict",
    "export": "fedddp.commands.use:export",
    "card": "fedddp.commands.use:card",
}
"""Where each command is; imported when it is called, so that `fedddp --help` is fast."""

TRAINING = ("run", "compare")
"""Commands that a stop signal ends with a checkpoint."""

USAGE = """\
fedddp: federated learning on DDP groups, in one torchrun.

  fedddp run RECIPE|FILE [--section.key value ...]    train; under torchrun on many ranks
  fedddp compare RECIPE|FILE|RUN ... [--baselines]    train what is not trained yet; one table, one picture
  fedddp report RUN [RUN ...]                         one page: curves, clients, mistakes, times, settings
  fedddp plan RECIPE|FILE [--ranks N] [...]           dry run: groups, bytes, memory
  fedddp partition RECIPE|FILE [...]                  how the data are split over the clients
  fedddp recipes                                      the configurations that ship with fedddp
  fedddp init FOLDER [--output my.yaml]               write a configuration for a folder of images
  fedddp runs [OUTPUT] [--sort accuracy] [...]        the runs in a folder (default: runs)
  fedddp show RUN                                     one run: settings, versions, metrics, warnings, files
  fedddp watch RUN                                    follow a run from its files, such as a batch job
  fedddp eval RUN [--data.root FOLDER ...]            metrics of a trained model, per class and per client
  fedddp predict RUN IMAGE|FOLDER ... [--save F.png]  classes, labels, masks or boxes in images
  fedddp export RUN --format pt2|onnx|safetensors     one file that needs no fedddp
  fedddp card RUN [--output FILE]                     a model card
  fedddp slurm [FOLDER]                               write the batch scripts for Slurm (default: slurm)

  fedddp run --help lists every setting, fedddp run RECIPE|FILE --print_config all their values. Examples:
    fedddp run digits
    torchrun --standalone --nproc-per-node 4 -m fedddp run digits --topology.ranks_per_client 2
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments` (by default the process's) and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode shows "?" for a Greek letter
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(USAGE, end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        from fedddp import __version__

        say(__version__)
        sys.exit(0)
    command, *rest = arguments
    if command not in COMMANDS:
        fail(f"unknown command '{command}'; choose one of {', '.join(COMMANDS)} (see fedddp --help)")
    if command in ("recipes", "slurm") and rest in (["-h"], ["--help"]):
        say(USAGE, end="")
        sys.exit(0)
    sys.path.insert(0, os.getcwd())  # so that the dotted path of a class beside the user is found
    try:
        with (
            logging_to_console(),
            stop_signals_held() if command in TRAINING else contextlib.nullcontext(),
        ):
            _command(command)(rest)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _command(name: str) -> Callable[[list[str]], None]:
    module, function = COMMANDS[name].split(":")
    found: Callable[[list[str]], None] = getattr(importlib.import_module(module), function)
    return found
