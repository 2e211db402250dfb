"""Reads what wandb wrote, with wandb's own reader: the program that `wandb leet inspect` starts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def read_run(folder: Path) -> Records:
    """Return the records of the run file in `folder`, the last of which wandb's service writes as it ends."""
    import wandb
    from wandb.util import get_core_path

    wandb.teardown()
    (file,) = folder.glob("*.wandb")
    options = ("--no-observability", "--json", "--run-file", str(file))
    done = subprocess.run(
        [get_core_path(), "leet", "inspect", *options, str(folder.parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: Records) -> dict[int, dict[str, Any]]:
    """Return what was logged, by step."""
    return {r["history"]["step"]["num"]: r["history"]["item"] for r in records if "history" in r}


def last_summary(records: Records) -> dict[str, Any]:
    """Return the summary of the run at its end."""
    return {k: v for r in records if "summary" in r for k, v in r["summary"].get("update", {}).items()}
