"""What the commands that use a trained model share: their options, the model, and their output."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedddp.commands.console import fail, help_is_asked, say, show
from fedddp.storage.run_record import CLIENT, MODEL

if TYPE_CHECKING:
    from fedddp.inference import TrainedModel

STDOUT = "-"
"""As the file of `--json`: standard output, with nothing else on it."""


# ---- the command line ----


def command_options(usage: str, description: str, *, loads: bool = True) -> argparse.ArgumentParser:
    """Return the options that all these commands have; `loads`: those of commands that load the module."""
    options = argparse.ArgumentParser(
        prog="fedddp",
        usage=f"fedddp {usage} [options]",
        description=description,
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    options.add_argument("run", metavar="RUN", nargs="?", help="run directory, such as runs/digits")
    options.add_argument(
        "--best",
        metavar="METRIC",
        nargs="?",
        const=True,
        default=False,
        help="the best model by checkpoint.best, not the last; of several metrics by this one, as in "
        "--best=eval/dice",
    )
    if loads:
        options.add_argument("--module", metavar="my_lab.Net", help="class of a run of your own module")
        options.add_argument("--device", metavar="cpu|cuda", default="cpu", help="where it computes (cpu)")
        options.add_argument(
            "--client",
            metavar="NAME",
            help="the own model of one client, by its name or number (FedBN, FedPer, Ditto, baseline=local)",
        )
    return options


def parsed(
    options: argparse.ArgumentParser, rest: list[str]
) -> tuple[argparse.Namespace, list[str]] | tuple[None, list[str]]:
    """Return the options and the arguments that are left; None after printing the help."""
    if help_is_asked(options, rest):
        return None, []
    try:
        own, flags = options.parse_known_intermixed_args(list(_best_alone(rest)))
    except argparse.ArgumentError as error:
        fail(str(error))
    if own.run is None:
        fail("give the directory of a finished run, e.g. runs/digits; `fedddp runs` lists them")
    own.best = own.best or own.best == ""
    if own.run == rest[0] and not Path(own.run).expanduser().is_dir():  # before the seconds that torch takes
        fail(f"{own.run} has no {MODEL}; give the directory of a finished run")
    return own, flags


def _best_alone(words: Sequence[str]) -> Iterator[str]:
    """Yield `words` with `--best` and its metric as one: another word behind it is a run or an image."""
    after = iter([*words[1:], ""])
    taken = False
    for word in words:
        following = next(after)
        if taken:
            taken = False
        elif word == "--best":
            taken = following.startswith(("eval/", "clients/"))
            yield f"--best={following if taken else ''}"
        else:
            yield word


def parsed_alone(
    options: argparse.ArgumentParser, rest: list[str], command: str
) -> argparse.Namespace | None:
    """Return the options of a `command` that takes no settings; None after printing the help."""
    own, flags = parsed(options, rest)
    if flags:
        fail(f"unexpected argument {flags[0]!r}; see fedddp {command} --help")
    return own


def chosen_model(own: argparse.Namespace, *, of_server: bool = False) -> TrainedModel:
    """Return the model of the options, on its device.

    `of_server`: where no client is chosen, the server's, also of a run without a global model.
    """
    import torch

    from fedddp.inference.loading import load_model, server_model
    from fedddp.section import ConfigError

    try:
        device = torch.device(own.device)
    except RuntimeError:
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {own.device!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {own.device}: torch sees {torch.cuda.device_count()} GPUs; use cpu")
    if of_server and own.client is None:
        return server_model(own.run, own.module, own.best).to(device)
    return load_model(own.run, own.module, own.best, own.client).to(device)


def described(run: str, model: TrainedModel, best: bool | str) -> dict[str, Any]:
    """Return which model is used, for JSON: "run", "best", "client" and "round"."""
    return {
        "run": run,
        "best": best,
        "client": model.metadata.get(CLIENT),
        "round": _round(run, model),
    }


def model_text(run: str, model: TrainedModel, best: bool | str) -> str:
    """Return which model of its run is used, as "client Oslo, best by eval/dice, round 7"."""
    client, number = model.metadata.get(CLIENT), _round(run, model)
    which = f"best by {model.metadata.get('metric')}" if best else "final"
    parts = [f"client {client}"] if client is not None else []
    return ", ".join([*parts, which, *([f"round {number}"] if number is not None else [])])


def _round(run: str, model: TrainedModel) -> int | None:
    """Return the round after which a model was saved; None where the run has no readable history."""
    from fedddp.storage.history import HISTORY, read_rows

    if "round" in model.metadata:  # only of a best model
        return int(model.metadata["round"])
    try:
        rows = read_rows(Path(run).expanduser() / HISTORY)
    except (OSError, ValueError):
        return None
    return int(rows[-1]["round"]) if rows else None


# ---- output ----


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Exit with one line where the block fails for a reason that a user can change."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except ValueError as error:
        fail(str(error))


@contextlib.contextmanager
def writing(file: str, *, folder: bool = False) -> Iterator[Path]:
    """Make the folder of `file`, which the block writes; with `folder` the folder `file` itself.

    Raises:
        ConfigError: it cannot be written.
    """
    from fedddp.section import ConfigError

    path = Path(file).expanduser()
    try:
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}; choose another file") from None


@contextlib.contextmanager
def only_json(file: str | None) -> Iterator[None]:
    """Print on standard error in the block, if JSON is printed."""
    with contextlib.redirect_stdout(sys.stderr) if file == STDOUT else contextlib.nullcontext():
        yield


def write_json(file: str, content: Any) -> None:
    """Write `content` as JSON to a file, or print it."""
    from fedddp.storage.checkpoint import write_text
    from fedddp.storage.history import plain

    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    if file == STDOUT:
        say(text)
        return
    with one_line(), writing(file) as path:
        write_text(path, f"{text}\n")


def show_all(tables: Sequence[Any]) -> None:
    """Print tables with an empty line between two."""
    for number, table in enumerate(tables):
        if number:
            say("")
        show(table)
