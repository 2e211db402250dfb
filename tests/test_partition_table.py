"""The table of `fedddp partition`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from fedddp.cli import main
from fedddp.data.description import describe
from fedddp.data.partition import IID, Split
from fedddp.reporting.partition_table import table
from fedddp.reporting.split_figures import caption, held_names, holdings, sizes


def shown(split: Split, labels: NDArray[np.int64], classes: int) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(describe(split, labels, classes)))
    return " ".join(console.export_text().split())


def test_all_of_a_few_clients_are_shown() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2])
    split = Split(np.array([5, 0, 1, 2, 3, 4]), np.array([0, 3, 3, 6]))
    description = describe(split, labels, 3)
    assert [share.histogram for share in description.shares] == [(2, 0, 1), (0, 0, 0), (0, 1, 2)]
    assert (description.clients, description.examples, description.smallest, description.largest) == (
        3,
        6,
        0,
        3,
    )
    assert (description.median, description.empty, description.classes_per_client) == (3.0, 1, 4 / 3)
    assert "3 clients hold 6 examples: 0 to 3 each" in shown(split, labels, 3)


def lines(names: str, examples: int) -> list[str]:
    """Return the table of three clients of that many examples in all, as an 80-column terminal shows it."""
    classes = names.split("|")
    labels = np.arange(examples) % len(classes)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(describe(IID().split(labels, 3, 0), labels, len(classes)), classes))
    return [line.rstrip() for line in console.export_text().splitlines()]


CIFAR = "airplane|automobile|bird|cat|deer|dog|frog|horse|ship|truck"


def test_columns_have_the_names_of_the_classes_where_they_fit() -> None:
    head, first, *_ = lines("no tumour|[red]glioma|pituitary", 30)
    assert head == "client  examples  no tumour  [red]glioma  pituitary"
    assert first.split()[:2] == ["0", "10"]
    few = lines(CIFAR, 40_000)
    assert few[0].split() == ["client", "examples", *CIFAR.split("|")]
    assert not any("classes:" in line for line in few)
    many = lines(CIFAR, 600_000)
    assert max(map(len, many)) <= 80
    assert "…" not in "".join(many), "no number is cut"
    assert many[0].split() == ["client", "examples", *map(str, range(10))]
    named = " ".join(many[many.index(next(line for line in many if line.startswith("classes:"))) :])
    assert named == "classes: " + ", ".join(f"{n} {name}" for n, name in enumerate(CIFAR.split("|")))
    huge = lines(CIFAR, 9_000_000)
    assert max(map(len, huge)) <= 80
    assert huge[0].split() == ["client", "examples", "class:examples"]
    assert lines("0|1|2", 30)[0] == "client  examples  0  1  2"
    assert "classes:" not in " ".join(lines("0|1|2", 30))


def test_the_caption_begins_at_the_left() -> None:
    shown = lines("a|b", 30)
    caption = shown[4:]
    assert len(caption) > 1
    assert not any(line.startswith(" ") for line in caption)
    assert " ".join(caption).startswith(
        "3 clients hold 30 examples: 10 to 10 each (median 10) of 2.0 classes"
    )


def test_the_command_shows_the_names_of_the_classes(capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        Path("pictures", name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), number).save(Path("pictures", name, f"{number}.png"))
    small = "--data.clients 2 --cohort.size 2 --data.partition IID --data.image_size 8"
    with pytest.raises(SystemExit) as ended:
        main(f"partition digits --data.dataset image_folder --data.root pictures {small}".split())
    assert ended.value.code == 0
    assert capsys.readouterr().out.split()[:4] == ["client", "examples", "cat", "dog"]


def test_of_many_classes_the_most_frequent_are_shown() -> None:
    labels = np.repeat(np.arange(20), np.arange(1, 21))
    split = Split(np.arange(len(labels)), np.array([0, len(labels)]))
    assert "19:20 18:19 17:18 16:17 15:16 14:15 and 14 more" in shown(split, labels, 20)


def test_of_a_million_clients_the_first_and_last_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(2_000_000) % 10
    split = IID().split(labels, 1_000_000, 0)
    counted: list[int] = []
    indices = Split.indices

    def count(split: Split, client: int) -> NDArray[np.int64]:
        counted.append(client)
        return indices(split, client)

    monkeypatch.setattr(Split, "indices", count)
    description = describe(split, labels, 10)
    assert len(counted) == 20, "the others' examples are not looked at"
    clients = [share.client for share in description.shares]
    assert clients == [*range(10), *range(999_990, 1_000_000)]
    text = shown(split, labels, 10)
    assert "999,999" in text
    assert "…" in text
    assert "1,000,000 clients hold 2,000,000 examples" in text


def test_an_odd_limit_shows_no_client_twice() -> None:
    split = IID().split(np.zeros(5, int), 5, 0)
    for limit in range(1, 7):
        clients = [share.client for share in describe(split, np.zeros(5, int), 1, limit).shares]
        assert len(clients) == len(set(clients)) == min(5, limit)


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_the_command_draws_the_split_beside_its_table(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["partition", "digits", "--figure", f"new/split.{kind}", "--data.clients", "10"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "10 clients hold 1,437 examples" in " ".join(out.split())
    assert out.splitlines()[-1] == f"new/split.{kind}"
    head = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[kind]
    assert Path(f"new/split.{kind}").read_bytes().startswith(head)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--figure split.doc", "--figure=split.doc: must end in .pdf, .png, .svg"),
        ("--figure", "--figure: expected one argument; give a .pdf, .svg or .png file"),
    ],
)
def test_a_figure_of_no_known_kind_is_refused(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["partition", "digits", *arguments.split()])
    assert refused.value.code == 2
    assert words in capsys.readouterr().err


def test_the_bars_of_a_split_are_stacked_by_class() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2])
    split = Split(np.array([5, 0, 1, 2, 3, 4]), np.array([0, 3, 3, 6]))
    axes = Figure().subplots()
    sizes(axes, describe(split, labels, 3), ("a", "b", "c"))
    boxes = [bar.get_extents().transformed(axes.transData.inverted()) for bar in axes.patches]
    bars = sorted((round((box.x0 + box.x1) / 2), box.y0, box.height) for box in boxes)
    # Client 0 holds two of class a and one of c, client 1 nothing, client 2 one of b and two of c.
    np.testing.assert_allclose(bars, [(0, 0, 2), (0, 2, 1), (2, 0, 1), (2, 1, 2)], atol=1e-9)
    image = Figure().subplots()
    holdings(image, describe(split, labels, 3), ("a", "b", "c"))
    np.testing.assert_array_equal(image.images[0].get_array(), [[2, 0, 1], [0, 0, 0], [0, 1, 2]])


def test_clients_have_their_names_and_classes_say_what_an_image_counts_as() -> None:
    split, labels = Split(np.array([0, 1, 2]), np.array([0, 2, 3])), np.array([0, 1, 1])
    about: dict[str, Any] = {"names": ("[b]Bonn", "Oslo"), "target": "mask"}
    description = describe(split, labels, 2, **about)
    assert [share.label for share in description.shares] == ["[b]Bonn", "Oslo"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(description, ("background", "lesion")))
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["client", "examples", "no", "foreground", "lesion"]
    assert [line.split() for line in lines[1:3]] == [["[b]Bonn", "2", "1", "1"], ["Oslo", "1", "1"]]
    words = " ".join(" ".join(lines[3:]).split())
    assert words.endswith("an image counts as the class with most pixels other than background")
    assert held_names(description, ("road", "car")) == ["only road", "car"]
    axes = Figure().subplots()
    holdings(axes, description, ("background", "lesion"))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["[b]Bonn", "Oslo"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["no foreground", "lesion"]


@pytest.mark.parametrize(
    ("target", "words"), [("class", ""), ("multilabel", "as a where it has none"), ("boxes", "largest box")]
)
def test_the_caption_explains_what_an_image_counts_as(target: Any, words: str) -> None:
    split = describe(Split(np.array([0, 1]), np.array([0, 2, 2])), np.array([0, 1]), 2, target=target)
    text = caption(split, ("a", "b"))
    assert words in text
    assert ("an image counts" in text) == bool(words)
    assert "1 clients have none" in text
