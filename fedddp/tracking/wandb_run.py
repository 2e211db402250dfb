"""The wandb run: drawn against rounds; at its end tables, pictures, the report and the model."""

from __future__ import annotations

import logging
import secrets
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedddp.storage.examined import IGNORED, BoxesOfImage, Examined
from fedddp.storage.history import is_client_score, read_json
from fedddp.storage.run_record import BEST, MODEL, REPORT, SPLIT
from fedddp.tracking.derived import DerivedMetrics
from fedddp.tracking.overlays import picture_of
from fedddp.tracking.tracker import TrackingConfig, reason
from fedddp.tracking.trackers import (
    Ending,
    Row,
    RunDescription,
    class_table,
    confusion,
    pictures,
    start,
    table,
    worst_examples,
)

logger = logging.getLogger(__name__)

INIT_TIMEOUT_S = 30.0
"""Seconds the start of a run waits for the wandb server before it logs offline."""

FINISH_TIMEOUT_S = 120.0
"""Seconds the end of a run waits for uploads; what is left stays on disk for `wandb sync`."""

MOST_CHART_CLASSES = 50
"""Classes of a confusion matrix that is an interactive chart; of more, it is a picture."""

MOST_WORST = 12
"""Test examples with masks or boxes."""

_USED_IDS: set[str] = set()  # of the wandb runs that this process started


class WandbRun:
    """One wandb run, online or offline."""

    def __init__(
        self, run: RunDescription, run_id: str | None, show: Callable[[str], None], derived: DerivedMetrics
    ) -> None:
        """Start the run, or continue the one with the id `run_id`; offline if the server does not answer.

        Args:
            run: what is tracked.
            run_id: of the wandb run of an earlier launch; None for a new run.
            show: shows a line to the user.
            derived: has the best values so far.
        """
        import wandb

        self._described, self._show, self._derived = run, show, derived
        self._best: Row = {}
        self._sync: str | None = None
        self.run_id: str | None = None
        """The id of the wandb run; None where wandb is disabled."""
        options = _options(run, run_id)
        try:
            mode = _mode(run.tracking)
            tracker = start("wandb", run.tracking.project, run.folder, mode=mode, **options)
        except Exception as error:
            mode = "offline"
            show(f"wandb: {reason(error)}; the run is logged offline")
            tracker = start("wandb", run.tracking.project, run.folder, mode=mode, **options)
        self._run: wandb.Run = tracker.tracker
        if mode == "disabled":
            self._run.finish()
            return
        self._run.define_metric("round", hidden=True)
        self._run.define_metric("*", step_metric="round")
        if self._run.offline:
            self._sync = _sync_line(self._run, resumed=run_id is not None)
        else:
            show(f"wandb: {self._run.url}")
        self.run_id = self._run.id
        _USED_IDS.add(self._run.id)

    def log(self, numbers: Row, row: Row) -> None:
        """Log the numbers of one round, and the histogram of its staleness."""
        import wandb

        values = {"round": row["round"], **numbers}
        histogram = row.get("staleness/histogram")
        if histogram and len(histogram) <= wandb.Histogram.MAX_LENGTH:
            bins = np.asarray(histogram), np.arange(len(histogram) + 1)
            values["staleness/histogram"] = wandb.Histogram(np_histogram=bins)
        self._run.log(values, step=row["round"])
        if self._derived.best != self._best:
            self._best = dict(self._derived.best)
            self._run.summary.update(self._best)

    def finish(self, ending: Ending) -> None:
        """Log what is known at the end, upload what is left, and show how to upload what could not be."""
        numbers = {key: value for key, value in ending.summary.items() if isinstance(value, int | float)}
        if numbers:
            self._run.summary.update(numbers)
        self._add("the table of clients", self._log_clients, ending)
        if not ending.failed:
            self._add("the pictures", self._log_pictures, ending)
            self._add("the report", self._log_report, ending)
        if ending.model_file:
            self._add("the model", self._log_models, ending)
        try:
            self._run.finish(exit_code=int(ending.failed))
        except TimeoutError:
            self._sync = _sync_line(self._run, resumed=False)
            self._show(f"wandb: not all of the run was uploaded in {FINISH_TIMEOUT_S:.0f} s")
        if self._sync:
            self._show(f"To upload the run: {self._sync}")

    def _add(self, what: str, action: Callable[[Ending], None], ending: Ending) -> None:
        """Add one thing to the run, which is finished properly without it, too."""
        try:
            action(ending)
        except Exception as error:
            self._show(f"wandb: {reason(error)}; {what} could not be added to the run")

    def _log(self, values: Row, ending: Ending) -> None:
        self._run.log({"round": ending.round, **values}, step=ending.round)

    def _log_clients(self, ending: Ending) -> None:
        import wandb

        if ending.clients:
            columns, data = table(ending.clients)
            self._log({"clients/table": wandb.Table(columns=[*columns], data=data)}, ending)

    def _log_pictures(self, ending: Ending) -> None:
        """Log who holds which classes, and the confusion matrix of the final model."""
        import wandb

        matrix, wanted = confusion(self._described.folder, ending), self._described.tracking.pictures
        charted = matrix is not None and len(matrix[1]) <= MOST_CHART_CLASSES
        drawn = pictures(self._described.folder, ending, of_images=wanted, of_confusion=not charted)
        values: Row = {key: wandb.Image(picture) for key, picture in drawn.items()}
        if matrix and charted:
            values["eval/confusion"] = _confusion_chart(*matrix)
        classes = class_table(self._described.folder, ending)
        if classes:
            columns, data = classes
            values["eval/classes"] = wandb.Table(columns=[*columns], data=data)
        if "eval/worst" in values:  # with masks and boxes that can be switched on and off
            values["eval/worst"] = self._worst(ending)
            self._announce(f"{len(values['eval/worst'])} pictures of test images are")
        if values:
            self._log(values, ending)

    def _worst(self, ending: Ending) -> list[Any]:
        """Return the worst test examples as images with masks or boxes."""
        folder = self._described.folder
        examined = worst_examples(folder, ending)
        assert examined is not None
        names = read_json(folder / SPLIT).get("class_names") or []
        return [_annotated(examined, number, names) for number in range(min(len(examined.wrong), MOST_WORST))]

    def _log_report(self, ending: Ending) -> None:
        import wandb

        page, tracking = self._described.folder / REPORT, self._described.tracking
        if tracking.report and tracking.pictures and page.exists():
            self._announce("the report, with pictures of test images, is")
            self._log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)}, ending)

    def _announce(self, what: str) -> None:
        """Log that pictures of test images leave this machine."""
        if not self._run.offline:
            logger.info("wandb: %s sent to its server; --tracking.pictures false leaves them out", what)

    def _log_models(self, ending: Ending) -> None:
        """Add the best model, where it is kept, and the final one as versions of one artifact."""
        assert ending.model_file
        scores = {
            key: value
            for key, value in ending.summary.items()
            if (key.startswith("eval/") or is_client_score(key)) and isinstance(value, int | float)
        }
        best = self._described.folder / BEST
        if best.exists():
            self._log_model(best, "best", {})
        self._log_model(ending.model_file, "final", {"round": ending.round, **scores})

    def _log_model(self, file: Path, alias: str, metrics: Row) -> None:
        import wandb
        from safetensors import safe_open

        with safe_open(str(file), "numpy") as opened:
            header = opened.metadata() or {}
        config = self._described.config
        names = {
            part: (config.get(part) or {}).get(key)
            for part, key in (("algorithm", "name"), ("model", "name"), ("data", "dataset"))
        }
        metadata = {**header, **names, **metrics}
        artifact = wandb.Artifact(f"model-{self._run.id}", "model", metadata=metadata)
        artifact.add_file(str(file.resolve()), name=MODEL, policy="immutable")  # not copied
        self._run.log_artifact(artifact, aliases=["latest", alias])


def _annotated(examined: Examined, number: int, names: list[str]) -> Any:
    """Return one example with its true and its predicted mask or boxes."""
    import wandb

    assert examined.images is not None
    labels = dict(enumerate(names))
    picture = picture_of(examined.images[number])
    caption = f"test example {examined.wrong[number]['index']}, loss {examined.wrong[number]['loss']:.3f}"
    if examined.masks is not None:
        labels[IGNORED] = "not counted"
        truth, predicted = ({"mask_data": side[number], "class_labels": labels} for side in examined.masks)
        return wandb.Image(picture, caption=caption, masks={"ground_truth": truth, "predictions": predicted})
    true, found = examined.boxes[number]
    sides = {"ground_truth": _boxes(true, labels), "predictions": _boxes(found, labels)}
    return wandb.Image(picture, caption=caption, boxes=sides)


def _boxes(found: BoxesOfImage, labels: dict[int, str]) -> Row:
    """Return boxes as wandb takes them."""
    scores = [None] * len(found.labels) if found.scores is None else found.scores.tolist()
    data = []
    for (left, top, right, bottom), label, score in zip(
        found.boxes.tolist(), found.labels.tolist(), scores, strict=True
    ):
        one: Row = {
            "position": {"minX": left, "maxX": right, "minY": top, "maxY": bottom},
            "domain": "pixel",
            "class_id": label,
            "box_caption": labels.get(label, str(label)),
        }
        data.append(one if score is None else {**one, "scores": {"score": score}})
    return {"box_data": data, "class_labels": labels}


def _options(run: RunDescription, run_id: str | None) -> Row:
    """Return what `wandb.init` is given besides project and mode."""
    import wandb

    # Standard output belongs to the progress.
    quiet: Row = {"silent": True, "console": "off"}
    wandb.setup(settings=wandb.Settings(**quiet))
    # WANDB_RUN_ID is for one run: a second one in this process gets an id of its own.
    taken = wandb.setup().settings.run_id
    return {
        "name": run.name,
        # Not through accelerate's `store_init_configuration`: it writes to wandb's global run.
        "config": run.config,
        "group": run.tracking.group,
        "tags": run.tracking.tags,
        "dir": str(run.folder),
        "id": run_id or (secrets.token_hex(4) if taken in _USED_IDS else None),
        "resume": "allow" if run_id else None,
        "reinit": "create_new",  # a run that the caller's own program has open is not ours
        "settings": wandb.Settings(
            **quiet,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
        ),
    }


def _mode(tracking: TrackingConfig) -> str:
    import wandb

    mode: str = wandb.setup().settings.mode  # from WANDB_MODE or `wandb offline`
    if tracking.mode == "offline" and mode != "disabled":
        return "offline"
    if mode != "online" or wandb.login(prompt=False, verify=False):
        return mode
    return "offline"


def _sync_line(run: Any, *, resumed: bool) -> str:
    folder = Path(run.settings.sync_dir)
    if not resumed:
        return f"wandb sync {shlex.quote(str(folder))}"
    # Each session of the run has a folder; wandb uploads them in the order of their start.
    return f"wandb sync {shlex.quote(str(folder.parent))}/offline-run-*-{run.id}*"


def _confusion_chart(counts: list[list[int]], names: list[str]) -> Any:
    """Return wandb's own chart of a confusion matrix, from counts: its function takes examples."""
    import wandb

    rows = [[names[i], names[j], count] for i, line in enumerate(counts) for j, count in enumerate(line)]
    columns = ["Actual", "Predicted", "nPredictions"]
    return wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=wandb.Table(columns=[*columns], data=rows),
        fields={column: column for column in columns},
        string_fields={"title": "Confusion matrix of the test examples"},
    )
