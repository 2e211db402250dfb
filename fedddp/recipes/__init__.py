"""The configurations that ship with fedddp, one YAML file each."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def recipes() -> dict[str, str]:
    """Return what each recipe trains, by name: the comment in the first line of its file."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in files}
