"""An evaluation as tables for a terminal, and as plain data for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedddp.commands.use_options import model_text
from fedddp.evaluation import IDENTITY
from fedddp.inference.card_tasks import class_text
from fedddp.storage.history import SPREAD, Metric, class_metric, judged_by
from fedddp.storage.judged import averages_note
from fedddp.storage.run_record import CLIENT

if TYPE_CHECKING:
    from rich.table import Table

    from fedddp.evaluation import Metrics
    from fedddp.inference import TrainedModel
    from fedddp.inference.metrics import ClientMetrics, RunMetrics

WIDTH, MOST_IN_MATRIX = 80, 10
"""Columns of the terminal that a confusion matrix has to fit, and its classes."""

MOST_CLASSES, MOST_PAIRS, MOST_CLIENTS = 20, 8, 5
"""Rows of the tables: classes with the lowest recall, confused pairs, worst and best clients."""


class Confused(NamedTuple):
    """Examples of one class that were taken for another."""

    true: str
    predicted: str
    examples: int
    share: float
    """Of the examples of the true class."""


def confused_pairs(found: RunMetrics, classes: Sequence[str]) -> list[Confused]:
    """Return all pairs of classes that were confused, the most frequent first."""
    if found.confusion is None:
        return []
    rows = found.confusion.tolist()
    pairs = [
        Confused(classes[true], classes[predicted], count, count / sum(row))
        for true, row in enumerate(rows)
        for predicted, count in enumerate(row)
        if count and predicted != true
    ]
    return sorted(pairs, key=lambda pair: -pair.examples)


def as_json(found: RunMetrics, model: TrainedModel) -> dict[str, Any]:
    """Return an evaluation as plain data."""
    clients = found.clients
    recall = found.metrics.get("recall")
    if isinstance(recall, list):
        recall = dict(zip(_distinct(model.classes), recall, strict=True))
    lists = per_class(found.metrics, len(model.classes))
    return {
        "data": {
            "dataset": found.dataset,
            "root": found.root,
            "examples": found.examples,
            "of_the_run": found.own,
        },
        "own_examples": None
        if found.of_client is None
        else {
            "data": "test" if found.of_client.tested else "held out",
            "row": next(iter(found.of_client.rows), None),
        },
        "metrics": found.metrics,
        "classes": list(model.classes),
        "recall": recall,
        "per_class": {
            metric.bare: dict(zip(_distinct(model.classes), values, strict=True))
            for metric, values in lists.items()
        },
        "confusion": None if found.confusion is None else found.confusion.tolist(),
        "confused": [pair._asdict() for pair in confused_pairs(found, model.classes)],
        "clients": None
        if clients is None
        else {
            "data": "test" if clients.tested else "held out" if clients.held_out else "training",
            "personalized": clients.personalized,
            "states_round": clients.states_round,
            "metric": clients.judged,
            **({clients.judged: clients.spread} if clients.judged else {}),
            "rows": clients.rows,
        },
        "clients_left_out": found.left_out,
    }


def _distinct(classes: Sequence[str]) -> Sequence[str]:
    """Return the names of the classes, each behind its number where two have the same name."""
    twice = len({*classes}) < len(classes)
    return [f"{number} {name}" for number, name in enumerate(classes)] if twice else classes


def evaluation_tables(found: RunMetrics, model: TrainedModel, run: str, *, best: bool) -> list[Any]:
    """Return what `fedddp eval` prints: the metrics, the classes, the confused pairs, the clients."""
    parts = [_summary(found, model, run, best=best)]
    of_all = found.own and CLIENT in model.metadata
    lists = per_class(found.metrics, len(model.classes))
    counted = "pixels" if model.task.target == "mask" else "examples"
    if lists:
        counts = None if found.confusion is None else found.confusion.sum(1).tolist()
        which = "class, test images of all" if of_all else "class"
        parts.append(_class_table(lists, counts, counted, model.classes, which))
    if found.confusion is not None:
        parts += _confusion_table(found.confusion.tolist(), model.classes)
    pairs = confused_pairs(found, model.classes)
    if pairs:
        table = _table("taken for another class", "predicted", counted, "share of the class")
        for pair in pairs[:MOST_PAIRS]:
            _add(table, pair.true, pair.predicted, f"{pair.examples:,}", _percent(pair.share))
        parts.append(table)
    if found.clients is not None and len(found.clients.rows) > 1:
        parts.append(_client_table(found.clients.rows))
    return parts


def _summary(found: RunMetrics, model: TrainedModel, run: str, *, best: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    test = "test data of the run" if found.own else "other data than the run's test data"
    lines = [
        ("model", f"{run} ({model_text(run, model, best)})"),
        ("data", f"{found.dataset}: {found.examples:,} examples, {test}"),
        *_central_lines(found, model.metadata.get(CLIENT)),
    ]
    if found.clients is not None:
        lines += _client_lines(
            found.clients, "that model" if CLIENT in model.metadata else "the global model"
        )
    elif found.left_out is not None:
        lines.append(("clients", found.left_out))
    names = {*found.metrics, *(name for row in (found.clients.rows if found.clients else []) for name in row)}
    note = averages_note(names, {"task": {"background": getattr(model.task, "background", True)}})
    lines += [("", note)] if note else []
    for label, text in lines:
        table.add_row(Text(label), Text(text))
    return table


def _central_lines(found: RunMetrics, client: str | None) -> Iterator[tuple[str, str]]:
    """Yield the metrics on all test images; of a client's own model those on its own examples first."""
    of_all = ", ".join(_scores(found.metrics))
    if client is None or not found.own:
        yield "central", of_all or "none: each client has a model of its own"
        return
    if found.of_client is not None:
        what = "test images" if found.of_client.tested else "held-out images"
        rows = found.of_client.rows
        own = ", ".join(_scores({n: v for n, v in rows[0].items() if n not in IDENTITY})) if rows else "none"
        yield f"own {what} of {client}", own
    yield "test images of all", of_all


def _client_lines(clients: ClientMetrics, whose: str) -> Iterator[tuple[str, str]]:
    where = "the data that each held out" if clients.held_out else "the training examples of each"
    where = "its own part of the test data each" if clients.tested else where
    if clients.personalized:
        whose = f"each client's own model of round {clients.states_round}"
    yield "clients", f"{len(clients.rows):,}, on {where}, with {whose}"
    if clients.judged is not None:
        metric, spread = Metric(f"eval/{clients.judged}"), clients.spread
        mean, worst, best, deviation = (metric.text(spread[statistic]) for statistic in SPREAD)
        label = metric.label.removeprefix("test ")
        yield "", f"{label}: mean {mean}, worst tenth {worst}, best tenth {best}, deviation {deviation}"


def _scores(metrics: Metrics) -> Iterator[str]:
    for name, value in metrics.items():
        if isinstance(value, int | float):
            yield f"{_label(name)} {Metric(name).text(value)}"


def _label(name: str) -> str:
    """Return what a metric is called, without a prefix; the loss may be of other data than the test's."""
    return Metric(f"eval/{name}").label.removeprefix("test ")


def per_class(metrics: Metrics, classes: int) -> dict[Metric, list[float | None]]:
    """Return the metrics that have a number for each of the `classes`."""
    return {
        class_metric(f"eval/{name}"): values
        for name, values in metrics.items()
        if isinstance(values, list) and len(values) == classes
    }


def _class_table(
    lists: Mapping[Metric, Sequence[float | None]],
    counts: Sequence[int] | None,
    counted: str,
    classes: Sequence[str],
    title: str,
) -> Table:
    """Return the classes below a `title`, with metrics, and examples or pixels where they were `counted`."""
    labels = list(range(len(classes)))
    first = next(iter(lists.values()))
    if len(labels) > MOST_CLASSES:
        labels = sorted(labels, key=lambda label: _sortable(first[label]))[:MOST_CLASSES]
        title += f" ({MOST_CLASSES} lowest of {len(classes)})"
    table = _table(title, *([counted] if counts else []), *(metric.label for metric in lists))
    for label in labels:
        count = [f"{counts[label]:,}"] if counts else []
        cells = (class_text(metric, values[label]) for metric, values in lists.items())
        _add(table, classes[label], *count, *cells)
    return table


def _sortable(value: float | None) -> float:
    return float("inf") if value is None else value


def _confusion_table(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> list[Table]:
    """Return the confusion matrix, 0 left blank; nothing where it is too large for a terminal.

    Columns have the classes' numbers where their names do not fit; the rows have both then.
    """
    from rich.console import Console
    from rich.text import Text

    if len(classes) > MOST_IN_MATRIX:
        return []
    numbers = list(map(str, range(len(classes))))
    both = [f"{number} {name}" for number, name in zip(numbers, classes, strict=True)]
    for rows, columns in ((classes, classes), (both, numbers)):
        table = _table("true \\ predicted")
        for name in columns:
            table.add_column(Text(name), justify="right")
        for true, row in enumerate(counts):
            cells = (
                Text(f"{count:,}" if count else "", "bold" if predicted == true else "")
                for predicted, count in enumerate(row)
            )
            table.add_row(Text(rows[true]), *cells)
        if Console(width=1000).measure(table).maximum <= WIDTH:
            return [table]
    return []


def _client_table(rows: Sequence[Metrics]) -> Table:
    every = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in every if name not in (*IDENTITY, "accuracy_top5")]
    judged = judged_by([{f"eval/{name}": row.get(name) for name in names} for row in rows])
    name, sign = ("loss", -1) if judged is None else (judged.bare, judged.sign)

    def rank(row: Metrics) -> tuple[float, float]:
        value = row.get(name)
        return (float("-inf") if value is None else sign * value), -(row.get("loss") or 0.0)

    ranked = sorted(rows, key=rank)
    shown, title = ranked, "client"
    if len(ranked) > 2 * MOST_CLIENTS:
        shown = [*ranked[:MOST_CLIENTS], {}, *ranked[-MOST_CLIENTS:]]
        title = f"client ({MOST_CLIENTS} worst, {MOST_CLIENTS} best)"
    table = _table(title, "examples", *map(_label, names))
    for row in shown:
        cells = ["–" if row.get(n) is None else Metric(n).text(row[n]) for n in names if row]
        who = str(row.get("name", row.get("client")))
        _add(table, *([who, f"{row['examples']:,}", *cells] if row else ["..."]))
    return table


def _add(table: Table, *cells: str) -> None:
    """Add a row of cells that are shown as they are: a name may look like markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _table(first: str, *others: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(Text(title), justify="left" if title == "predicted" else "right")
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
