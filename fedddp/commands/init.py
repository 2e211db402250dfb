"""The command that writes a configuration for a folder of images: `init`."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedddp.commands.console import fail, is_coordinator, parse, say, show
from fedddp.commands.folders import TEST_FRACTION, Folder, look

if TYPE_CHECKING:
    from rich.table import Table

PER_CLIENT = 60
"""Training images that a client gets, where there are enough for several clients."""

MOST_CLIENTS, LARGEST_COHORT = 100, 10
FEW = 2_000
"""Fewer images than a deep network needs."""

SMALL, MEDIUM = 40, 100
"""Largest images, in pixels, for LeNet and for ResNet-8."""

COMMENTS = 27
"""Column of the comments in the file."""


@dataclass(frozen=True)
class Choice:
    """The settings that suit a folder, by its size."""

    image_size: int
    model: str
    norm: str
    clients: int
    cohort: int
    batch_size: int
    rounds: int
    holdout: float


def init(rest: list[str]) -> None:
    """Look at a folder of images, and write a configuration for it."""
    own = _parse(rest)
    if own is None:
        return
    from fedddp.config.loader import load_config
    from fedddp.section import local_path

    try:
        root = local_path(own.folder, "FOLDER")
        name = re.sub(r"[^\w.+=-]+", "-", root.resolve().name).strip("-.") or "images"
        output = local_path(own.output or f"{name}.yaml", "--output")
        if output.suffix not in (".yaml", ".yml"):
            fail(f"--output must end in .yaml, got {output}; a run is started with that file")
        if output.exists() and not own.force:
            fail(f"--output: {output} is there already; choose another, or overwrite it with --force")
        folder = look(root, own.folder)
        if len(folder.classes) < 2:
            fail(f"{root} has one class, {folder.classes[0]}; put the images in two or more CLASS folders")
        if own.clients is not None and folder.centres:
            fail(f"--clients: the {len(folder.centres)} centres of {root} are the clients; leave it out")
        if own.clients is not None and not 1 <= own.clients <= folder.trained:
            fail(f"--clients must be in 1..{folder.trained}, the images to train on, got {own.clients}")
        choice = choose(folder, own.clients)
        if is_coordinator():
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(to_yaml(folder, choice), encoding="utf-8")
            load_config(str(output))
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; give a folder that can be read and an --output to write")
    show(_found(folder, choice))
    if is_coordinator():
        say(f"\nwrote {output}; read it, then train with: fedddp run {shlex.quote(str(output))}")


def _parse(rest: list[str]) -> argparse.Namespace | None:
    """Return the options; None after printing the help."""
    options = argparse.ArgumentParser(
        prog="fedddp init",
        description="Look at a folder of images, and write a configuration for it with settings that suit "
        "its size: images in CLASS folders, or images/ and masks/ with pairs of one name; also in train/ and "
        "val/ (or test/), and all of it in one folder per centre. Centres become the clients.",
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    options.add_argument("folder", nargs="?", metavar="FOLDER")
    options.add_argument("--output", metavar="FILE.yaml", help="file to write (the folder's name)")
    options.add_argument("--clients", type=int, metavar="N", help="clients that share the images (by size)")
    options.add_argument("--force", action="store_true", help="overwrite the file")
    return parse(
        options, rest, {"folder": "give a folder of images, e.g. `fedddp init photos --output photos.yaml`"}
    )


# ---- what suits it ----


def choose(folder: Folder, clients: int | None = None) -> Choice:
    """Return settings for a folder: for a model that a laptop trains, and clients that have enough images.

    `clients` sets their number instead. Centres are the clients, each evaluated on its own test images.
    """
    images = folder.trained
    clients = len(folder.centres) or clients or max(2, min(MOST_CLIENTS, images // PER_CLIENT))
    cohort = min(clients, LARGEST_COHORT)
    per_client = images / clients
    # Over all images, two epochs at a time.
    passes = 80 if images < FEW else 40 if images < 10_000 else 20 if images < 50_000 else 10
    if folder.masks:
        size = min(max(folder.side, 8), 32) if folder.side <= SMALL else 64 if folder.side <= MEDIUM else 128
        model, norm = "unet", "keep"
    elif folder.side <= SMALL or (folder.side <= MEDIUM and images < FEW):
        size, model, norm = min(max(folder.side, 4), 32), "lenet", "keep"
    elif folder.side <= MEDIUM or images < FEW:
        size, model, norm = 64, "resnet8-gn", "keep"
    else:
        size, model, norm = 128 if images < 20_000 else 224, "resnet18", "group"
    return Choice(
        image_size=size,
        model=model,
        norm=norm,
        clients=clients,
        cohort=cohort,
        batch_size=8 if folder.masks else 16 if per_client < 500 else 32,
        rounds=max(10, round(passes / 2 * clients / cohort)),
        holdout=0.1 if per_client >= 50 and not folder.centres else 0.0,
    )


def to_yaml(folder: Folder, choice: Choice) -> str:
    """Return the configuration as YAML with comments."""
    lines = [*_data_lines(folder, choice), *_training_lines(folder, choice)]
    images = folder.train + folder.test
    of = f"{len(folder.centres)} centres, " if folder.centres else ""
    head = f"# {folder.root}: {of}{len(folder.classes)} classes, {images:,} images; written by fedddp init\n"
    return head + "".join(
        f"{text:<{COMMENTS}} # {comment}\n" if comment else f"{text}\n"
        for text, comment in filter(None, lines)
    )


Lines = list[tuple[str, str] | None]
"""Lines of the file, each with its comment; None: no line."""


def _data_lines(folder: Folder, choice: Choice) -> Lines:
    """Return the section on data, and the task."""
    from fedddp.config.loader import dump_yaml

    spread: Lines = [
        ("  partition:", "each class is spread unevenly over the clients"),
        ("    name: Dirichlet", "IID: all clients have alike images (remove alpha)"),
        ("    alpha: 1.0", "0.1: a client has few classes; 100: nearly alike"),
    ]
    about = f"the images are split over them: about {per_client(folder, choice)} each"
    if folder.centres:
        spread = [("  partition: Natural", "each centre is a client")]
        about = f"the centres: {_some(folder.centres, 3)}"
    return [
        ("data:", ""),
        (f"  dataset: {'mask_folder' if folder.masks else 'image_folder'}", ""),
        (f"  {dump_yaml({'root': folder.root}).strip()}", "from where fedddp is started"),
        (f"  image_size: {choice.image_size}", "images are resized to this; larger is slower"),
        ("  augment: none", "random changes of training images: crop, flip, crop-flip"),
        None if folder.test else (f"  test_fraction: {TEST_FRACTION}", "tested; the rest is trained on"),
        (f"  clients: {choice.clients}", about),
        *spread,
        (f"  holdout: {choice.holdout}", "of each client's images, to evaluate the model there")
        if choice.holdout
        else None,
        ("task: Segmentation", "a class for every pixel") if folder.masks else None,
    ]


def _training_lines(folder: Folder, choice: Choice) -> Lines:
    """Return the sections on model, training and evaluation."""
    others = "lenet, cnn, resnet8-gn, resnet20-gn, resnet18, ... of torchvision"
    others = "lraspp_mobilenet_v3_large, fcn_resnet50, ... of torchvision" if folder.masks else others
    evaluated = "so many on their own held-out images"
    norms = "group: batch norms become group norms, for small batches"
    algorithms, score = "or FedProx, SCAFFOLD, FedAdam, ...", "iou" if folder.masks else "accuracy"
    best = f"eval/{score}"
    if folder.centres:
        evaluated = "each centre on its own test images"
        norms = "batch: batch norm, which FedBN leaves at each centre; group: for small batches"
        algorithms = "or FedBN (set norm: batch), FedPer, FedProx, ..."
        best = f"clients/{score}_mean"  # which runs without a global model have too
    return [
        ("model:", ""),
        (f"  name: {choice.model}", f"or {others}"),
        (f"  norm: {choice.norm}", norms),
        ("  # weights: IMAGENET1K_V1", "downloaded; far better with few images")
        if choice.model == "resnet18"
        else None,
        ("local:", "what a client does in a round"),
        ("  epochs: 2", "passes over its images"),
        (f"  batch_size: {choice.batch_size}", ""),
        ("  optimizer: adamw", "forgiving; sgd with lr 0.1 is that of the papers (SCAFFOLD needs it)"),
        ("  lr: 0.001", "lower where the loss grows, higher where it hardly falls"),
        ("cohort:", ""),
        (f"  size: {choice.cohort}", f"clients per round, of {choice.clients}"),
        ("algorithm:", ""),
        ("  name: FedAvg", f"{algorithms}: fedddp run --help"),
        (f"rounds: {choice.rounds}", ""),
        ("evaluation:", ""),
        ("  every: 1", "rounds between evaluations on the test images"),
        (f"  clients: {choice.clients if folder.centres else min(choice.clients, 20)}", evaluated)
        if choice.holdout or folder.centres
        else None,
        ("checkpoint:", "the best model is kept beside the last"),
        (f"  best: {best}", ""),
        ("tracking:", ""),
        ("  trackers: [wandb]", "files in the run, uploaded after `wandb login`; []: none"),
        ("  pictures: true", "wandb gets pictures of test images; false leaves them out"),
    ]


def per_client(folder: Folder, choice: Choice) -> int:
    """Return the mean number of training images per client."""
    return round(folder.trained / choice.clients)


def _found(folder: Folder, choice: Choice) -> Table:
    """Return a table of what was found and chosen."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("classes", Text(f"{len(folder.classes)}: {_some(folder.classes)}"))
    split = (
        f" to train, {folder.test:,} to test" if folder.test else f", of which {TEST_FRACTION:.0%} to test"
    )
    table.add_row("images", f"{folder.train:,}{split}")
    if folder.per_class:
        few, many = min(folder.per_class), max(folder.per_class)
        table.add_row("per class", f"{few:,}" if few == many else f"{few:,} to {many:,}")
    if folder.masks:
        table.add_row("masks", "one for each image")
    if folder.centres:
        table.add_row("centres", Text(f"{len(folder.centres)}: {_some(folder.centres)}"))
    (width, height), count = folder.sizes.most_common(1)[0]
    measured = folder.sizes.total()
    others = "" if count == measured else f" and {len(folder.sizes) - 1} other sizes; resized to "
    others += f"{choice.image_size} x {choice.image_size}" if others else ""
    table.add_row("size", f"{width} x {height} pixels{others}")
    if folder.skipped:
        table.add_row("skipped", f"{folder.skipped} files that are no images by their endings")
    if folder.unreadable:
        table.add_row(
            "unreadable",
            Text(f"{len(folder.unreadable)} images, such as {folder.unreadable[0]}; remove them"),
        )
    kind = "the centres, " if folder.centres else ""
    table.add_row("clients", f"{kind}{choice.clients}, with about {per_client(folder, choice)} images each")
    table.add_row("model", f"{choice.model} on {choice.image_size} x {choice.image_size} pixels")
    table.add_row("training", f"{choice.rounds} rounds of {choice.cohort} clients")
    return table


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
