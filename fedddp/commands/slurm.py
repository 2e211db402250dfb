"""The command that hands out the batch scripts: `slurm`."""

from __future__ import annotations

from pathlib import Path

from fedddp.commands.console import fail, is_coordinator, say

SCRIPTS = Path(__file__).resolve().parent.parent / "slurm"
"""The batch scripts, as they ship with fedddp."""


def slurm(rest: list[str]) -> None:
    """Write the batch scripts for Slurm into a folder, `slurm` by default; a file that differs is kept."""
    from fedddp.section import local_path

    if len(rest) > 1 or (rest and rest[0].startswith("-")):
        fail(f"slurm takes one folder, got {' '.join(rest)}; type `fedddp slurm` or `fedddp slurm FOLDER`")
    if not is_coordinator():
        return
    try:
        folder = local_path(rest[0] if rest else "slurm", "the folder")
        folder.mkdir(parents=True, exist_ok=True)
        for script in sorted(SCRIPTS.iterdir()):
            copy, text = folder / script.name, script.read_text(encoding="utf-8")
            if not copy.exists():
                copy.write_text(text, encoding="utf-8")
                say(f"{copy}")
            elif copy.read_text(encoding="utf-8") == text:
                say(f"{copy} (there already)")
            else:
                say(f"{copy} (there already, and not as it ships; delete it to get the shipped one)")
    except (OSError, ValueError) as error:
        fail(f"slurm: {error}; give another folder, as in `fedddp slurm FOLDER`")
    say(f"Submit a run: sbatch {folder / 'federated.sbatch'} digits")
