"""What the README says to type is typed here; the `torchrun` line of a run is started by tests/e2e."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from fedddp.cli import main
from fedddp.config.loader import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.usefixtures("no_dashboards")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Return the shell lines that start with `program`, in the order in which they are read."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program)]


def test_first_screen_has_what_a_newcomer_needs() -> None:
    first_screen = README.split("## How it works")[0]
    assert len(first_screen.splitlines()) <= 50
    for needed in ("./scripts/quickstart", "./scripts/test", "```python", "torchrun ", "sbatch "):
        assert needed in first_screen


def test_every_command_is_one_that_a_test_runs() -> None:
    known = ("fedddp ", "torchrun ", "sbatch ", "./scripts/")
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert [line for line in lines if not line.startswith(known)] == []


def test_scripts_can_be_run() -> None:
    for script, *_ in commands("./scripts/"):
        assert (ROOT / script).stat().st_mode & 0o111, script


def test_python_trains(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks("python")
    assert len(snippet.splitlines()) <= 14
    exec(compile(snippet, "README.md", "exec"), {})
    accuracy, folder = capsys.readouterr().out.splitlines()[-1].split()
    assert float(accuracy) > 0.8
    assert (Path(folder) / "model.safetensors").exists()


def test_commands_work_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    for _, *arguments in commands("fedddp "):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code, (arguments, capsys.readouterr().err)
    assert "my-run" in capsys.readouterr().out
    assert len(Path("runs/my-run/history.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("program", ["torchrun", "sbatch"])
def test_launch_lines_start_a_run_that_is_possible(program: str) -> None:
    for line in commands(f"{program} "):
        if "compare" in line:  # tests/test_compare.py trains it on two ranks
            continue
        if program == "torchrun":
            arguments = line[line.index("run") + 1 :]
            world = int(line[line.index("--nproc-per-node") + 1])
        else:
            script = next(word for word in line if word.endswith(".sbatch"))
            subprocess.run(["bash", "-n", ROOT / script], check=True)
            arguments = line[line.index(script) + 1 :]
            options = dict(word.lstrip("-").split("=") for word in line if "=" in word)
            world = int(options["nodes"]) * int(options["ntasks-per-node"])
        assert load(arguments[0], arguments[1:]).topology.groups(world) == 2


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert (ROOT / target).exists(), target
