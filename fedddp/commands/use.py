"""The commands that use a trained model: `eval`, `predict`, `export`, `card`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedddp.commands.console import fail, say
from fedddp.commands.predict import predict
from fedddp.commands.use_options import (
    STDOUT,
    chosen_model,
    command_options,
    described,
    one_line,
    only_json,
    parsed,
    parsed_alone,
    show_all,
    write_json,
    writing,
)
from fedddp.storage.run_record import CROSS_SITE

__all__ = ["card", "evaluate", "export", "predict"]


def evaluate(rest: list[str]) -> None:
    """Evaluate a trained model: centrally, per class, per client."""
    options = command_options("eval RUN [--data.root FOLDER ...]", "Evaluate a trained model.")
    options.epilog = (
        "Settings of data are those of `fedddp run`. Without them, or where the data only moved, it is the "
        "run's own test data, and each client's own data; other data need the same names of classes."
    )
    options.add_argument("--clients", metavar="N", type=int, help="clients to evaluate (all); 0: none")
    options.add_argument(
        "--cross-site",
        action="store_true",
        help="each client's own model on the data of every client, as a matrix; of FedBN, FedPer, Ditto or "
        f"baseline=local; written to RUN/{CROSS_SITE} too",
    )
    options.add_argument(
        "--metric", metavar="M", help="matrix that is shown, such as iou or loss; the file has those of all"
    )
    options.add_argument("--json", metavar="FILE", help="write everything as JSON; - prints it")
    own, flags = parsed(options, rest)
    if own is None:
        return
    if own.run != rest[0]:
        fail("give the run first, as in `fedddp eval runs/digits --data.root FOLDER`")
    if own.clients is not None and own.clients < 0:
        fail(f"--clients must be >= 0, got {own.clients}")
    if own.metric is not None and not own.cross_site:
        fail(f"--metric={own.metric} is of a matrix; give --cross-site too")
    if own.cross_site:
        if own.clients is not None or own.best or own.client is not None:
            fail("--cross-site takes all clients and the final model; leave --client(s) and --best out")
        _cross_site(own, flags)
        return
    from fedddp.commands.use_tables import as_json, evaluation_tables

    with one_line(), only_json(own.json):
        from fedddp.inference.metrics import evaluate_run

        model = chosen_model(own, of_server=True)
        found = evaluate_run(own.run, model, flags, own.clients)
    if own.json:
        write_json(own.json, {**described(own.run, model, own.best), **as_json(found, model)})
    if own.json != STDOUT:
        show_all(evaluation_tables(found, model, own.run, best=own.best))


def _cross_site(own: argparse.Namespace, flags: list[str]) -> None:
    """Measure, write and print the matrix of clients' own models."""
    from fedddp.commands.use_cross_site import cross_site_tables
    from fedddp.reporting.cross_site_file import of_metric, parse_cross_site
    from fedddp.storage.history import read_json

    with one_line(), only_json(own.json):
        from fedddp.inference.cross_site import cross_site, write_cross_site

        metric = None if own.metric is None else own.metric.removeprefix("eval/")
        found = cross_site(own.run, chosen_model(own, of_server=True), flags, metric)
        file = write_cross_site(Path(own.run), found)
    content = of_metric(read_json(file), found.metric)
    if own.json:
        write_json(own.json, {"run": str(own.run), **content})
    if own.json != STDOUT:
        show_all(cross_site_tables(parse_cross_site(file, content)))
        say(str(file))


def export(rest: list[str]) -> None:
    """Write a trained model to a file that needs no fedddp."""
    options = command_options(
        "export RUN --format pt2|onnx|safetensors", "Export a trained model to one file."
    )
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
    own = parsed_alone(options, rest, "export")
    if own is None:
        return
    if not own.format and not own.output:
        fail("give --format pt2, onnx or safetensors")
    output = own.output or str(Path(own.run) / f"exported.{own.format}")
    with one_line():
        model = chosen_model(own)
        with writing(output) as path:
            done = model.export(path, own.format, own.preprocessing)
    taken = {"inside": "takes uint8 images", "beside": "takes normalised images"}[done.preprocessing]
    say(f"{done.path}: {'weights alone' if done.format == 'safetensors' else taken}; {done.compared}")
    if done.beside:
        say(f"{done.beside}: classes, mean and deviation")


def card(rest: list[str]) -> None:
    """Print or write the model card of a run."""
    options = command_options(
        "card RUN [--output FILE]", "Write a model card of a finished run.", loads=False
    )
    options.add_argument("--output", metavar="FILE", help="by default it is printed")
    own = parsed_alone(options, rest, "card")
    if own is None:
        return
    with one_line():
        from fedddp.inference.card import model_card
        from fedddp.storage.checkpoint import write_text

        text = model_card(own.run, own.best)
        if own.output:
            with writing(own.output) as path:
                write_text(path, text)
    say(own.output or text, end="\n" if own.output else "")
