"""`fedddp init`: what it finds in a folder of images, and that the file it writes trains."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from fedddp import load_config, partitions
from fedddp.cli import main
from fedddp.commands.folders import look
from fedddp.commands.init import choose
from fedddp.storage.history import read_rows

TRIAL = "--tracking.trackers [] --quiet"


def typed(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """Return the exit code and the printed lines of `fedddp COMMAND`."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    printed = capsys.readouterr()
    return stop.value.code, (printed.out or printed.err).splitlines()


def rows_of(lines: list[str]) -> dict[str, str]:
    """Return what `init` found, by label; a folded cell is one text."""
    found: dict[str, str] = {}
    label = ""
    for line in lines[: lines.index("")]:
        label = line[:11].strip() or label
        found[label] = f"{found.get(label, '')} {line[11:].strip()}".strip()
    return found


@pytest.fixture
def digits() -> Path:
    """Handwritten digits as grey 8 x 8 files in class folders, and a text file among them."""
    folder = Path("digit images")
    images = load_digits()
    for index, (pixels, label) in enumerate(zip(images.images[:900], images.target, strict=False)):
        path = folder / f"digit {label}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(path)
    (folder / "notes.txt").write_text("not an image")
    return folder


def draw(rng: np.random.Generator, shape: str, colour: tuple[int, int, int]) -> Image.Image:
    """Return a picture of its own size with a shape somewhere on a light ground."""
    width, height = (int(side) for side in rng.integers(40, 70, 2))
    picture = Image.new("RGB", (width, height), (235, 235, 235))
    radius = int(min(width, height) * 0.35)
    x, y = (int(rng.integers(radius, side - radius + 1)) for side in (width, height))
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    return picture


@pytest.fixture
def shapes() -> Path:
    """Circles and triangles in two colours, of different sizes, in train/ and test/."""
    rng, folder = np.random.default_rng(3), Path("shapes")
    for split, count in (("train", 40), ("test", 10)):
        for shape in ("circle", "triangle"):
            for name, colour in (("red", (210, 40, 40)), ("blue", (40, 60, 210))):
                path = folder / split / f"{name}-{shape}"
                path.mkdir(parents=True)
                for index in range(count):
                    draw(rng, shape, colour).save(path / f"{index}.jpg")
    return folder


def test_the_file_for_digits_trains_to_a_good_accuracy(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = typed(f"init '{digits}' --output my.yaml", capsys)
    assert code == 0
    assert lines[0].startswith(
        "warning: digit images: 900 images; skipped 1 files that are no images by their"
    )
    found = rows_of(lines[1:])
    per_class = np.bincount(load_digits().target[:900])
    assert found["classes"] == f"10: {', '.join(f'digit {n}' for n in range(8))}, and 2 more"
    assert found["images"] == "900, of which 20% to test"
    assert found["per class"] == f"{per_class.min()} to {per_class.max()}"
    assert found["size"] == "8 x 8 pixels"
    assert found["skipped"] == "1 files that are no images by their endings"
    assert found["clients"] == "12, with about 60 images each"
    assert lines[-1] == "wrote my.yaml; read it, then train with: fedddp run my.yaml"

    config = load_config("my.yaml")
    assert (config.data.root, config.data.image_size, config.data.clients) == ("digit images", 8, 12)
    assert config.data.partition == partitions.Dirichlet(alpha=1.0)
    assert config.checkpoint.best == "eval/accuracy"
    code, (last,) = typed(f"{lines[-1].partition('with: fedddp ')[2]} {TRIAL} --rounds 11", capsys)
    assert (code, last) == (0, "run directory: runs/my")
    rows = read_rows(Path("runs/my/history.jsonl"))
    assert rows[-1]["eval/accuracy"] > 0.9
    assert rows[-1]["clients/accuracy_mean"] > 0.75
    assert Path("runs/my/best.safetensors").exists()


def test_the_file_for_shapes_in_colour_trains_to_a_good_accuracy(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = typed(f"init {shapes}", capsys)
    assert code == 0
    found = rows_of(lines)
    assert found["images"] == "160 to train, 40 to test"
    assert found["per class"] == "40"
    assert "other sizes; resized to 32 x 32" in found["size"]
    config = load_config("shapes.yaml")
    assert (config.data.clients, config.cohort.size, config.rounds) == (2, 2, 40)
    assert typed(f"run shapes.yaml {TRIAL} --rounds 10", capsys) == (0, ["run directory: runs/shapes"])
    assert max(row["eval/accuracy"] for row in read_rows(Path("runs/shapes/history.jsonl"))) > 0.85


@pytest.mark.parametrize(
    ("clients", "cohort", "rounds", "evaluated", "batch_size", "holdout"),
    [(1, 1, 40, 1, 32, 0.1), (8, 8, 40, 8, 16, 0.1), (40, 10, 160, None, 16, 0.0)],
)
def test_the_settings_follow_the_number_of_clients(
    digits: Path,
    capsys: pytest.CaptureFixture[str],
    clients: int,
    cohort: int,
    rounds: int,
    evaluated: int | None,
    batch_size: int,
    holdout: float,
) -> None:
    """720 images to train on: 80 passes over them, two epochs at a time; a client of 50 holds a tenth out."""
    code, lines = typed(f"init '{digits}' --clients {clients} --output my.yaml", capsys)
    assert code == 0
    assert rows_of(lines[1:])["clients"] == f"{clients}, with about {720 // clients} images each"
    assert rows_of(lines[1:])["training"] == f"{rounds} rounds of {cohort} clients"
    config = load_config("my.yaml")
    assert (config.data.clients, config.cohort.size, config.rounds) == (clients, cohort, rounds)
    assert (config.local.batch_size, config.data.holdout) == (batch_size, holdout)
    assert config.evaluation.clients == (evaluated or 0)


def test_the_comments_stand_in_one_column_and_every_line_is_short(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(f"init '{digits}'", capsys)
    head, *lines = Path("digit-images.yaml").read_text().splitlines()
    assert head == "# digit images: 10 classes, 900 images; written by fedddp init"
    assert {line.index(" # ") for line in lines if " # " in line} == {27}
    assert max(map(len, lines)) <= 100
    assert sum(" # " in line for line in lines) > 15
    sections = yaml.safe_load(Path("digit-images.yaml").read_text())
    assert sections["data"]["root"] == "digit images"


def test_a_file_is_overwritten_only_by_force(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text("mine")
    code, (line,) = typed(f"init '{digits}' --output my.yaml", capsys)
    assert code == 2
    assert line == "error: --output: my.yaml is there already; choose another, or overwrite it with --force"
    assert Path("my.yaml").read_text() == "mine"
    assert typed(f"init '{digits}' --output my.yaml --force", capsys)[0] == 0
    assert load_config("my.yaml").data.dataset == "image_folder"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("init", "give a folder of images"),
        ("init nowhere", "data.root=nowhere is not a folder"),
        ("init empty", "data.root=empty has no class folders"),
        ("init one", "one has one class, a; put the images in two or more CLASS folders"),
        ("init broken", "broken: none of its images can be read, the first is broken/a/0.png"),
        ("init one --output x.txt", "--output must end in .yaml, got x.txt"),
        ("init two --clients 0", "--clients must be in 1..2, the images to train on, got 0"),
        ("init two --clients 3", "--clients must be in 1..2, the images to train on, got 3"),
        ("init two --clients x", "argument --clients: invalid int value: 'x'"),
        ("init one two", "unexpected argument 'two'"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    for name in ("one/a", "two/a", "two/b", "broken/a", "broken/b"):
        Path(name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(Path(name) / "0.png")
    for path in Path("broken").glob("*/*.png"):
        path.write_bytes(b"no image")
    code, (line,) = typed(command, capsys)
    assert code == 2
    assert line.startswith(f"error: {message}")
    assert not list(Path().glob("*.yaml"))


def test_images_that_cannot_be_read_are_named(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(digits.glob("*/7.png")).write_bytes(b"cut off")
    code, lines = typed(f"init '{digits}'", capsys)
    assert code == 0
    assert rows_of(lines[1:])["unreadable"] == "1 images, such as digit images/digit 7/7.png; remove them"


@pytest.mark.parametrize(
    ("side", "per_class", "model", "size"),
    [(28, 30, "lenet", 28), (64, 30, "lenet", 32), (300, 30, "resnet8-gn", 64), (64, 1300, "resnet8-gn", 64)],
)
def test_the_settings_suit_the_size_of_the_folder(side: int, per_class: int, model: str, size: int) -> None:
    for name in "ab":
        Path(f"x/{name}").mkdir(parents=True)
        Image.new("RGB", (side, side + 10)).save(f"x/{name}/0.png")
        for number in range(1, per_class):
            Path(f"x/{name}/{number}.png").hardlink_to(f"x/{name}/0.png")
    folder = look(Path("x"), "x")
    choice = choose(folder)
    assert (choice.model, choice.image_size) == (model, size)
    assert folder.side == side
    assert 2 <= choice.cohort <= choice.clients <= folder.trained
    assert choice.rounds * choice.cohort / choice.clients * 2 == pytest.approx(
        80 if per_class < 1000 else 40, rel=0.05
    ), "passes over all images"
