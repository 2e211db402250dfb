"""The commands that look at runs in their directories: `runs`."""

from __future__ import annotations

from fedddp.commands.console import fail, show


def runs(rest: list[str]) -> None:
    """Print the runs of a folder."""
    from rich.table import Table

    from fedddp.section import local_path
    from fedddp.storage.history import read_rows

    try:
        output = local_path(rest[0] if rest else "runs", "output")
    except ValueError as error:
        fail(str(error))
    if not output.is_dir():
        fail(f"{output} is not a folder; give the --output of your runs")
    table = Table("run", "rounds", "loss", "accuracy", "state", box=None, header_style="bold")
    for folder in sorted(path.parent for path in output.glob("*/history.jsonl")):
        try:
            rows = read_rows(folder / "history.jsonl")
        except (ValueError, OSError) as error:
            table.add_row(folder.name, "-", "-", "-", f"corrupt: {error}")
            continue
        last: dict[str, float] = {}
        for row in rows:
            last |= {key: value for key, value in row.items() if value is not None}
        scores = [last.get("train/loss"), last.get("eval/accuracy")]
        cells = [f"{score:.4f}" if isinstance(score, int | float) else "-" for score in scores]
        state = "finished" if (folder / "model.safetensors").exists() else "unfinished"
        table.add_row(folder.name, str(len(rows)), *cells, state)
    show(table)
