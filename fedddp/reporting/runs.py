"""Run directories, read for a report: what older or unfinished runs lack is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedddp.data.description import Description, Share
from fedddp.reporting.cross_site_file import CrossSite, parse_cross_site
from fedddp.section import RENAMED, ConfigError
from fedddp.storage.examined import TARGETS, Examined, parse_examined
from fedddp.storage.history import (
    CLIENTS,
    HISTORY,
    Metric,
    Row,
    flat,
    parse_json,
    read_config,
    read_rows,
    read_text,
)
from fedddp.storage.judged import judged_together
from fedddp.storage.run_record import (
    ALONE,
    CROSS_SITE,
    EVALUATION,
    MODEL,
    SPLIT,
    RunRecord,
    read_model_header,
    read_record,
    read_warnings,
    state_of,
)

Content = TypeVar("Content")


@dataclass(frozen=True)
class RunFiles:
    """What the directory of one run holds."""

    name: str
    state: str
    settings: Row
    """The configuration, with dotted keys; the key of a choice, such as `algorithm`, stands for its name."""
    sections: Row
    """The configuration as it is written."""
    rows: list[Row]
    """history.jsonl."""
    clients: list[Row]
    """clients.jsonl."""
    record: RunRecord | None
    warnings: list[str]
    split: Description | None
    class_names: tuple[str, ...]
    examined: Examined | None
    cross_site: CrossSite | None = None
    """cross-site.json, as `fedddp eval RUN --cross-site` writes it."""
    alone: bool = False
    """Whether it has no global model: each client has one of its own."""


def judged_runs(runs: Sequence[RunFiles]) -> list[Metric | None]:
    """Return the metric that each run of a report is judged by."""
    return judged_together([run.rows for run in runs], [run.sections for run in runs])


def run_folders(target: Path, or_give: str = "") -> list[Path]:
    """Return `target` if it is a run directory, else all the runs in it.

    Args:
        target: a folder.
        or_give: what else the command takes, for the error.

    Raises:
        ConfigError: there are none.
    """
    if (target / "config.yaml").exists():
        return [target]
    found = sorted(path.parent for path in target.glob("*/config.yaml"))
    if not found:
        raise ConfigError(f"{target} holds no runs; give run directories, or a folder of them{or_give}")
    return found


def read_settings(folder: Path) -> tuple[Row, Row, list[Row]]:
    """Return the configuration of a run, flat and as it is written, and the rows of its history.

    Raises:
        ValueError: it is no run, or is corrupt.
    """
    path = folder / "config.yaml"
    try:
        try:
            config = read_config(path)
        except ValueError as error:
            raise ValueError(f"{path} is corrupt: {error}") from None
        rows = read_rows(folder / HISTORY)
    except OSError as error:
        raise ValueError(
            f"{folder} is no run directory: cannot read {error.filename}: {error.strerror}"
        ) from None
    # A choice's name stands for it: `algorithm`, beside `algorithm.mu`.
    return (
        {_key_now(key.removesuffix(".name")): value for key, value in flat(config).items()},
        config,
        rows,
    )


def _key_now(key: str) -> str:
    """Return what a setting of an earlier version is called now."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def read_run(folder: Path) -> RunFiles:
    """Return what the run directory `folder` holds.

    Raises:
        ValueError: it is no run, has no rounds yet, or a file is corrupt.
    """
    settings, sections, rows = read_settings(folder)
    if not rows:
        raise ValueError(f"{folder} has no round in its history.jsonl; report runs that have trained a round")
    split, names = _parsed(folder / SPLIT, _split) or (None, ())
    clients = folder / CLIENTS
    return RunFiles(
        name=folder.resolve().name,
        state=state_of(folder),
        settings=settings,
        sections=sections,
        rows=rows,
        clients=read_rows(clients) if clients.exists() else [],
        record=read_record(folder),
        warnings=read_warnings(folder),
        split=split,
        class_names=names,
        examined=_parsed(folder / EVALUATION, parse_examined),
        cross_site=_parsed(folder / CROSS_SITE, parse_cross_site),
        alone=ALONE in read_model_header(folder / MODEL),
    )


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run directory: its own, with as many of its parents as make it unique."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        names = [
            name if names.count(name) == 1 else "/".join(path.parts[-depth:])
            for name, path in zip(names, paths, strict=True)
        ]
    return names


def _parsed(path: Path, parse: Callable[[Path, Any], Content]) -> Content | None:
    """Return the content of a JSON file of a run; None where it has none.

    Raises:
        ValueError: it is corrupt.
    """
    if not path.exists():
        return None
    try:
        return parse(path.parent, parse_json(read_text(path)))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is corrupt ({type(error).__name__}: {error}); delete it to report the run without it"
        ) from None


def _split(_: Path, content: Any) -> tuple[Description, tuple[str, ...]]:
    shares = [
        Share(
            int(share["client"]),
            int(share["size"]),
            tuple(map(int, share["histogram"])),
            None if share.get("name") is None else str(share["name"]),
        )
        for share in content["shares"]
    ]
    if not shares or len({len(share.histogram) for share in shares}) > 1:
        raise ValueError("its histograms are not of the same classes")
    numbers = {key: content[key] for key in ("clients", "examples", "smallest", "median", "largest", "empty")}
    target = content.get("target", "class")
    if target not in TARGETS:
        raise ValueError(f"its target is {target}")
    description = Description(
        shares, **numbers, classes_per_client=float(content["classes_per_client"]), target=target
    )
    names = tuple(map(str, content.get("class_names") or range(len(shares[0].histogram))))
    return description, names
