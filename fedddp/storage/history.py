"""Histories: lines on disk that a killed and resumed run neither loses nor repeats."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]
GONE = "it was deleted or moved while the run lasted"
HISTORY, CLIENTS = "history.jsonl", "clients.jsonl"


class History:
    """The files `history.jsonl` (a line per round) and `clients.jsonl` (a line per client and round).

    Lines are in the order of rounds and reach the file as they are logged: a killed run loses at most
    the line it was writing, and a full disk leaves no partial row.
    """

    def __init__(self, folder: Path, keep_rounds: int = 0, keep_client_rows: int | None = None) -> None:
        """Open both files; lines of rounds after `keep_rounds` are cut off, and so is a partial one.

        Args:
            folder: the run folder.
            keep_rounds: the round of the checkpoint that the run resumes from; 0 starts from scratch.
            keep_client_rows: lines of `clients.jsonl` before the checkpoint; None where it does not know.

        Raises:
            ValueError: a line before the last is corrupt, or lines are missing.
            OSError: a file cannot be written.
        """
        if not folder.is_dir():  # a half-made folder in its place would hide that
            raise FileNotFoundError(errno.ENOENT, GONE, str(folder))
        self._files: list[BinaryIO] = []
        try:
            for name, rows in ((HISTORY, keep_rounds), (CLIENTS, keep_client_rows)):
                file, kept = _open_after(folder / name, keep_rounds, rows)
                self._files.append(file)
                self.client_rows = kept
                """Lines of `clients.jsonl`, which a checkpoint records."""
        except (ValueError, OSError):
            self.close()
            raise

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one round; `row["round"]` is its number, from 1."""
        write_rows(self._files[0], [row])

    def log_clients(self, rows: list[Row]) -> None:
        """Append the metrics of clients; each row has its "round"."""
        write_rows(self._files[1], rows)
        self.client_rows += len(rows)

    def sync(self) -> None:
        """Force the lines to the disk, so that no checkpoint is newer than its lines."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def read_text(path: Path) -> str:
    """Return the text of a file; a pipe or a device, which could wait for ever, is an error.

    Raises:
        OSError: it is no file, or cannot be read.
        ValueError: it is no UTF-8.
    """
    check_file(path)
    return path.read_text(encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Row:
    """Return the JSON object in a file; empty where there is no such file.

    Raises:
        ValueError: it is corrupt.
        OSError: it cannot be read.
    """
    value = parse_json(read_text(path)) if path.exists() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path} is corrupt: it holds no object")
    return value


def check_file(path: Path) -> None:
    """Refuse a pipe or a device, which could wait for ever.

    Raises:
        OSError: it is no file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file", str(path))


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a `.jsonl` file of a run, which may still be going.

    Raises:
        ValueError: a line before the last is corrupt.
    """
    return [row for _, row in _complete_lines(path)]


def _complete_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield every row with the offset of its end; a partial last line is left out."""
    check_file(path)
    end, size = 0, path.stat().st_size
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no end of line")
                row = parse_json(line)
                if type(row["round"]) is not int:
                    raise ValueError("its round is no whole number")
            except (ValueError, KeyError, TypeError) as error:
                if end == size:
                    return
                raise ValueError(
                    f"{path} line {number} is corrupt ({error}); fix or delete the line, "
                    "or start a run in another folder"
                ) from None
            yield end, row


def _open_after(path: Path, keep_rounds: int, expected: int | None) -> tuple[BinaryIO, int]:
    """Open a file after the lines of `keep_rounds` rounds, and return it with the number of these lines."""
    end, rounds = 0, []
    if keep_rounds and path.exists():
        for offset, row in _complete_lines(path):
            if row["round"] > keep_rounds:
                break
            end = offset
            rounds.append(row["round"])
    if path.name == HISTORY and rounds != list(range(1, keep_rounds + 1)):
        raise ValueError(
            f"{path} does not have one row for each of the rounds 1 to {keep_rounds} that the checkpoint "
            "follows; restore it, or start another run with another --name"
        )
    if expected is not None and len(rounds) != expected:
        raise ValueError(
            f"{path} has {len(rounds)} of the {expected} rows before the checkpoint; restore it, or start "
            "another run with another --name"
        )
    file = path.open("ab", buffering=0)
    file.truncate(end)  # one system call: a kill leaves the file before or after it
    return file, len(rounds)


def write_rows(file: BinaryIO, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append `rows` to an unbuffered `file`: all of them, or none and an error.

    Raises:
        OSError: the disk is full or gone.
    """
    if not os.path.exists(file.name) or not os.path.samestat(os.stat(file.name), os.fstat(file.fileno())):
        raise FileNotFoundError(errno.ENOENT, GONE, file.name)
    lines = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows).encode()
    end = os.fstat(file.fileno()).st_size
    try:
        while lines:  # a disk that fills up writes a part, and refuses the rest
            lines = lines[file.write(lines) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise OSError(
            error.errno,
            f"{error.strerror}; make room, then resume with --resume auto (the rows before are intact)",
            file.name,
        ) from None


def read_config(path: Path) -> Row:
    """Return the `config.yaml` of a run, as sections.

    Raises:
        ValueError: it is corrupt.
        OSError: it cannot be read.
    """
    import yaml

    try:
        config = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates, encodings, deep nesting too
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(config, dict):
        raise ValueError("it holds no sections")
    return config


def number(row: Mapping[str, Any], key: str, *, finite: bool = True) -> float | None:
    """Return the number that a row has at `key`; None where it has none, or something else, such as text.

    With `finite` NaN and infinity are no numbers either.
    """
    value = row.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if math.isfinite(value) or not finite else None


def direction(metric: str) -> int:
    """Return 1 where a higher value of `metric` is better, -1 for a loss, also over clients."""
    name = metric.rpartition("_")[0] if is_client_score(metric) else metric
    return -1 if name.endswith("loss") else 1


NAMES = {
    **{"iou": "IoU", "dice": "Dice", "pixel_accuracy": "pixel accuracy", "label_accuracy": "label accuracy"},
    **{"f1": "F1", "f1_macro": "macro F1", "map": "mAP", "ap": "AP", "ap50": "AP50", "ap75": "AP75"},
}
"""What the metrics of tasks are called; others by their keys."""

SPREAD = ("mean", "worst10", "best10", "std")
"""Endings of the keys of a metric over clients, such as clients/accuracy_mean."""


@dataclass(frozen=True)
class Metric:
    """A metric of a history: how it is called, shown and compared."""

    key: str
    """Such as "eval/accuracy"."""

    @property
    def of_clients(self) -> bool:
        """Whether it is a statistic over clients, such as clients/accuracy_mean."""
        return is_client_score(self.key)

    @property
    def bare(self) -> str:
        """The key without eval/; of a statistic over clients, that of what was measured."""
        if self.of_clients:
            return self.key.removeprefix("clients/").rpartition("_")[0]
        return self.key.removeprefix("eval/")

    @property
    def label(self) -> str:
        """Its name in a table: accuracy, IoU, test loss, train loss, mean IoU of clients."""
        if self.of_clients:
            return self.title
        losses = {"train/loss": "train loss", "eval/loss": "test loss"}
        return losses.get(self.key) or NAMES.get(self.bare, self.bare)

    @property
    def title(self) -> str:
        """Its name on an axis or in a sentence: test accuracy, test loss, mean accuracy of clients."""
        if self.of_clients:
            spoken = {"worst10": "worst-tenth", "best10": "best-tenth", "std": "spread of"}
            statistic = self.key.rpartition("_")[2]
            return f"{spoken.get(statistic, statistic)} {NAMES.get(self.bare, self.bare)} of clients"
        return self.label if self.key.endswith("/loss") else f"test {self.label}"

    @property
    def heading(self) -> str:
        """Its name as a heading: Accuracy, IoU, mAP."""
        if self.of_clients:
            return capital(self.title)
        return self.label if self.bare in NAMES and " " not in self.label else capital(self.label)

    @property
    def axis(self) -> str:
        """The title of an axis with values times `factor`."""
        return f"{self.title} in %" if self.in_percent else self.title

    @property
    def sign(self) -> int:
        """1 where a higher value is better, -1 for a loss."""
        return direction(self.bare)

    @property
    def in_percent(self) -> bool:
        """Whether it is a share that is shown in percent: an accuracy."""
        return "accuracy" in self.key

    @property
    def factor(self) -> int:
        """What a value is multiplied with where it is shown."""
        return 100 if self.in_percent else 1

    @property
    def digits(self) -> int:
        """Digits behind the point of a value times `factor`."""
        return 2 if self.in_percent else 4

    @property
    def unit(self) -> str:
        """What stands behind a value times `factor`."""
        return " %" if self.in_percent else ""

    def text(self, value: float) -> str:
        """Return a value as text, such as "94.17 %" or "0.7312"."""
        return f"{self.factor * value:.{self.digits}f}{self.unit}"

    def on_clients(self, statistic: str) -> str:
        """Return the key of a `statistic`, one of `SPREAD`, over clients."""
        return f"clients/{self.bare}_{statistic}"


def capital(text: str) -> str:
    """Return `text` with a capital at its beginning; its other letters stay."""
    return f"{text[:1].upper()}{text[1:]}"


def class_metric(key: str) -> Metric:
    """Return the metric whose values for each class a history has at `key`, such as eval/iou_per_class."""
    return Metric(key.removesuffix("_per_class"))


def main_metric(row: Mapping[str, Any]) -> str | None:
    """Return the key of the metric that a row is judged by; None where it has none.

    eval/accuracy, or the first number below eval/ that is no loss, or eval/loss. Without all of these, where
    clients train alone, the first mean over clients, such as clients/accuracy_mean.
    """
    metric = judged_by([row])
    return None if metric is None else metric.key


def judged_by(rows: Sequence[Mapping[str, Any]], best: str | None = None) -> Metric | None:
    """Return the metric that a run with these rows is judged by.

    It is `best`, the first of its `checkpoint.best`, where a row has that; else as `main_metric` for one row.
    """
    if best is not None and any(number(row, best) is not None for row in rows):
        return Metric(best)
    keys = dict.fromkeys(
        key for row in rows for key in row if key.startswith("eval/") and number(row, key) is not None
    )
    scores = [key for key in keys if direction(key) > 0]
    found = next((key for key in ("eval/accuracy", *scores, "eval/loss", *keys) if key in keys), None)
    if found is None:
        found = next((key for row in rows for key in row if is_mean(row, key)), None)
    return None if found is None else Metric(found)


def is_mean(row: Mapping[str, Any], key: str) -> bool:
    """Return whether `row` has at `key` the mean of a metric over clients."""
    return is_client_score(key) and key.endswith("_mean") and number(row, key) is not None


def is_client_score(key: str) -> bool:
    """Return whether a key is that of a metric over clients, such as clients/accuracy_mean."""
    return key.startswith("clients/") and key.rpartition("_")[2] in SPREAD


def working_seconds(row: Mapping[str, Any]) -> float:
    """Return the seconds of a round without evaluation and checkpoints; 0 where they are not known."""
    took, *pauses = (number(row, f"time/{name}") or 0.0 for name in ("round", "evaluate", "checkpoint"))
    return max(0.0, took - sum(pauses))


def flat(config: Mapping[str, Any], prefix: str = "") -> Row:
    """Return nested `config` as one level with dotted keys."""
    level: Row = {}
    for key, value in config.items():
        level |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return level


def plain(value: Any) -> Any:
    """Return `value` as JSON has it: arrays as numbers or lists, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
