"""Figures: one style for pages, files and papers, and the panels that all of them share."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from fedddp.section import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#010203", "#8b6914")
"""Distinguishable by colour-blind readers too (Okabe and Ito, 2008); without yellow, faint on white."""

LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
"""The first two in turn, so that two curves on top of each other are both visible; then the others."""

INK, MUTED, GRID = "#1b1c1d", "#6e6f70", "#d8d9da"
"""Colours of text and axes, of what is less important, and of grids; a page replaces them in dark mode."""

THEMED = {INK: "ink", MUTED: "muted", GRID: "grid", **{colour: f"c{i}" for i, colour in enumerate(COLOURS)}}
"""Variables of the page's style sheet that replace the colours in its figures."""

SIZE = (4.0, 2.6)
"""Inches of a panel on a page: readable on a phone, three side by side on a screen."""

BOX = (0.17, 0.18, 0.8, 0.77)
"""Left, bottom, width and height of the axes of a panel of curves, as shares of its size."""

COLUMN, PAGE_WIDTH = 3.4, 7.0
"""Inches of one and of two columns of a paper."""

KINDS = ("pdf", "png", "svg")

Floats = NDArray[np.float64]
Draw = Callable[["Axes"], None]

LABELS = {
    "virtual s": "virtual time in s",
    "wall s": "wall time in s",
    "bytes": "bytes moved",
    "examples": "examples trained on",
}


@dataclass(frozen=True)
class Line:
    """One curve of a panel."""

    run: int
    """Position of its run, which decides the colour."""
    name: str
    x: Floats
    y: Floats
    std: Floats | None = None
    """Half the height of the band around it."""

    @property
    def style(self) -> dict[str, Any]:
        """Colour and dashes, as matplotlib takes them."""
        dashes = LINES[self.run % 2 + 2 * (self.run // len(COLOURS) % 2)]
        return {"color": colour_of(self.run), "linestyle": dashes}


@dataclass(frozen=True)
class Chart:
    """A figure of a page."""

    key: str
    """Unique on the page."""
    title: str
    content: str
    """SVG, or other HTML."""
    data: Mapping[str, Any] | None = None
    """What the page's script shows under the pointer."""
    run: int | None = None
    """The run it is about; None: it is about all."""
    axis: str | None = None
    """It is shown while this axis is chosen; None: always."""
    wide: bool = False
    """It takes the width of the page."""


def colour_of(run: int) -> str:
    """Return the colour of the run at that position."""
    return COLOURS[run % len(COLOURS)]


def style(size: float = 9.0) -> Any:
    """Return the settings of matplotlib for figures with text of `size` points."""
    return {
        "font.size": size,
        "axes.titlesize": size,
        "axes.labelsize": size,
        "xtick.labelsize": size - 1,
        "ytick.labelsize": size - 1,
        "legend.fontsize": size - 1,
        "figure.dpi": 72,
        "svg.fonttype": "path",
        "pdf.fonttype": 42,
        "path.simplify": False,
        "text.parse_math": False,  # names of runs and classes may hold any character
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.linewidth": 0.8,
        "lines.linewidth": 0.18 * size,
        "figure.constrained_layout.w_pad": 0.08,
        "legend.frameon": False,
        "image.interpolation": "none",
        "image.aspect": "auto",
        "image.composite_image": False,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
        ),
    }


def check_file(path: str | None, kinds: Sequence[str], key: str) -> Path | None:
    """Return the path of a file to write; None where none is wanted.

    Raises:
        ConfigError: its ending is none of `kinds`.
    """
    if path is None:
        return None
    if Path(path).suffix.removeprefix(".").lower() not in kinds:
        raise ConfigError(f"{key}={path}: must end in {', '.join(f'.{kind}' for kind in kinds)}; rename it")
    return Path(path)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` in the format of the file's ending; equal figures make equal files.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(figure, path.suffix.removeprefix(".").lower()))


def encode(figure: Figure, kind: str, dpi: float = 200, **settings: Any) -> bytes:
    """Return `figure` as a file of that `kind`, one of `KINDS`, with other `settings` of matplotlib."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    file = io.BytesIO()
    metadata: Any = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    chosen: Any = {**style(), "svg.hashsalt": "fedddp", **settings}
    with rc_context(chosen):
        if kind == "svg" and not isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
            canvas: Any = FigureCanvasSVG(figure)
            canvas.print_svg(file, metadata=metadata)  # `savefig` draws twice, for a layout
        else:
            figure.savefig(file, format=kind, metadata=metadata, dpi=dpi if kind == "png" else "figure")
    return file.getvalue()


# ---- figures of a page ----


def chart(key: str, title: str, draw: Draw, size: tuple[float, float] = SIZE, **about: Any) -> Chart:
    """Return the figure that `draw` draws, for a page; `about` are other fields of `Chart`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(style()):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        if not (axes.images or axes.patches or axes.get_legend()):
            figure.set_layout_engine("none")  # which takes as long as all the rest
            axes.set_position(BOX)
        # Text stays text, and no two figures share the names of their parts.
        names: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": f"fedddp {key}"}
        svg = encode(figure, "svg", **names).decode()
        data = _hover(axes, figure)
    return Chart(key, title, themed(svg, title), data, **about)


def themed(svg: str, title: str) -> str:
    """Return the `<svg>` element of a file, without what a page does not need, in the page's colours."""
    from html import escape

    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", svg))
    svg = re.sub(r' id="run:(\d+):[^"]*"', r' class="run-\1"', svg)
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    # The page's own font; no transforms that do nothing; a thousandth of a point is enough.
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", svg)
    svg = re.sub(r' font-family: [^;"]*;| transform="rotate\(-0 [^"]*\)"', "", svg)
    svg = re.sub(
        r"-?\d+\.\d{4,}(?!\d*e)", lambda found: f"{float(found[0]):.3f}".rstrip("0").rstrip("."), svg
    )
    for colour, name in THEMED.items():
        svg = svg.replace(colour, f"var(--{name})")
    head = r'<svg viewBox="\1" role="img" aria-label="' + escape(title).replace("\\", r"\\") + '">'
    svg = re.sub(r"<svg [^>]*viewBox=\"([^\"]*)\"[^>]*>", head, svg, count=1)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _hover(axes: Axes, figure: Figure) -> dict[str, Any] | None:
    """Return the box and limits of a panel, in the units of its SVG, and its curves; None: it has none."""
    box, height = axes.get_window_extent(), figure.bbox.height
    named = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    curves = [line for line in named if str(line.get_gid()).startswith("run:")]
    if not curves:
        return None
    return {
        "box": [round(float(v), 2) for v in (box.x0, height - box.y1, box.x1, height - box.y0)],
        "xlim": [float(v) for v in axes.get_xlim()],
        "ylim": [float(v) for v in axes.get_ylim()],
        "log": axes.get_xscale() == "log",
        "x": axes.get_xlabel(),
        "y": axes.get_ylabel(),
        "curves": [
            {
                "run": int(str(line.get_gid()).split(":")[1]),
                "name": str(line.get_label()).removeprefix("\u200b"),
                "x": _short(line.get_xdata()),
                "y": _short(line.get_ydata()),
            }
            for line in curves
        ],
    }


def _short(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in np.asarray(values, dtype=float)]


# ---- panels ----


def curves(
    axes: Axes, lines: Sequence[Line], axis: str, ylabel: str, target: tuple[float, str] | None = None
) -> None:
    """Draw lines over one axis, with their bands; logarithmic where they end far apart.

    Args:
        axes: where to draw.
        lines: those whose x is not known are left out.
        axis: what x is, one of `AXES`.
        ylabel: what y is.
        target: height of a dashed line, and its name.
    """
    shown = [line for line in lines if len(line.x) and np.isfinite(line.x).all()]
    for number, line in enumerate(shown):
        dots: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(line.x) < 3 else {}
        axes.plot(
            line.x, line.y, label=_label(line.name), gid=f"run:{line.run}:{number}", **dots, **line.style
        )
        if line.std is not None and line.std.any():
            low, high = line.y - line.std, line.y + line.std
            band = axes.fill_between(line.x, low, high, color=line.style["color"], alpha=0.18, linewidth=0)
            band.set_gid(f"run:{line.run}:{number} band")
    ends = [line.x[-1] for line in shown]
    starts = [line.x[line.x > 0].min(initial=np.inf) for line in shown]
    if ends and max(ends) > 8 * max(min(ends), 1e-9) and max(ends) > min(starts):
        axes.set_xscale("log")
    if target is not None:
        (height, label), dashes = target, (0, (4, 4))
        axes.axhline(height, color=MUTED, linewidth=0.8, linestyle=dashes, zorder=0, label=label)
    axes.set(xlabel=LABELS.get(axis, axis), ylabel=ylabel)
    scale_axis(axes, axis)


def _label(name: str) -> str:
    """Return a name that a legend shows: matplotlib hides those that begin with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


def scale_axis(axes: Axes, axis: str) -> None:
    """Write the ticks of x as bytes, thousands or whole rounds."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    if axis == "bytes":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_of(value)))
    elif axis == "examples":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis == "rounds"))
    else:
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        if axis not in ("bytes", "examples"):
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def size_of(count: float) -> str:
    """Return a number of bytes as "1.5 MB"."""
    return re.sub(r"\.0 ", " ", decimal(int(count), precision=1))


def stairs(axes: Axes, histograms: Sequence[tuple[int, str, NDArray[np.int64]]]) -> None:
    """Draw the share of arrivals by their staleness, for each (run, name, counts)."""
    from matplotlib import rcParams
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for run, name, counts in histograms:
        share = 100 * counts / max(counts.sum(), 1)
        drawn = axes.stairs(share, np.arange(len(share) + 1) - 0.5, **Line(run, name, share, share).style)
        drawn.set(gid=f"run:{run}:0", linewidth=rcParams["lines.linewidth"], label=_label(name))
    axes.set(xlabel="staleness in server versions", ylabel="% of arrivals")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if max((len(counts) for *_, counts in histograms), default=0) > 20:
        axes.set_xscale("symlog", linthresh=10)  # many arrive soon, a straggler late
        axes.set_xlim(left=-0.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def idle_bars(axes: Axes, shares: Sequence[tuple[int, str, Floats]]) -> None:
    """Draw the share of the wall time in which groups were idle, for each (run, name, shares by group)."""
    for place, (run, _, share) in enumerate(shares):
        bars = axes.bar(place, 100 * share.mean(), color=colour_of(run), alpha=0.6, width=0.7)
        bars[0].set_gid(f"run:{run}:bar")
        dots: dict[str, Any] = {"color": INK, "markersize": 3.5, "linestyle": "none", "marker": "o"}
        axes.plot([place] * len(share), 100 * share, **dots)[0].set_gid(f"run:{run}:dots")
    axes.set(ylabel="idle in % (dots: groups)", ylim=(0, 100), xticks=[])
    axes.grid(visible=False, axis="x")


def heat(
    axes: Axes,
    matrix: Floats,
    *,
    xlabel: str,
    ylabel: str,
    scale: str | None = None,
    top: float | None = None,
) -> AxesImage:
    """Draw a matrix (rows, columns), its first row at the top; NaN is left blank.

    Args:
        axes: where to draw.
        matrix: numbers from 0.
        xlabel: what a column is.
        ylabel: what a row is.
        scale: label of a colour bar; None: no bar. Numbers with a bar are shown from dark to yellow, others
            from clear to blue.
        top: the number with the full colour; by default the largest.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    largest = float(np.nanmax(matrix, initial=0.0)) if top is None else top
    clear = LinearSegmentedColormap.from_list("clear", [(0.12, 0.47, 0.83, 0.0), (0.12, 0.47, 0.83, 1.0)])
    colours = clear if scale is None else colormaps["viridis"]
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap=colours, vmin=0.0, vmax=largest or 1.0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(visible=False)
    if scale is not None:
        bar = axes.figure.colorbar(image, ax=axes, label=scale, pad=0.02)
        bar.outline.set_visible(False)
    return image


def shorten(name: str) -> str:
    """Return a name of at most 13 letters: its beginning and its end, where names of classes differ."""
    return name if len(name) <= 13 else f"{name[:6]}…{name[-5:]}"


def tall(rows: int) -> tuple[float, float]:
    """Return the size of a figure with a line of text for each of `rows`, up to a limit."""
    return SIZE[0], min(max(SIZE[1], 0.13 * rows + 0.7), 5.0)


def name_ticks(axes: Axes, which: str, names: Sequence[str], most: int = 24) -> None:
    """Name the cells along the "x" or "y" axis of a matrix: all of them, or every n-th so that they fit."""
    every = -(-len(names) // most)
    places = list(range(0, len(names), every))
    short = [shorten(names[place]) for place in places]
    turned = {"rotation": 90} if which == "x" and max(map(len, short), default=0) > 3 else {}
    getattr(axes, f"set_{which}ticks")(places, short, **turned)
