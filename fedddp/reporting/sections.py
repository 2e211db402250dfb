"""Sections of a report on what was learned: metrics, clients, classes, data."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

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
from fedddp.reporting.page import PageSection
from fedddp.reporting.runs import Examined, RunFiles
from fedddp.reporting.split_figures import caption, confusion, holdings, sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 500
"""Points of a curve that are drawn; of a longer one every n-th."""

MOST_ROWS = 100
"""Rows of a matrix of clients."""

IMAGE_SIDE = 112
"""Pixels to which larger images are reduced."""


def thin(count: int) -> Sequence[int]:
    """Return the positions of at most `MOST_POINTS` + 1 of `count` points, evenly spaced, with the last."""
    every = -(-count // MOST_POINTS)
    return [*range(0, max(count - 1, 0), every or 1), *([count - 1] if count else [])]


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
    first = ["eval/accuracy", "eval/loss", "train/loss"]
    titles = {"eval/accuracy": "Test accuracy", "eval/loss": "Test loss", "train/loss": "Training loss"}
    titles["eval/accuracy_top5"] = "Top-5 accuracy"
    blocks: list[Chart | str] = []
    for key in [*first, *(key for key in others if key not in first)]:
        share = "accuracy" in key
        for axis in AXES:
            lines = metric_lines(runs, names, key, axis, 100 if share else 1)
            if not any(np.isfinite(line.x).all() for line in lines):
                continue
            title = titles.get(key, key.removeprefix("eval/").replace("_", " ").capitalize())
            label = f"{title[0].lower()}{title[1:]}{' in %' if share else ''}"

            def draw(axes: Axes, lines: list[Line] = lines, axis: str = axis, label: str = label) -> None:
                curves(axes, lines, axis, label)

            blocks.append(chart(f"{key} over {axis}", title, draw, axis=axis))
    blocks += [block for index, run in enumerate(runs) for block in _recall(index, run)]
    missing = "" if "eval/accuracy" in scalars else "test accuracy: a task with an accuracy, and test data"
    return PageSection("Learning", blocks, missing)


def _recall(index: int, run: RunFiles) -> list[Chart]:
    """Return the recall of every class over rounds."""
    measured = [row for row in run.rows if isinstance(row.get("eval/recall"), list) and row["eval/recall"]]
    classes = {len(row["eval/recall"]) for row in measured}
    if len(classes) != 1 or len(measured) < 2:
        return []
    kept = [measured[i] for i in thin(len(measured))]
    recall = np.array([[float(v) if is_number(v) else np.nan for v in row["eval/recall"]] for row in kept]).T
    labels = run.class_names if len(run.class_names) == len(recall) else [str(i) for i in range(len(recall))]

    def draw(axes: Axes) -> None:
        heat(axes, 100 * recall, xlabel="round", ylabel="class", scale="recall in %", top=100.0)
        name_ticks(axes, "y", labels)
        name_ticks(axes, "x", [str(row["round"]) for row in kept], most=8)

    return [chart(f"recall {index}", "Recall of each class", draw, run=index)]


def clients(runs: Sequence[RunFiles], names: Sequence[str]) -> PageSection:
    """Return how accurate the model is on the clients' own held-out data."""
    blocks: list[Chart | str] = []
    titles = {"accuracy_mean": "Mean over clients", "accuracy_worst10": "Worst 10 % of clients"}
    for key, title in titles.items():
        lines = metric_lines(runs, names, f"clients/{key}", "rounds", 100)

        def draw(axes: Axes, lines: list[Line] = lines) -> None:
            curves(axes, lines, "rounds", "accuracy in %")

        blocks += [chart(f"clients {key}", title, draw)] if lines else []
    for index, run in enumerate(runs):
        blocks += _spread_over_clients(index, run)
    missing = "" if blocks else "the accuracy of every client: data.holdout=0.2 and evaluation.clients"
    return PageSection("Clients", blocks, missing)


def _accuracies(run: RunFiles) -> tuple[list[int], list[int], Floats]:
    """Return rounds, clients, and the accuracy of each client in each of the rounds; NaN where unknown."""
    known = [row for row in run.clients if is_number(row.get("accuracy")) and type(row.get("client")) is int]
    rounds = sorted({row["round"] for row in known})
    who = sorted({row["client"] for row in known})
    matrix = np.full((len(who), len(rounds)), np.nan)
    columns, lines = {r: i for i, r in enumerate(rounds)}, {c: i for i, c in enumerate(who)}
    for row in known:
        matrix[lines[row["client"]], columns[row["round"]]] = row["accuracy"]
    kept = thin(len(rounds))
    return [rounds[i] for i in kept], who, matrix[:, kept]


def _spread_over_clients(index: int, run: RunFiles) -> list[Chart]:
    rounds, who, matrix = _accuracies(run)
    if not who:
        return []
    quantiles = 100 * np.nanquantile(matrix, (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0), axis=0)

    def distribution(axes: Axes) -> None:
        for low, high, alpha, label in ((0, 6, 0.12, "all"), (1, 5, 0.2, "80 %"), (2, 4, 0.35, "half")):
            style: dict[str, Any] = {"alpha": alpha, "linewidth": 0, "color": colour_of(index)}
            axes.fill_between(rounds, quantiles[low], quantiles[high], label=label, **style)
        colour = colour_of(index)
        axes.plot(rounds, quantiles[3], color=colour, label="median", gid=f"run:{index}:median")
        axes.set(xlabel="round", ylabel="accuracy in %", ylim=(-2, 102))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)

    found = [chart(f"spread {index}", "Spread over clients", distribution, run=index)]
    title, shown = "Accuracy of each client", list(range(len(who)))
    if len(who) > MOST_ROWS:
        last = [float(row[np.isfinite(row)][-1]) for row in matrix]
        by_accuracy = np.argsort(last, kind="stable").tolist()
        shown = [*by_accuracy[: MOST_ROWS // 2], *by_accuracy[-MOST_ROWS // 2 :]]
        title += f" (the {MOST_ROWS // 2} worst and best at the end)"

    def table(axes: Axes) -> None:
        heat(axes, 100 * matrix[shown], xlabel="round", ylabel="client", scale="accuracy in %", top=100.0)
        name_ticks(axes, "y", [str(who[i]) for i in shown])
        name_ticks(axes, "x", [str(number) for number in rounds], most=8)

    return [*found, chart(f"clients {index}", title, table, tall(len(shown)), run=index)]


def data(runs: Sequence[RunFiles]) -> PageSection:
    """Return who holds which classes; once where all runs have the same split."""
    blocks: list[Chart | str] = []
    known = [(index, run.split, run.class_names) for index, run in enumerate(runs) if run.split is not None]
    same = len(known) == len(runs) and all(split == known[0][1] for _, split, _ in known)
    shown = known[:1] if same else known
    for index, split, _ in shown:
        opening = "<p>" if same else f'<p class="run-{index}">{escape(runs[index].name)}: '
        blocks.append(f"{opening}{escape(caption(split))}.</p>")
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
    for index, run in enumerate(runs):
        blocks += _participation(index, run)
    return PageSection("Participation", blocks, "" if blocks else "cohorts: older runs did not record them")


def _participation(index: int, run: RunFiles) -> list[Chart]:
    lists = [row["cohort"] if isinstance(row.get("cohort"), list) else [] for row in run.rows]
    cohorts = [[client for client in cohort if type(client) is int and client >= 0] for cohort in lists]
    clients = run.settings.get("data.clients")
    population = max([clients if type(clients) is int else 0, *(1 + c for cohort in cohorts for c in cohort)])
    if not any(cohorts):
        return []
    times = np.bincount([client for cohort in cohorts for client in cohort], minlength=population)
    colour = colour_of(index)

    def counts(axes: Axes) -> None:
        few = population <= MOST_ROWS
        heights = times if few else np.bincount(times)
        axes.bar(np.arange(len(heights)), heights, color=colour)
        labels = ("client", "times in a cohort") if few else ("times in a cohort", "clients")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        scale_axis(axes, "rounds")
        axes.grid(visible=False, axis="x")

    per_column = -(-len(cohorts) // MOST_POINTS)

    def table(axes: Axes) -> None:
        matrix = np.zeros((population, -(-len(cohorts) // per_column)))
        for number, cohort in enumerate(cohorts):
            np.add.at(matrix[:, number // per_column], cohort, 1)
        heat(axes, matrix, xlabel="round", ylabel="client")
        name_ticks(axes, "y", [str(client) for client in range(population)])
        name_ticks(axes, "x", [str(1 + per_column * column) for column in range(matrix.shape[1])], most=8)

    bars = chart(f"times {index}", "How often clients took part", counts, run=index)
    if population > MOST_ROWS:
        return [bars]
    return [chart(f"cohorts {index}", "Rounds of each client", table, tall(population), run=index), bars]


def mistakes(runs: Sequence[RunFiles]) -> PageSection:
    """Return the confusion matrix, and the images that are wrong with the highest probability."""
    blocks: list[Chart | str] = []
    for index, run in enumerate(runs):
        if run.examined is None:
            continue
        if run.examined.confusion is not None:
            blocks.append(_confusion(index, run, run.examined.confusion.astype(float)))
        blocks += [_gallery(index, run, run.examined)] if run.examined.wrong else []
    missing = "" if blocks else "the confusion matrix: it is written when a run with test data ends"
    return PageSection("Mistakes of the final model", blocks, missing)


def _confusion(index: int, run: RunFiles, counts: Floats) -> Chart:
    draw = partial(confusion, counts=counts, names=[class_name(run, label) for label in range(len(counts))])
    return chart(f"confusion {index}", "Confusion matrix", draw, (SIZE[0], 4.0), run=index)


def class_name(run: RunFiles, label: int) -> str:
    """Return the name of a class, its number where it has none."""
    return run.class_names[label] if label < len(run.class_names) else str(label)


def _gallery(index: int, run: RunFiles, examined: Examined) -> Chart:
    """Return the wrongly classified images."""
    items = []
    for number, one in enumerate(examined.wrong):
        true, predicted = (escape(class_name(run, one[key])) for key in ("label", "predicted"))
        words = f"{true} → <b>{predicted}</b><br>{100 * one['probability']:.0f} %"
        picture = (
            "" if examined.images is None else _picture(examined.images[number], f"{true} as {predicted}")
        )
        items.append(f"<li>{picture}<span>{words}</span></li>")
    title = "Wrong with the highest probability: true class → predicted class"
    content = f'<ul class="gallery">{"".join(items)}</ul>'
    return Chart(f"wrong {index}", title, content, run=index, wide=True)


def _picture(image: np.ndarray, alternative: str) -> str:
    from PIL import Image

    pixels = np.moveaxis(image, 0, -1)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] != 3 else pixels)
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    source = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{alternative}" src="data:image/png;base64,{source}">'
