"""The commands that use a trained model: `eval`, `predict`, `export`, `card`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedddp.commands.console import fail, help_is_asked, say, show

if TYPE_CHECKING:
    from rich.table import Table

    from fedddp.inference import TrainedModel
    from fedddp.inference.pictures import Prediction

STDOUT = "-"
"""As the file of `--json`: standard output, with nothing else on it."""


def evaluate(rest: list[str]) -> None:
    """Evaluate a trained model: centrally, per class, per client."""
    options = _options("eval RUN [--data.root FOLDER ...]", "Evaluate a trained model.")
    options.epilog = (
        "Settings of data are those of `fedddp run`. Without them, or where the data only moved, it is the "
        "run's own test data, and each client's own data; other data need the same names of classes."
    )
    options.add_argument("--clients", metavar="N", type=int, help="clients to evaluate (all); 0: none")
    options.add_argument("--json", metavar="FILE", help="write everything as JSON; - prints it")
    own, flags = _parsed(options, rest)
    if own is None:
        return
    if own.run != rest[0]:
        fail("give the run first, as in `fedddp eval runs/digits --data.root FOLDER`")
    if own.clients is not None and own.clients < 0:
        fail(f"--clients must be >= 0, got {own.clients}")
    from fedddp.commands.use_tables import as_json, evaluation_tables

    with _one_line(), _only_json(own.json):
        from fedddp.inference.metrics import evaluate_run

        model = _model(own)
        found = evaluate_run(own.run, model, flags, own.clients)
    if own.json:
        _write_json(own.json, {"run": str(own.run), "best": own.best, **as_json(found, model)})
    if own.json != STDOUT:
        _show(evaluation_tables(found, model, own.run, best=own.best))


def predict(rest: list[str]) -> None:
    """Print the most probable classes of image files."""
    options = _options("predict RUN IMAGE|FOLDER ...", "Predict the classes of images; folders recursively.")
    options.add_argument("images", nargs="*", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    options.add_argument("--top", metavar="N", type=int, default=3, help="classes per image (3)")
    options.add_argument("--save", metavar="SHEET.png", help="write a contact sheet of the images")
    options.add_argument("--json", metavar="FILE", help="write all predictions as JSON; - prints them")
    own = _parsed_alone(options, rest, "predict")
    if own is None:
        return
    if own.top < 1:
        fail(f"--top must be >= 1, got {own.top}")
    if not own.images:
        fail("give image files, or folders of them, e.g. `fedddp predict runs/digits photos`")
    predictions = _predicted(own)
    if own.json:
        _write_json(own.json, [_prediction(one) for one in predictions])
    if own.json != STDOUT:
        _show([_prediction_table(predictions)])
        if own.save:
            say(own.save)


def _predicted(own: argparse.Namespace) -> list[Prediction]:
    """Return the predictions for the images of the options, and save the contact sheet."""
    sheet: list[tuple[Prediction, Any]] = []
    predictions: list[Prediction] = []
    with _one_line(), _only_json(own.json):
        from fedddp.inference import pictures

        if own.save:
            pictures.check_sheet(Path(own.save))
        model = _model(own)
        files = pictures.find_images(own.images)
        for prediction, picture in pictures.predict_files(model, files, own.top):
            predictions.append(prediction)
            if own.save and len(sheet) < pictures.MOST_ON_SHEET:
                sheet.append((prediction, picture))
        if not predictions:
            raise ValueError(f"no image could be read, of {len(files)}; give images, or folders of them")
        if own.save:
            title = f"{Path(own.run).resolve().name}: {len(predictions)} images"
            title += f", the first {len(sheet)}" if len(predictions) > len(sheet) else ""
            with _writing(own.save) as path:
                pictures.contact_sheet(title, sheet).save(path)
    return predictions


def export(rest: list[str]) -> None:
    """Write a trained model to a file that needs no fedddp."""
    options = _options("export RUN --format pt2|onnx|safetensors", "Export a trained model to one file.")
    options.add_argument(
        "--format", choices=("pt2", "onnx", "safetensors"), help="by default --output's ending"
    )
    options.add_argument("--output", metavar="FILE", help="by default RUN/exported.FORMAT")
    options.add_argument(
        "--preprocessing",
        choices=("inside", "beside"),
        default="inside",
        help="inside: the file takes uint8 images; beside: normalised ones, with FILE.json beside it",
    )
    own = _parsed_alone(options, rest, "export")
    if own is None:
        return
    if not own.format and not own.output:
        fail("give --format pt2, onnx or safetensors")
    output = own.output or str(Path(own.run) / f"exported.{own.format}")
    with _one_line():
        model = _model(own)
        with _writing(output) as path:
            done = model.export(path, own.format, own.preprocessing)
    taken = {"inside": "takes uint8 images", "beside": "takes normalised images"}[done.preprocessing]
    say(f"{done.path}: {'weights alone' if done.format == 'safetensors' else taken}; {done.compared}")
    if done.beside:
        say(f"{done.beside}: classes, mean and deviation")


def card(rest: list[str]) -> None:
    """Print or write the model card of a run."""
    options = _options("card RUN [--output FILE]", "Write a model card of a finished run.", loads=False)
    options.add_argument("--output", metavar="FILE", help="by default it is printed")
    own = _parsed_alone(options, rest, "card")
    if own is None:
        return
    with _one_line():
        from fedddp.inference.card import model_card
        from fedddp.storage.checkpoint import write_text

        text = model_card(own.run, own.best)
        if own.output:
            with _writing(own.output) as path:
                write_text(path, text)
    say(own.output or text, end="\n" if own.output else "")


# ---- the command line ----


def _options(usage: str, description: str, *, loads: bool = True) -> argparse.ArgumentParser:
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
        "--best", action="store_true", help="the best model by checkpoint.best, not the last"
    )
    if loads:
        options.add_argument("--module", metavar="my_lab.Net", help="class of a run of your own module")
        options.add_argument("--device", metavar="cpu|cuda", default="cpu", help="where it computes (cpu)")
    return options


def _parsed(
    options: argparse.ArgumentParser, rest: list[str]
) -> tuple[argparse.Namespace, list[str]] | tuple[None, list[str]]:
    """Return the options and the arguments that are left; None after printing the help."""
    if help_is_asked(options, rest):
        return None, []
    try:
        own, flags = options.parse_known_intermixed_args(rest)
    except argparse.ArgumentError as error:
        fail(str(error))
    if own.run is None:
        fail("give the directory of a finished run, e.g. runs/digits; `fedddp runs` lists them")
    return own, flags


def _parsed_alone(
    options: argparse.ArgumentParser, rest: list[str], command: str
) -> argparse.Namespace | None:
    """Return the options of a `command` that takes no settings; None after printing the help."""
    own, flags = _parsed(options, rest)
    if flags:
        fail(f"unexpected argument {flags[0]!r}; see fedddp {command} --help")
    return own


def _model(own: argparse.Namespace) -> TrainedModel:
    """Return the model of the options, on its device."""
    import torch

    from fedddp.inference import load_model
    from fedddp.section import ConfigError

    try:
        device = torch.device(own.device)
    except RuntimeError:
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {own.device!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {own.device}: torch sees {torch.cuda.device_count()} GPUs; use cpu")
    return load_model(own.run, own.module, own.best).to(device)


# ---- output ----


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Exit with one line where the block fails for a reason that a user can change."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except ValueError as error:
        fail(str(error))


@contextlib.contextmanager
def _writing(file: str) -> Iterator[Path]:
    """Make the folder of `file`, which the block writes.

    Raises:
        ConfigError: it cannot be written.
    """
    from fedddp.section import ConfigError

    path = Path(file).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}; choose another file") from None


@contextlib.contextmanager
def _only_json(file: str | None) -> Iterator[None]:
    """Print on standard error in the block, if JSON is printed."""
    with contextlib.redirect_stdout(sys.stderr) if file == STDOUT else contextlib.nullcontext():
        yield


def _write_json(file: str, content: Any) -> None:
    from fedddp.storage.checkpoint import write_text
    from fedddp.storage.history import plain

    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    if file == STDOUT:
        say(text)
        return
    with _one_line(), _writing(file) as path:
        write_text(path, f"{text}\n")


def _show(tables: Sequence[Any]) -> None:
    for number, table in enumerate(tables):
        if number:
            say("")
        show(table)


def _prediction(prediction: Prediction) -> dict[str, Any]:
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    return {"image": str(prediction.file), "classes": [{"class": c, "probability": p} for c, p in pairs]}


def _prediction_table(predictions: Sequence[Prediction]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    table.add_column("image", overflow="fold")
    for place in range(len(predictions[0].classes)):
        table.add_column("class" if not place else f"{place + 1}.", overflow="fold")
        table.add_column("", justify="right", no_wrap=True)
    for one in predictions:
        cells = [Text(str(one.file))]
        for name, probability in zip(one.classes, one.probabilities, strict=True):
            cells += [Text(name), Text(f"{100 * probability:.1f} %")]
        table.add_row(*cells)
    return table
