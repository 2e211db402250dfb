"""Reports: in a real browser, and against the numbers of the runs they are of."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browser import Browser, Tags, find_chromium
from numpy.typing import NDArray
from PIL import Image

from fedddp import ConfigError
from fedddp.cli import main
from fedddp.data.partition import Dirichlet
from fedddp.reporting.classes import thin
from fedddp.reporting.execution import _timeline, defaults_of, phase_seconds
from fedddp.reporting.report import default_folder, write_report

SMALL = (
    "--data.examples 300 --data.clients 6 --cohort.size 3 --model.name 2nn --local.epochs 1 --rounds 4 "
    "--tracking.trackers [] --tracking.progress false"
)
HOSTILE = "<img src=x onerror=alert(1)>&\"'$x_y$"
HOSTILE_CLASS = "</script><script>document.title='broken'</script>$^_{"


def run(folder: Path, arguments: str) -> Path:
    with pytest.raises(SystemExit) as ended:
        main(f"run {arguments} {SMALL} --output {folder.parent} --name {folder.name}".split())
    assert ended.value.code == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a run with everything that a report shows, and an asynchronous one with hostile names."""
    folder = tmp_path_factory.mktemp("runs")
    full = run(folder / "full", "digits --data.holdout 0.2 --evaluation.clients 6")
    with (full / "run.log").open("a") as log:
        log.write("2026-01-02 03:04:05 WARNING client 3 <b>sent</b> NaN\n2026-01-02 03:04:06 INFO fine\n")
    other = run(folder / "other", "digits-fedbuff --clock.in_flight 3 --algorithm.buffer_size 2")
    split = json.loads((other / "split.json").read_text())
    split["class_names"] = [HOSTILE_CLASS, *split["class_names"][1:]]
    (other / "split.json").write_text(json.dumps(split))
    return full, other.rename(folder / HOSTILE)


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of both runs."""
    return write_report(runs, tmp_path_factory.mktemp("page") / "both.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield one browser for all tests."""
    started = Browser()
    yield started
    started.close()


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def figure(text: str, title: str, run: int | None = None, axis: str | None = None) -> str:
    """Return the HTML of the figure with that title."""
    for found in re.finditer(
        r"<figure class=\"([^\"]*)\"([^>]*)><figcaption>([^<]*).*?</figure>", text, re.DOTALL
    ):
        kinds, about, caption = found[1].split(), found[2], found[3].strip()
        of_run = run is None or f"run-{run}" in kinds
        if caption == title and of_run and (axis is None or f'data-axis="{axis}"' in about):
            return found[0]
    raise AssertionError(f"no figure {title}")


def charts(text: str) -> Any:
    """Return the numbers that the page's script has."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


# ---- in a browser ----


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
def test_the_page_renders_without_errors_and_loads_nothing(
    browser: Browser, page: Path, width: int, theme: str
) -> None:
    browser.open(page, width=width, theme=theme)
    assert browser.problems() == []
    assert browser.overflow() == 0
    assert browser.run("document.title") == "Report: 2 runs"
    cards = browser.run(
        "[...document.querySelectorAll('figure.card')].filter(c => !c.hidden)"
        ".map(c => [c.getBoundingClientRect().left, c.getBoundingClientRect().width])"
    )
    assert len(cards) > 20
    columns = len({left for left, _ in cards})
    assert columns == (1 if width == 390 else 3)
    assert all(card_width >= 340 for _, card_width in cards)
    smallest = browser.run(
        "Math.min(...[...document.querySelectorAll('figure:not([hidden]) svg text')]"
        ".map(t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getBoundingClientRect().width"
        " / t.ownerSVGElement.viewBox.baseVal.width))"
    )
    assert smallest >= 7, "pixels of the smallest text"
    picture = Image.open(io.BytesIO(browser.screenshot())).convert("L")
    assert (picture.getpixel((2, 2)) > 200) == (theme == "light")  # type: ignore[operator]
    assert len(picture.getcolors() or []) > 20


def test_the_checks_of_the_page_can_fail(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<div style='width: 5000px'>wide</div><img src='missing.png'><script>console.error('one');"
        "throw new Error('two');</script>"
    )
    browser.open(bad, width=390)
    problems = " ".join(browser.problems())
    for part in ("console: ", "'one'", "threw: ", "request: ", "missing.png", "log: "):
        assert part in problems
    assert browser.overflow() > 1000


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_curves_stand_out_from_the_paper(browser: Browser, page: Path, theme: str) -> None:
    browser.open(page, theme=theme)
    colours = browser.run(
        "(() => { const card = document.querySelector('figure.card'), c = getComputedStyle;"
        "const text = [...card.querySelectorAll('svg text')].map(t => c(t).fill);"
        "const lines = [...card.querySelectorAll('g.run-0 path, g.run-1 path')].map(p => c(p).stroke);"
        "return {paper: c(card).backgroundColor, text: [...new Set(text)], lines: [...new Set(lines)]}; })()"
    )

    def luminance(colour: str) -> float:
        channels = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(colour: str) -> float:
        low, high = sorted((luminance(colour), luminance(colours["paper"])))
        return (high + 0.05) / (low + 0.05)

    assert len(colours["lines"]) == 2
    assert all(contrast(colour) > 7 for colour in colours["text"])
    assert all(contrast(colour) > 3 for colour in colours["lines"]), "as WCAG asks of graphics"


def test_without_a_browser_the_tests_are_skipped_unless_one_is_required() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("FEDDDP_REQUIRE_CHROMIUM", raising=False)
        with pytest.raises(pytest.skip.Exception, match="install the package chromium"):
            find_chromium()
        patch.setenv("FEDDDP_REQUIRE_CHROMIUM", "1")
        with pytest.raises(pytest.fail.Exception, match="CHROMIUM=1, but there is no chromium"):
            find_chromium()


SHOWN = "(s) => [...document.querySelectorAll(s)].filter(e => e.getBoundingClientRect().width > 0).length"


def test_runs_are_hidden_and_shown_and_the_axis_is_switched(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run(f"({SHOWN})('.run-0')") > 0
    browser.run("document.querySelectorAll('input[name=run]')[0].click()")
    assert browser.run(f"({SHOWN})('.run-0')") == 0
    assert browser.run(f"({SHOWN})('.run-1')") > 0
    browser.run("document.querySelector('input[name=axis][value=bytes]').click()")
    shown = (
        "[...document.querySelectorAll('figure[data-axis]')].filter(f => !f.hidden).map(f => f.dataset.axis)"
    )
    assert set(browser.run(shown)) == {"bytes"}
    state = browser.run("location.hash.slice(1)")
    assert state == "axis=bytes&hide=0"
    browser.open(page, state=state)
    assert browser.run(f"({SHOWN})('.run-0')") == 0, "the address holds what is shown"
    assert set(browser.run(shown)) == {"bytes"}
    browser.run("document.querySelectorAll('input[name=run]')[0].click()")
    assert browser.run(f"({SHOWN})('.run-0')") > 0
    assert browser.problems() == []


def test_the_numbers_under_the_pointer_are_those_of_the_history(
    browser: Browser, page: Path, runs: tuple[Path, Path]
) -> None:
    browser.open(page)
    points = browser.run(
        "(() => { const g = document.querySelector('figure.card svg g.run-0 path'), m = g.getScreenCTM();"
        "return g.getAttribute('d').match(/[-\\d.]+ [-\\d.]+/g)"
        ".map(p => { const [x, y] = p.split(' ').map(Number);"
        "const q = new DOMPoint(x, y).matrixTransform(m); return [q.x, q.y]; }); })()"
    )
    for number, (x, y) in enumerate(points, 1):
        browser.mouse(x, y)
        lines = browser.run("[...document.querySelectorAll('#tip > div')].map(d => d.textContent)")
        for line, folder in zip(lines, runs, strict=True):
            accuracy = 100 * history(folder)[number - 1]["eval/accuracy"]
            name, value, at = re.fullmatch(r"(.*): ([\d.]+) at (\d+)", line).groups()  # type: ignore[union-attr]
            assert (name, int(at)) == (folder.name, number)
            assert float(value) == pytest.approx(accuracy, rel=1e-4)
    assert not browser.run("document.getElementById('tip').hidden")
    browser.mouse(5, 5)
    assert browser.run("document.getElementById('tip').hidden")


# ---- against the runs ----


def drawn(html: str, run: int) -> NDArray[np.float64]:
    """Return the points of a run's curve, (n, 2), read off the ticks of the figure as a reader would."""
    scales = []
    for anchor, which in (("middle", 0), ("end", 1)):
        ticks = re.findall(
            rf'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)"[^>]*/>\s*</g>\s*</g>\s*<g>\s*'
            rf"<text style=\"[^\"]*text-anchor: {anchor};[^>]*>([^<]*)</text>",
            html,
        )
        assert len(ticks) >= 2
        places = [float(tick[which]) for tick in ticks]
        scales.append(np.polyfit(places, [float(tick[2].replace("−", "-")) for tick in ticks], 1))
    found = re.search(rf'<g class="run-{run}">\s*<path d="([^"]*)"', html)
    assert found
    points = np.array([[float(n) for n in p] for p in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", found[1])])
    return np.stack([np.polyval(scales[0], points[:, 0]), np.polyval(scales[1], points[:, 1])], axis=1)


@pytest.mark.parametrize(
    ("title", "key", "factor"),
    [
        ("Test accuracy", "eval/accuracy", 100),
        ("Test loss", "eval/loss", 1),
        ("Training loss", "train/loss", 1),
    ],
)
def test_the_curves_are_drawn_where_the_history_has_them(
    page: Path, runs: tuple[Path, Path], title: str, key: str, factor: float
) -> None:
    text = page.read_text()
    for index, folder in enumerate(runs):
        rows = history(folder)
        points = drawn(figure(text, title, axis="rounds"), index)
        np.testing.assert_allclose(points[:, 0], [row["round"] for row in rows], atol=0.01)
        wanted = [factor * row[key] for row in rows]
        np.testing.assert_allclose(points[:, 1], wanted, atol=2e-3 * max(wanted))


def test_the_axes_are_sums_over_the_history(page: Path, runs: tuple[Path, Path]) -> None:
    text, rows = page.read_text(), history(runs[0])
    seconds = [
        row["time/round"] - row.get("time/evaluate", 0) - row.get("time/checkpoint", 0) for row in rows
    ]
    wanted = {
        "examples": [row["train/examples"] for row in rows],
        "bytes": [row["bytes/up"] + row["bytes/down"] for row in rows],
        "virtual s": [row["time/virtual"] for row in rows],
        "wall s": seconds,
    }
    for axis, steps in wanted.items():
        curve = charts(text)[f"eval/loss over {axis}"]["curves"][0]
        np.testing.assert_allclose(curve["x"], np.cumsum(steps), rtol=1e-5)
        np.testing.assert_allclose(curve["y"], [row["eval/loss"] for row in rows], rtol=1e-5)
    up = charts(text)["bytes up"]["curves"][0]["y"]
    np.testing.assert_allclose(up, np.cumsum([row["bytes/up"] for row in rows]), rtol=1e-5)


def pixels(html: str) -> NDArray[np.float64]:
    """Return the picture of a matrix as red, green, blue and opacity of every cell, from 0 to 1."""
    source = re.search(r'xlink:href="data:image/png;base64,([^"]*)"', html)
    assert source
    picture = Image.open(io.BytesIO(base64.b64decode(source[1])))
    return np.asarray(picture.convert("RGBA")) / 255


def test_the_matrices_are_those_of_the_run(page: Path, runs: tuple[Path, Path]) -> None:
    text, rows = page.read_text(), history(runs[0])
    taking_part = np.zeros((6, 4))
    for column, row in enumerate(rows):
        taking_part[row["cohort"], column] = 1
    np.testing.assert_array_equal(pixels(figure(text, "Rounds of each client", 0))[..., 3], taking_part)
    confusion = np.array(json.loads((runs[0] / "evaluation.json").read_text())["confusion"])
    shares = confusion / confusion.sum(1, keepdims=True)
    opacity = pixels(figure(text, "Confusion matrix", 0))[..., 3]
    np.testing.assert_allclose(opacity, shares / shares.max(), atol=0.01)
    split = json.loads((runs[1] / "split.json").read_text())
    counts = np.array([share["histogram"] for share in split["shares"]])
    held = pixels(figure(text, "Examples by client and class", 1))[..., 3]
    np.testing.assert_allclose(held, counts / counts.max(), atol=0.01)


def test_the_accuracy_of_each_client_has_the_colours_of_its_scale(
    page: Path, runs: tuple[Path, Path]
) -> None:
    from matplotlib import colormaps

    lines = [json.loads(line) for line in (runs[0] / "clients.jsonl").read_text().splitlines()]
    cells = pixels(figure(page.read_text(), "Accuracy of each client", 0))
    seen = sorted({line["client"] for line in lines})
    for line in lines:
        colour = colormaps["viridis"](line["accuracy"])
        np.testing.assert_allclose(cells[seen.index(line["client"]), line["round"] - 1], colour, atol=0.02)


def test_the_median_client_is_that_of_the_clients(page: Path, runs: tuple[Path, Path]) -> None:
    lines = [json.loads(line) for line in (runs[0] / "clients.jsonl").read_text().splitlines()]
    medians = [np.median([line["accuracy"] for line in lines if line["round"] == r]) for r in range(1, 5)]
    (curve,) = charts(page.read_text())["spread 0"]["curves"]
    np.testing.assert_allclose(curve["y"], 100 * np.array(medians), rtol=1e-5)
    rows = history(runs[0])
    worst = charts(page.read_text())["clients accuracy_worst10"]["curves"][0]["y"]
    np.testing.assert_allclose(worst, [100 * row["clients/accuracy_worst10"] for row in rows], rtol=1e-5)


def test_wrong_images_stand_in_the_page_with_their_classes(page: Path, runs: tuple[Path, Path]) -> None:
    from safetensors.numpy import load_file

    text = page.read_text()
    title = "Wrong with the highest probability: true class → predicted class"
    items = re.findall(r"<li>(.*?)</li>", figure(text, title, 0))
    wrong = json.loads((runs[0] / "evaluation.json").read_text())["wrong"]
    images = load_file(runs[0] / "wrong.safetensors")["images"]
    assert len(items) == len(wrong) > 0
    for item, one, image in zip(items, wrong, images, strict=True):
        words = f"{one['label']} → <b>{one['predicted']}</b><br>{100 * one['probability']:.0f} %"
        assert words in item
        source = re.search(r'src="data:image/png;base64,([^"]*)"', item)
        assert source
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(source[1]))))
        np.testing.assert_array_equal(picture, image[0])


def test_settings_launches_and_warnings_are_listed(page: Path, runs: tuple[Path, Path]) -> None:
    text = page.read_text()
    record = json.loads((runs[0] / "run.json").read_text())["sessions"][0]
    for field in ("command", "torch", "device", "started", "platform"):
        assert f"<td>{record[field]}</td>" in unescape(text).replace("&#x27;", "'")
    changed = text[text.index("Settings that are not the defaults") : text.index("All settings")]
    rows = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td>", changed))
    assert rows["data.holdout *"] == "0.0"
    assert rows["rounds"] == "10", "the default, beside the 4 of the runs"
    assert "<td>rounds</td><td>10</td><td>4</td><td>4</td>" in changed
    assert "<td>algorithm *</td><td>FedAvg</td><td>FedAvg</td><td>FedBuff</td>" in changed
    assert "data.root" not in rows, "it is the default in both"
    warnings = text[text.index("<h2>Warnings</h2>") : text.index("<h2>Configuration</h2>")]
    assert "<li>client 3 &lt;b&gt;sent&lt;/b&gt; NaN</li>" in warnings
    assert "fine" not in warnings


def setting_rows(text: str, part: str) -> dict[str, list[str]]:
    """Return the rows of a table of settings: the default, then the value of each run."""
    found = text[text.index(part) :]
    rows = re.findall(r"<tr>(<td>.*?)</tr>", found[: found.index("</table>")])
    cells = [re.findall(r"<td>(.*?)</td>", one) for one in rows]
    return {key.removesuffix(" *"): values for key, *values in cells}


def test_choices_that_are_not_the_defaults_are_listed_beside_the_default_choice(tmp_path: Path) -> None:
    own = bare(tmp_path / "own")
    settings: dict[str, Any] = {
        "data": {"partition": {"name": "Dirichlet", "alpha": 0.7}},
        "model": {"weights": None, "norm": "keep"},
        "algorithm": {"name": "FedProx", "mu": 0.01},
        "clock": {"name": "Virtual", "speed": {"name": "LogNormalSpeed", "sigma": 2.0}},
        "objects": {"module": {"class": "lab.Mine", "parameters": 650}},
    }
    (own / "config.yaml").write_text(yaml.safe_dump(settings))
    text = write_report([own]).read_text()
    changed = setting_rows(text, "Settings that are not the defaults")
    assert changed["data.partition"] == ["IID", "Dirichlet"]
    assert changed["data.partition.alpha"] == [str(Dirichlet().alpha), "0.7"]
    assert changed["clock.speed"] == ["SameSpeed", "LogNormalSpeed"]
    assert changed["clock.speed.sigma"] == ["0.5", "2.0"]
    assert changed["algorithm"] == ["FedAvg", "FedProx"]
    assert changed["model"] == ["lenet", "lab.Mine"]
    every = setting_rows(text, "All settings")
    assert "algorithm.mu" not in changed, "0.01 is its default"
    assert every["algorithm.mu"] == ["0.01", "0.01"]
    assert every["data.partition"] == ["IID", "Dirichlet"]
    assert not any(key.startswith("objects") for key in every)
    settings["algorithm"] = {"name": "FedBuff", "staleness": {"name": "Constant"}}
    (own / "config.yaml").write_text(yaml.safe_dump(settings))
    buffered = setting_rows(write_report([own]).read_text(), "Settings that are not the defaults")
    assert buffered["algorithm"] == ["FedAvg", "FedBuff"]
    assert buffered["algorithm.staleness"] == ["Polynomial", "Constant"], "the default of FedBuff"


def test_the_same_panel_of_two_runs_stands_side_by_side(browser: Browser, tmp_path: Path) -> None:
    from fedddp.reporting.figures import Chart
    from fedddp.reporting.page import PageSection, page

    panels = [("spread", 0), ("clients", 0), ("spread", 1), ("clients", 1), ("clients", 11)]
    charts = [
        Chart(f"{panel} {run}", panel, "<svg viewBox='0 0 4 2'></svg>", run=run) for panel, run in panels
    ]
    shared = Chart("mean", "mean", "<svg viewBox='0 0 4 2'></svg>")
    section = PageSection("Clients", [shared, *charts, Chart("alone 1", "alone", "<svg></svg>", run=1)])
    path = tmp_path / "side.html"
    path.write_text(page("title", [f"run {run}" for run in range(12)], [section]))
    browser.open(path)
    rows: dict[float, list[str]] = {}
    for top, name in browser.run(
        "[...document.querySelectorAll('figure.card')].map(c => [c.getBoundingClientRect().top,"
        " c.querySelector('figcaption').textContent])"
    ):
        rows.setdefault(top, []).append(name)
    assert [rows[top] for top in sorted(rows)] == [
        ["mean", "alone run 1"],
        ["spread run 0", "spread run 1"],
        ["clients run 0", "clients run 1", "clients run 11"],
    ]


def test_the_captions_of_different_splits_name_their_runs(page: Path, runs: tuple[Path, Path]) -> None:
    text = unescape(page.read_text())
    for index, folder in enumerate(runs):
        clients = json.loads((folder / "split.json").read_text())["clients"]
        assert f'<p class="run-{index}">{folder.name}: {clients} clients hold' in text


def test_the_confusion_matrix_of_a_run_is_a_figure_for_a_paper(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.figure import Figure

    from fedddp.reporting.split_figures import confusion

    run = Path(shutil.copytree(runs[0], tmp_path / "short"))
    (run / "clients.jsonl").unlink()  # a page without figures of clients and phases
    rows = [{key: row[key] for key in ("round", "eval/accuracy")} for row in history(run)]
    (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("svg", "pdf"):
        words = [str(run), "--output", "r.html", "--figure", f"new/cm.{kind}", "--panel", "confusion"]
        with pytest.raises(SystemExit) as ended:
            main(["report", *words, "--table", "t.md"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.splitlines() == ["r.html", f"new/cm.{kind}", "t.md"]
    assert Path("new/cm.pdf").read_bytes().startswith(b"%PDF")
    svg = Path("new/cm.svg").read_text()
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    assert size
    assert float(size[1]) / 72 == pytest.approx(3.4, abs=0.01)
    counts = np.array(json.loads((runs[0] / "evaluation.json").read_text())["confusion"])
    shares = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(pixels(svg)[..., 3], shares / shares.max(), atol=0.01)
    axes = Figure().subplots()
    confusion(axes, np.array([[3, 1], [0, 2]]), ("cat", "dog"))
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    marks = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert marks == {((0, 0), "3"), ((1, 0), "1"), ((1, 1), "2")}, "column, row"


def test_eval_prints_the_confusion_matrix_of_few_classes() -> None:
    from rich.console import Console

    from fedddp.commands.use_tables import _confusion_table

    def printed(counts: NDArray[np.int64], classes: list[str]) -> list[str]:
        console = Console(width=80, record=True, file=io.StringIO())
        for table in _confusion_table(counts.tolist(), classes):
            console.print(table)
        return [" ".join(line.split()) for line in console.export_text().splitlines()]

    counts = np.array([[30, 0, 2], [1, 1_200, 4], [5, 6, 7]])
    assert printed(counts, ["cat", "[red]dog", "owl"]) == [
        *("true \\ predicted cat [red]dog owl", "cat 30 2", "[red]dog 1 1,200 4", "owl 5 6 7"),
    ]
    ten = np.arange(900, 1000).reshape(10, 10)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    lines = printed(ten, names)
    assert lines[0] == "true \\ predicted 0 1 2 3 4 5 6 7 8 9", "their names do not fit"
    assert lines[4] == "3 cat 930 931 932 933 934 935 936 937 938 939"
    assert printed(1_000_000 * ten, names) == [], "numbers that do not fit"
    assert printed(np.eye(11, dtype=np.int64), list("abcdefghijk")) == [], "too many classes"


def test_names_of_runs_and_classes_are_text_and_nothing_else(
    page: Path, runs: tuple[Path, Path], browser: Browser
) -> None:
    tags, text = Tags(), page.read_text()
    tags.feed(text)
    assert tags.tags.count("script") == 2, "the page's data and its own script"
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in tags.wanted)
    assert not re.search(r"url\((?!#)|@import", text)
    browser.open(page)
    assert browser.run("document.title") == "Report: 2 runs"
    assert browser.run("document.querySelectorAll('label')[1].textContent") == HOSTILE == runs[1].name
    assert HOSTILE_CLASS[:11] in browser.run("document.body.textContent")


def test_equal_run_directories_make_equal_pages(page: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(run, tmp_path / "elsewhere" / run.name)) for run in runs]
    first = page.read_bytes()
    assert write_report(copies) == Path("elsewhere/report.html")
    assert Path("elsewhere/report.html").read_bytes() == first
    ids = re.findall(r'\bid="([^"]*)"', first.decode())
    assert len(ids) == len(set(ids)), "no two parts of the page have one name"


# ---- what is missing or wrong ----


def bare(folder: Path, **row: Any) -> Path:
    """Write a run directory of a version that recorded little."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"algorithm": {"name": "my_lab.Own"}, "seed": 1}))
    lines = [json.dumps({"round": number, "train/loss": 1 / number, **row}) for number in (1, 2)]
    (folder / "history.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_what_a_run_lacks_is_left_out_with_the_setting_that_gives_it(tmp_path: Path) -> None:
    text = write_report([bare(tmp_path / "old")]).read_text()
    missing = text[text.index("<h2>Not recorded</h2>") :]
    for setting in ("data.holdout", "evaluation.clients", "test data", "run.json", "FedBuff"):
        assert setting in missing
    headings = re.findall(r"<h2>([^<]*)</h2>", text)
    assert headings == ["Summary", "Learning", "Configuration", "Not recorded"]
    assert "Training loss" in text
    assert "None was logged" not in text, "it is not known"
    assert "<td>algorithm</td><td>FedAvg</td><td>my_lab.Own</td>" in text


def test_null_and_odd_values_of_a_history_are_left_out(tmp_path: Path) -> None:
    odd: dict[str, Any] = {
        "eval/accuracy": "high",
        "eval/recall": [None, "x", 0.5],
        "cohort": [-1, "x", None],
    }
    odd |= {"time/idle": ["x"], "time/round": 1.0, "staleness/histogram": None, "staleness/mean": 1.0}
    text = write_report([bare(tmp_path / "odd", **odd, **{"clients/missing": None})]).read_text()
    assert "Recall of each class" in text
    assert "Test accuracy" not in text


def fails(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as refused:
        main(command.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert isinstance(refused.value.code, int)
    return refused.value.code, line


def test_bad_input_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good", "torn", "empty", "split", "mistakes", "unevaluated"):
        bare(tmp_path / name)
    (tmp_path / "torn/history.jsonl").write_text('{"round": 1\n{"round": 2}\n')
    (tmp_path / "empty/history.jsonl").write_text("")
    (tmp_path / "split/split.json").write_text('{"shares": 3}')
    (tmp_path / "mistakes/evaluation.json").write_text('{"confusion": [[1, 2]], "wrong": []}')
    (tmp_path / "folder").mkdir()
    cases = {
        "": (2, "give run directories"),
        "--output x.html": (2, "give run directories"),
        "folder": (2, "folder holds no runs"),
        "nothing": (2, "nothing holds no runs"),
        "torn": (1, "history.jsonl line 1 is corrupt"),
        "empty": (1, "has no round in its history.jsonl"),
        "split": (1, "split.json is corrupt"),
        "mistakes": (1, "evaluation.json is corrupt (ValueError: its confusion matrix is not square)"),
        "good --output page.pdf": (2, "--output=page.pdf: must end in .html"),
        "good --figure page.gif": (2, "--figure=page.gif: must end in .pdf, .png, .svg"),
        "good --figure page.pdf --panel epochs": (2, "--panel=epochs: must be one of rounds, examples"),
        "good --panel bytes": (2, "--panel=bytes is for a figure"),
        "good --table page.csv": (2, "--table=page.csv: must end in .tex, .md"),
        "good --frobnicate": (2, "unknown option --frobnicate"),
        "good --figure cm.pdf --panel confusion": (2, "good has no confusion matrix in an evaluation.json"),
        "good unevaluated --figure cm.pdf --panel confusion": (2, "--panel confusion is of one run, got 2"),
        "good --panel confusion": (2, "--panel=confusion is for a figure"),
        "unevaluated --table t.tex": (1, "unevaluated has no metric below eval/"),
    }
    for arguments, (code, words) in cases.items():
        got, line = fails(f"report {arguments}", capsys)
        assert words in line, line
        assert got == code, arguments
    assert not list(tmp_path.glob("**/*.html"))


def test_the_page_of_several_runs_stands_in_their_common_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("runs/a/x", "runs/b/x", "runs/b/y"):
        bare(tmp_path / name)
    with pytest.raises(SystemExit) as ended:
        main(["report", "runs/a", "runs/b", "runs/b/y"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "runs/report.html\n"
    text = (tmp_path / "runs/report.html").read_text()
    assert re.findall(r'<span class="key"[^>]*></span>([^<]*)<', text) == ["a/x", "b/x", "y"]
    assert default_folder([Path("runs/b/x")]) == Path("runs/b/x")


# ---- parts ----


def test_of_a_long_curve_evenly_spaced_points_and_the_last_are_drawn() -> None:
    assert thin(0) == []
    assert list(thin(500)) == list(range(500))
    kept = thin(1234)
    assert list(kept[:3]) == [0, 3, 6]
    assert kept[-1] == 1233
    assert len(kept) <= 501


def test_the_phases_of_a_round_add_up_to_its_time() -> None:
    rows = [
        {"time/round": 10.0, "time/train": 6.0, "time/evaluate": 3.0},
        {"time/round": 4.0, "time/train": 4.5, "time/step": 0.25},
    ]
    phases = {phase: seconds.tolist() for phase, seconds in phase_seconds(rows).items()}
    assert phases == {"train": [6, 4.5], "step": [0, 0.25], "evaluate": [3, 0], "other": [1, 0]}


def test_defaults_are_those_of_the_choices_of_a_run() -> None:
    sections = {"algorithm": {"name": "FedProx", "mu": 3.0}, "data": {"partition": {"name": "Shards"}}}
    defaults = defaults_of(sections)
    assert (defaults["algorithm"]["name"], defaults["algorithm"]["mu"]) == ("FedProx", 0.01)
    assert defaults["data"]["partition"]["name"] == "Shards"
    assert defaults["local"]["lr"] == 0.05


def test_the_timeline_shows_when_a_group_trains_waits_and_all_evaluate() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    phases = {
        "train": np.array([3.0, 2.0]),
        "send": np.array([1.0, 0.0]),
        "evaluate": np.array([2.0, 0.0]),
        "other": np.array([0.5, 0.25]),
    }
    _timeline(axes, phases, np.array([[0.0, 1.5], [0.5, 0.0]]))
    spans: dict[str, list[tuple[float, float]]] = {}
    for number, collection in enumerate(axes.collections):
        boxes = [path.get_extents() for path in collection.get_paths()]
        kind = ("trains", "idle", "pause")[number % 3]
        spans[f"{kind} {number // 3}"] = [(float(box.x0), float(box.x1)) for box in boxes]
    assert spans == {
        "trains 0": [(0, 4), (6.5, 8)],
        "idle 0": [(8, 8.5)],
        "pause 0": [(4, 6)],
        "trains 1": [(0, 2.5), (6.5, 8.5)],
        "idle 1": [(2.5, 4)],
        "pause 1": [(4, 6)],
    }


def test_of_many_clients_the_worst_and_the_best_at_the_end_are_shown(tmp_path: Path) -> None:
    folder = bare(tmp_path / "many", cohort=[7, 150], **{"time/round": 1.0, "time/train": 0.5})
    rows = [
        {"round": number, "client": client, "accuracy": ((7 * client + number) % 200) / 200}
        for number in (1, 2)
        for client in range(200)
    ]
    (folder / "clients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report([folder]).read_text()
    cells = pixels(figure(text, "Accuracy of each client (the 50 worst and best at the end)"))
    from matplotlib import colormaps

    last = sorted(row["accuracy"] for row in rows if row["round"] == 2)
    wanted = colormaps["viridis"]([*last[:50], *last[-50:]])
    np.testing.assert_allclose(cells[:, 1], wanted, atol=0.02)
    assert "Rounds of each client" not in text, "of more than 100 clients there is no matrix of cohorts"
    assert "How often clients took part" in text


def test_runs_without_a_common_folder_need_an_output() -> None:
    with pytest.raises(ConfigError, match="no folder in common; give --output FILE.html"):
        default_folder([Path("/one/run"), Path("/other/run")])
