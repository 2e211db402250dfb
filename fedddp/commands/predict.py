"""The command that predicts what is in image files: `predict`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedddp.commands.console import fail, say
from fedddp.commands.use_options import (
    STDOUT,
    chosen_model,
    command_options,
    described,
    model_text,
    one_line,
    only_json,
    parsed_alone,
    show_all,
    write_json,
    writing,
)
from fedddp.storage.run_record import CLIENT

if TYPE_CHECKING:
    from rich.table import Table

    from fedddp.commands.predict_folder import PredictionFolder
    from fedddp.inference import TrainedModel
    from fedddp.inference.drawn import BoxesOfFile, MaskOfFile
    from fedddp.inference.pictures import Prediction

THRESHOLD = 0.5
"""Least score of a box, or probability of a label, that counts as found."""

TABLE = "boxes.csv"
"""File with all boxes."""

CUT = "The model sees the centre of an image, as in training (data.resize=crop)"


def predict(rest: list[str]) -> None:
    """Print what a model predicts for image files, and write masks and boxes."""
    own = _parse(rest)
    if own is None:
        return
    with one_line(), only_json(own.json):
        from fedddp.inference import pictures

        if own.save:
            pictures.check_sheet(Path(own.save))
        model = chosen_model(own)
        _check_options(own, model)
        files = pictures.find_images(own.images)
        commands = {"mask": _masks, "boxes": _boxes, "multilabel": _labels, "class": _classes}
        found, table, lines = commands[model.task.target](own, model, files)
    if own.json:
        write_json(own.json, found)
    if own.json != STDOUT:
        say(f"model {own.run} ({model_text(own.run, model, own.best)})")
        show_all([table])
        for line in lines:
            say(line)


def _parse(rest: list[str]) -> argparse.Namespace | None:
    """Return the options; None after printing the help."""
    options = command_options(
        "predict RUN IMAGE|FOLDER ...",
        "Predict what is in images; folders recursively. Of a segmentation model it writes, for every image, "
        "NAME.mask.png (pixels are numbers of classes, 255 where the model does not see the image) and "
        "NAME.overlay.png; of a detector NAME.boxes.png and boxes.csv, in pixels of the image.",
    )
    options.add_argument("images", nargs="*", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    options.add_argument("--top", metavar="N", type=int, default=3, help="classes per image (3)")
    options.add_argument(
        "--threshold", metavar="P", type=float, help="least probability of a label, or score of a box (0.5)"
    )
    options.add_argument(
        "--output",
        metavar="FOLDER",
        help="where masks and boxes are written (RUN/predictions, with --client RUN/predictions-NAME); "
        "what an earlier call wrote there is replaced",
    )
    options.add_argument("--save", metavar="SHEET.png", help="write a contact sheet of the images")
    options.add_argument("--json", metavar="FILE", help="write all predictions as JSON; - prints them")
    own = parsed_alone(options, rest, "predict")
    if own is None:
        return None
    if own.top < 1:
        fail(f"--top must be >= 1, got {own.top}")
    if own.threshold is not None and not 0 <= own.threshold <= 1:
        fail(f"--threshold must be in [0, 1], got {own.threshold:g}")
    if not own.images:
        fail("give image files, or folders of them, e.g. `fedddp predict runs/digits photos`")
    return own


def _check_options(own: argparse.Namespace, model: TrainedModel) -> None:
    """Refuse options that another task has.

    Raises:
        ConfigError: there is one.
    """
    from fedddp.section import ConfigError

    task, target = type(model.task).__name__, model.task.target
    if own.threshold is not None and target not in ("multilabel", "boxes"):
        raise ConfigError(f"--threshold is for labels and boxes, but {own.run} has task={task}; leave it out")
    if own.output is not None and target not in ("mask", "boxes"):
        raise ConfigError(
            f"--output is for masks and boxes, but {own.run} has task={task}; give --json FILE or --save FILE"
        )


# ---- the tasks: what is written as JSON, a table, and lines below it ----

Found = tuple[dict[str, Any], "Table", list[str]]


def _classes(own: argparse.Namespace, model: TrainedModel, files: Sequence[Path]) -> Found:
    from fedddp.inference import pictures

    sheet = _Sheet(own, model)
    predictions = [sheet.add(*one) for one in pictures.predict_files(model, files, own.top)]
    sheet.save(len(files))
    found = {**described(own.run, model, own.best), "predictions": [_prediction(one) for one in predictions]}
    return found, _prediction_table(predictions), sheet.lines


def _labels(own: argparse.Namespace, model: TrainedModel, files: Sequence[Path]) -> Found:
    from fedddp.inference import pictures

    threshold = getattr(model.task, "threshold", THRESHOLD) if own.threshold is None else own.threshold
    sheet = _Sheet(own, model)
    found: list[dict[str, Any]] = []
    rows = []
    for one, picture in pictures.predict_files(model, files, len(model.classes)):
        sheet.add(one, picture)
        count = sum(probability >= threshold for probability in one.probabilities)
        labels = list(zip(one.classes[:count], one.probabilities[:count], strict=True))
        short = pictures.Prediction(one.file, one.classes[: own.top], one.probabilities[: own.top])
        found.append(
            {
                **_prediction(short),
                "labels": [{"class": name, "probability": probability} for name, probability in labels],
            }
        )
        text = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in labels)
        rows.append((str(one.file), text or "none"))
    sheet.save(len(files))
    table = _table(("image", f"labels of {100 * threshold:g} % and more"), rows)
    return {**described(own.run, model, own.best), "predictions": found}, table, sheet.lines


def _masks(own: argparse.Namespace, model: TrainedModel, files: Sequence[Path]) -> Found:
    from fedddp.inference import drawn

    background = bool(getattr(model.task, "background", True))
    sheet, names = _Sheet(own, model), dict(zip(files, drawn.file_names(files), strict=True))
    rows, shares, outside = [], [], False
    written = [f"{name}.{ending}.png" for name in names.values() for ending in ("mask", "overlay")]
    with _folder(own, model, written, files) as folder:
        for one in drawn.find_masks(model, files):
            sheet.add(one.foreground(background=background), _tile(one))
            shares.append(one.shares)
            outside = outside or one.outside > 0
            where = (names[one.file], folder.staging, folder.path)
            rows.append(drawn.write_mask(one, *where, background=background))
        sheet.save(len(files))
        found = folder.publish(described(own.run, model, own.best), rows)
    lines = [
        f"{folder.path}: {len(rows)} masks (NAME.mask.png), overlays (NAME.overlay.png), predictions.json"
    ]
    if outside:
        lines.append(f"{CUT}: mask pixels outside of it are 255, and hatched.")
    top = [type(one)(one.file, one.classes[: own.top], one.probabilities[: own.top]) for one in shares]
    return found, _prediction_table(top), [*lines, *sheet.lines]


def _boxes(own: argparse.Namespace, model: TrainedModel, files: Sequence[Path]) -> Found:
    from fedddp.inference import drawn, pictures

    threshold = THRESHOLD if own.threshold is None else own.threshold
    sheet, names = _Sheet(own, model), dict(zip(files, drawn.file_names(files), strict=True))
    of_files, rows, cut = [], [], False
    written = [*(f"{name}.boxes.png" for name in names.values()), TABLE]
    with _folder(own, model, written, files) as folder:
        for one in drawn.find_boxes(model, files, threshold):
            classes, scores = tuple(one.names) or ("no box",), tuple(one.scores) or (0.0,)
            sheet.add(pictures.Prediction(one.file, classes, scores), _tile(one))
            cut = cut or one.cut
            of_files.append(drawn.write_boxes(one, names[one.file], folder.staging, folder.path))
            rows.append((str(one.file), str(len(one.names)), one.summary))
        sheet.save(len(files))
        drawn.write_table(of_files, folder.staging / TABLE)
        found = folder.publish(described(own.run, model, own.best), of_files)
    title = f"boxes with a score of {threshold:g} and more"
    lines = [f"{folder.path}: {len(rows)} pictures (NAME.boxes.png), {TABLE}, predictions.json"]
    if cut:
        lines.append(f"{CUT}: nothing is found outside of it, where pictures are hatched.")
    return found, _table(("image", "boxes", title), rows), [*lines, *sheet.lines]


# ---- files ----


def _folder(
    own: argparse.Namespace, model: TrainedModel, names: Sequence[str], files: Sequence[Path]
) -> AbstractContextManager[PredictionFolder]:
    """Return a context that makes the folder of masks and boxes, for files of these `names`."""
    from fedddp.commands.predict_folder import PredictionFolder, default_folder

    path = default_folder(own.run, model.metadata.get(CLIENT), own.best)
    path = path if own.output is None else Path(own.output).expanduser()
    return PredictionFolder(path, names, files).open()


def _tile(one: MaskOfFile | BoxesOfFile) -> Any:
    from fedddp.inference.pictures import fitted

    return fitted(one.picture)


class _Sheet:
    """The contact sheet that `--save` asks for."""

    def __init__(self, own: argparse.Namespace, model: TrainedModel) -> None:
        self.own = own
        self.model = f"{Path(own.run).resolve().name} ({model_text(own.run, model, own.best)})"
        self.shown: list[tuple[Prediction, Any]] = []
        self.count = 0

    @property
    def lines(self) -> list[str]:
        """The name of its file, if it is written."""
        return [self.own.save] if self.own.save else []

    def add(self, prediction: Prediction, picture: Any) -> Prediction:
        """Add one picture, if there is space; return its prediction."""
        from fedddp.inference.pictures import MOST_ON_SHEET

        self.count += 1
        if self.own.save and len(self.shown) < MOST_ON_SHEET:
            self.shown.append((prediction, picture))
        return prediction

    def save(self, files: int) -> None:
        """Write the sheet.

        Raises:
            ValueError: none of the `files` could be read.
        """
        from fedddp.inference.pictures import contact_sheet

        if not self.count:
            raise ValueError(f"no image could be read, of {files}; give images, or folders of them")
        if self.own.save:
            title = f"{self.model}: {self.count} images"
            title += f", the first {len(self.shown)}" if self.count > len(self.shown) else ""
            with writing(self.own.save) as path:
                contact_sheet(title, self.shown).save(path)


# ---- tables ----


def _prediction(prediction: Prediction) -> dict[str, Any]:
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    return {"image": str(prediction.file), "classes": [{"class": c, "probability": p} for c, p in pairs]}


def _prediction_table(predictions: Sequence[Prediction]) -> Table:
    """Return the classes of each image with their probabilities, or their shares of its pixels."""
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


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for title in titles:
        right = title == "boxes"
        table.add_column(title, overflow="fold", justify="right" if right else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
