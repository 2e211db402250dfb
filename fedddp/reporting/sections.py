"""Sections of a report on what was learned: metrics, clients, classes, data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from fedddp.evaluation import IDENTITY
from fedddp.reporting.classes import MOST_POINTS, class_name, class_table, over_rounds, thin
from fedddp.reporting.curves import AXES, Floats, is_number, series, steps
from fedddp.reporting.figures import (
    SIZE,
    Chart,
    Line,
    chart,
    colour_of,
    curves,
    heat,
    name_ticks,
    scale_axis,
    tall,
)
from fedddp.reporting.gallery import gallery
from fedddp.reporting.page import PageSection, html_table
from fedddp.reporting.runs import RunFiles, judged_runs
from fedddp.reporting.split_figures import caption, confusion, holdings, sizes
from fedddp.storage.client_rows import client_table, last_round, named
from fedddp.storage.examined import Examined
from fedddp.storage.history import Metric, capital, judged_by, number
from fedddp.storage.judged import averages_note, best_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 100
"""Rows of a matrix of clients."""


def metric_lines(
    runs: Sequence[RunFiles], names: Sequence[str], key: str, axis: str, factor: float
) -> list[Line]:
    """Return a metric of every run that has it, times `factor`, over an axis."""
    lines = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        measured, values = series(run.rows, key)
        kept = thin(len(measured))
        x = np.cumsum(steps(run.rows)[axis])[measured][kept]
        lines += [Line(index, name, x, factor * values[kept])] if len(measured) else []
    return lines


def learning(runs: Sequence[RunFiles], names: Sequence[str]) -> PageSection:
    """Return the metrics of the model over rounds, examples, bytes and time."""
    scalars = {key for run in runs for row in run.rows for key, value in row.items() if is_number(value)}
    others = sorted(key for key in scalars if key.startswith("eval/"))
    judged = [metric.key for metric in judged_runs(runs) if metric]
    tested = [metric.key for run in runs if (metric := judged_by(run.rows))]
    first = list(dict.fromkeys([*judged, *tested, "eval/loss", "train/loss"]))
    titles = {"train/loss": "Training loss", "eval/accuracy_top5": "Top-5 accuracy"}
    titles |= {key: Metric(key).title for key in (*judged, *tested, "eval/loss")}
    blocks: list[Chart | str] = []
    for key in [*first, *(key for key in others if key not in first)]:
        metric = Metric(key)
        for axis in AXES:
            lines = metric_lines(runs, names, key, axis, metric.factor)
            if not any(np.isfinite(line.x).all() for line in lines):
                continue
            title = capital(titles.get(key, metric.heading.replace("_", " ")))
            named = title == metric.label  # IoU, Dice: with a capital
            label = (title if named else title[0].lower() + title[1:]) + " in %" * metric.in_percent

            def draw(axes: Axes, lines: list[Line] = lines, axis: str = axis, label: str = label) -> None:
                curves(axes, lines, axis, label)

            blocks.append(chart(f"{key} over {axis}", title, draw, axis=axis))
    blocks += [block for index, run in enumerate(runs) for block in over_rounds(index, run)]
    notes = (averages_note({key.removeprefix("eval/") for key in scalars}, run.sections) for run in runs)
    blocks += [f'<p class="small">{escape(note)}</p>' for note in dict.fromkeys(notes) if note]
    for index, run in enumerate(runs):
        blocks += class_table(index, run, names)
    missing = "" if judged else "test accuracy: a task with an accuracy, and test data"
    return PageSection("Learning", blocks, missing)


def clients(runs: Sequence[RunFiles], names: Sequence[str]) -> PageSection:
    """Return how good the model is on the clients' own held-out data."""
    blocks: list[Chart | str] = []
    titles = {"mean": "Mean over clients", "worst10": "Worst 10 % of clients"}
    judged = [judged_on_clients(run) for run in runs]
    drawn = {metric.key for metric in judged_runs(runs) if metric}  # in the section on learning
    few = [
        one is not None and named(last_round(run.clients), one) for run, one in zip(runs, judged, strict=True)
    ]
    several = len(set(judged) - {None}) > 1
    for metric in dict.fromkeys(one for one in judged if one):
        for statistic, title in titles.items():
            key = metric.on_clients(statistic)
            if key in drawn or (statistic == "worst10" and all(few)):  # a tenth of few is one client
                continue
            lines = metric_lines(runs, names, key, "rounds", metric.factor)

            def draw(axes: Axes, lines: list[Line] = lines, metric: Metric = metric) -> None:
                curves(axes, lines, "rounds", on_clients(metric))

            shown = f"{title}: {metric.label}" if several else title
            blocks += [chart(f"clients {key.removeprefix('clients/')}", shown, draw)] if lines else []
    for index, (run, one) in enumerate(zip(runs, judged, strict=True)):
        blocks += _spread_over_clients(index, run, one) if one else []
    for index, (run, one) in enumerate(zip(runs, judged, strict=True)):
        if one is not None and few[index]:
            rows = last_round(run.clients)
            of = f" of {escape(names[index])}" if len(names) > 1 else ""
            heading = f"<h3>Clients{of} after round {rows[0]['round']:,}</h3>"
            table = html_table([[*line] for line in client_table(rows, one)], numbers=True)
            blocks.append(f'<div class="run-{index}">{heading}{table}</div>')
    missing = "" if blocks else "the accuracy of every client: data.holdout=0.2 and evaluation.clients"
    return PageSection("Clients", blocks, missing)


def judged_on_clients(run: RunFiles) -> Metric | None:
    """Return the metric that the clients of a run are judged by; None where none was measured."""
    shared = ("round", *IDENTITY)
    rows = [{f"eval/{n}": v for n, v in row.items() if n not in shared} for row in run.clients]
    metric = judged_by(run.rows, best_of(run.sections))
    if metric is not None and metric.of_clients:
        return Metric(f"eval/{metric.bare}")
    has = metric is not None and any(number(row, metric.key) is not None for row in rows)
    if has or any(metric and metric.on_clients("mean") in row for row in run.rows):
        return metric
    return judged_by(rows)


def on_clients(metric: Metric) -> str:
    """Return the title of an axis of a metric of clients, whose data are no test data."""
    return metric.axis.removeprefix("test ")


def _scores(run: RunFiles, name: str) -> tuple[list[int], list[int], Floats]:
    """Return rounds, clients, and the score of each client in each of the rounds; NaN where unknown."""
    known = [row for row in run.clients if is_number(row.get(name)) and type(row.get("client")) is int]
    rounds = sorted({row["round"] for row in known})
    who = sorted({row["client"] for row in known})
    matrix = np.full((len(who), len(rounds)), np.nan)
    columns, lines = {r: i for i, r in enumerate(rounds)}, {c: i for i, c in enumerate(who)}
    for row in known:
        matrix[lines[row["client"]], columns[row["round"]]] = row[name]
    kept = thin(len(rounds))
    return [rounds[i] for i in kept], who, matrix[:, kept]


def _spread_over_clients(index: int, run: RunFiles, metric: Metric) -> list[Chart]:
    rounds, who, matrix = _scores(run, metric.bare)
    if not who:
        return []
    names = {row["client"]: str(row["name"]) for row in run.clients if "client" in row and "name" in row}
    label = on_clients(metric)
    shares = metric.sign > 0 and bool(np.nanmax(matrix) <= 1 and np.nanmin(matrix) >= 0)
    limits = (-0.02 * metric.factor, 1.02 * metric.factor) if shares else None
    quantiles = metric.factor * np.nanquantile(matrix, (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0), axis=0)

    def distribution(axes: Axes) -> None:
        for low, high, alpha, share in ((0, 6, 0.12, "all"), (1, 5, 0.2, "80 %"), (2, 4, 0.35, "half")):
            style: dict[str, Any] = {"alpha": alpha, "linewidth": 0, "color": colour_of(index)}
            axes.fill_between(rounds, quantiles[low], quantiles[high], label=share, **style)
        colour = colour_of(index)
        axes.plot(rounds, quantiles[3], color=colour, label="median", gid=f"run:{index}:median")
        axes.set(xlabel="round", ylabel=label, ylim=limits)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)

    found = [chart(f"spread {index}", "Spread over clients", distribution, run=index)]
    title = f"{capital(metric.heading.removeprefix('Test '))} of each client"
    shown = list(range(len(who)))
    if len(who) > MOST_ROWS:
        last = [metric.sign * float(row[np.isfinite(row)][-1]) for row in matrix]
        by_score = np.argsort(last, kind="stable").tolist()
        shown = [*by_score[: MOST_ROWS // 2], *by_score[-MOST_ROWS // 2 :]]
        title += f" (the {MOST_ROWS // 2} worst and best at the end)"

    def table(axes: Axes) -> None:
        top = float(metric.factor) if shares else None
        heat(axes, metric.factor * matrix[shown], xlabel="round", ylabel="client", scale=label, top=top)
        name_ticks(axes, "y", [names.get(who[i], str(who[i])) for i in shown])
        name_ticks(axes, "x", [str(number) for number in rounds], most=8)

    return [*found, chart(f"clients {index}", title, table, tall(len(shown)), run=index)]


def data(runs: Sequence[RunFiles]) -> PageSection:
    """Return who holds which classes; once where all runs have the same split."""
    blocks: list[Chart | str] = []
    known = [(index, run.split, run.class_names) for index, run in enumerate(runs) if run.split is not None]
    same = len(known) == len(runs) and all(split == known[0][1] for _, split, _ in known)
    shown = known[:1] if same else known
    for index, split, labels in shown:
        opening = "<p>" if same else f'<p class="run-{index}">{escape(runs[index].name)}: '
        blocks.append(f"{opening}{escape(caption(split, labels))}.</p>")
    for index, split, labels in shown:
        about = None if same else index
        size = tall(len(split.shares))
        held = partial(holdings, split=split, names=labels)
        bars = partial(sizes, split=split, names=labels)
        blocks.append(chart(f"split {index}", "Examples by client and class", held, size, run=about))
        blocks.append(chart(f"sizes {index}", "Examples of each client, by class", bars, size, run=about))
    missing = "" if known else "the split of the data: runs of fedddp 0.1.0 or newer record it"
    return PageSection("Who holds which classes", blocks, missing)


def participation(runs: Sequence[RunFiles]) -> PageSection:
    """Return which clients took part in which rounds."""
    blocks: list[Chart | str] = []
    federated = [(index, run) for index, run in enumerate(runs) if run.settings.get("baseline") != "pooled"]
    for index, run in federated:
        blocks += _participation(index, run)
    missing = "cohorts: older runs, and those with secure_aggregation, do not record them"
    return PageSection("Participation", blocks, "" if blocks or not federated else missing)


def _participation(index: int, run: RunFiles) -> list[Chart]:
    lists = [row["cohort"] if isinstance(row.get("cohort"), list) else [] for row in run.rows]
    cohorts = [[client for client in cohort if type(client) is int and client >= 0] for cohort in lists]
    clients = run.settings.get("data.clients")
    population = max([clients if type(clients) is int else 0, *(1 + c for cohort in cohorts for c in cohort)])
    if not any(cohorts):
        return []
    times = np.bincount([client for cohort in cohorts for client in cohort], minlength=population)
    known = {share.client: share.label for share in run.split.shares} if run.split is not None else {}
    names = [known.get(client, str(client)) for client in range(population)]
    colour = colour_of(index)

    def counts(axes: Axes) -> None:
        few = population <= MOST_ROWS
        heights = times if few else np.bincount(times)
        axes.bar(np.arange(len(heights)), heights, color=colour)
        labels = ("client", "times in a cohort") if few else ("times in a cohort", "clients")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if few:
            name_ticks(axes, "x", names, most=20)
        scale_axis(axes, "rounds")
        axes.grid(visible=False, axis="x")

    per_column = -(-len(cohorts) // MOST_POINTS)

    def table(axes: Axes) -> None:
        matrix = np.zeros((population, -(-len(cohorts) // per_column)))
        for place, cohort in enumerate(cohorts):
            np.add.at(matrix[:, place // per_column], cohort, 1)
        heat(axes, matrix, xlabel="round", ylabel="client")
        name_ticks(axes, "y", names)
        name_ticks(axes, "x", [str(1 + per_column * column) for column in range(matrix.shape[1])], most=8)

    bars = chart(f"times {index}", "How often clients took part", counts, run=index)
    if population > MOST_ROWS:
        return [bars]
    return [chart(f"cohorts {index}", "Rounds of each client", table, tall(population), run=index), bars]


def mistakes(runs: Sequence[RunFiles]) -> PageSection:
    """Return the confusion matrix, and the images that are most wrong."""
    blocks: list[Chart | str] = []
    for index, run in enumerate(runs):
        if run.examined is None:
            continue
        if run.examined.confusion is not None:
            blocks.append(_confusion(index, run, run.examined))
        blocks += [gallery(index, run, run.examined)] if run.examined.wrong else []
    missing = "" if blocks else "the confusion matrix: it is written when a run with test data ends"
    if not blocks and all(run.alone for run in runs):
        missing = "the confusion matrix: it is of a global model, and each client has a model of its own here"
    return PageSection("Mistakes of the final model", blocks, missing)


def _confusion(index: int, run: RunFiles, examined: Examined) -> Chart:
    assert examined.confusion is not None
    counts = examined.confusion.astype(float)
    draw = partial(confusion, counts=counts, names=[class_name(run, label) for label in range(len(counts))])
    title = "Confusion matrix in pixels" if examined.target == "mask" else "Confusion matrix"
    return chart(f"confusion {index}", title, draw, (SIZE[0], 4.0), run=index)
