"""The README: its program and `fedddp` commands run as they stand; every other command has its test."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest
from pages import (
    ROOT,
    assert_target_exists,
    blocks,
    commands,
    keep_some_digits,
    run_command,
    snippets,
    targets,
)

from fedddp import load_config
from fedddp.aggregation import Aggregation
from fedddp.algorithms import Algorithm
from fedddp.data.catalog import TORCHVISION
from fedddp.data.partition import Partition
from fedddp.models.zoo import SMALL_MODELS
from fedddp.section import choices, class_name
from fedddp.simulation.attacks import Attack

README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.usefixtures("no_dashboards")

FOUR_RANKS = "--standalone --nproc-per-node 4 -m fedddp run digits --topology.ranks_per_client 2"
PARADIGMS = "--standalone --nproc-per-node 2 -m fedddp compare compare-paradigms"
SLURM = "--nodes=2 --ntasks-per-node=1 slurm/federated.sbatch digits --topology.ranks_per_client 2"
RUN_BY = {
    "./scripts/quickstart": ("tests/test_scripts.py", ["scripts/quickstart"]),
    "./scripts/test": ("tests/test_scripts.py", ["/scripts/test"]),
    f"torchrun {FOUR_RANKS}": ("tests/e2e/test_torchrun.py", [FOUR_RANKS]),
    f"torchrun {PARADIGMS}": ("tests/test_compare.py", ["compare compare-paradigms", "size=2"]),
    f"sbatch {SLURM}": ("tests/slurm/test_training.py", [f'"{Path(word).name}"' for word in SLURM.split()]),
}
"""The test that runs a command that is not run here, and what it holds of the command."""


def test_the_first_screen_has_what_a_newcomer_needs() -> None:
    first_screen = README.split("## How it works")[0]
    assert len(first_screen.splitlines()) <= 50
    for needed in ("./scripts/quickstart", "./scripts/test", "```python", "torchrun ", "sbatch ", ".png)"):
        assert needed in first_screen


def test_the_program_has_ten_lines_and_trains(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = snippets(README)
    assert len(snippet.splitlines()) == 10
    assert len(ast.parse(snippet).body) == 8
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})
    accuracy, folder = capsys.readouterr().out.splitlines()[-1].split()
    assert float(accuracy) > 0.8
    assert (Path(folder) / "model.safetensors").exists()


def test_fedddp_commands_run_one_after_the_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_some_digits(monkeypatch)
    for command in commands(README):
        if command.startswith("fedddp "):
            run_command(command)
    assert "my-run" in capsys.readouterr().out
    assert len(Path("runs/my-run/history.jsonl").read_text().splitlines()) == 5


def test_every_other_command_has_a_test_that_runs_it() -> None:
    others = [command for command in commands(README) if not command.startswith("fedddp ")]
    assert sorted(others) == sorted(RUN_BY)
    for command, (test, held) in RUN_BY.items():
        content = (ROOT / test).read_text()
        assert [part for part in held if part not in content] == [], command


def test_the_quickstart_script_starts_the_torchrun_command_of_the_page() -> None:
    script = (ROOT / "scripts" / "quickstart").read_text().replace("\\\n", "")
    assert f"torchrun {FOUR_RANKS}" in " ".join(script.replace('"', "").split())
    for name in ("quickstart", "test"):
        assert (ROOT / "scripts" / name).stat().st_mode & 0o111, name


@pytest.mark.parametrize(("arguments", "world"), [(FOUR_RANKS, 4), (SLURM, 4)])
def test_launch_commands_make_two_client_groups(arguments: str, world: int) -> None:
    words = shlex.split(arguments)
    target, *flags = words[words.index("digits") :]
    assert load_config(target, flags).topology.groups(world) == 2


def test_everything_that_ships_is_named() -> None:
    table = README.split("## What is included")[1].split("\n## ")[0]
    for base in (Algorithm, Aggregation, Attack, Partition):
        for name in {class_name(cls) for cls in choices(base).values()} - {"Mean", "NoAttack"}:
            assert "." in name or f"`{name}`" in table, name
    for name in SMALL_MODELS:
        assert f"`{name}`" in table, name
    assert f"{len(TORCHVISION)} datasets of torchvision" in table


def test_links_lead_to_files_and_titles_that_exist() -> None:
    assert len(blocks(README)) >= 5
    for target in targets(README):
        assert_target_exists(target, ROOT / "README.md")
