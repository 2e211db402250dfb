"""The shell scripts on machines that lack something: each names it in one line.

Fake programs on the PATH make such machines: a Python that is too old, a full disk. Continuous integration
runs the scripts themselves where nothing is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHONS = ("python3.13", "python3.12", "python3.11", "python3")

# Makes a venv whose python and pip answer what venv.sh asks, and writes down what was installed.
GOOD_PYTHON = r"""#!/bin/sh
case "$*" in
  "-c "*) ;;
  "-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    printf '#!/bin/sh\necho "pip 26 from %s/lib/python3.11/site-packages/pip"' "$3" > "$3/bin/pip"
    chmod +x "$3/bin/pip" ;;
  "-m pip install "*)
    echo "Collecting torch>=2 (from fedddp)"
    for package; do :; done
    echo "$package" >> "$CALLS"
    [ -z "$PIP_SAYS" ] || { echo "$PIP_SAYS"; exit 1; } ;;
  "-m pytest"*) echo "pytest got: $*" ;;
  --version) echo "Python 3.13.1" ;;
esac
"""
OLD_PYTHON = '#!/bin/sh\n[ "$1" != --version ] || exec echo "Python 3.9.2"\nexit 1\n'
PYTHON_WITHOUT_VENV = '#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\n'


class Machine:
    """A checkout in a folder of its own, and a PATH that begins with fake programs."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.calls = folder / "a checkout", folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.root.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        (self.root / "pyproject.toml").write_text("[project]\n")
        for name in PYTHONS:
            self.put(name, GOOD_PYTHON)
        self.put("df", "#!/bin/sh\nprintf 'head\\ndisk 1 1 99000000 1%% /\\n'")

    def put(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def test(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the checkout's scripts/test from another folder."""
        path = {"PATH": f"{self.bin}:{os.environ['PATH']}", "CALLS": str(self.calls)}
        command = [f"{self.root}/scripts/test", *arguments]
        return subprocess.run(
            command,
            env=os.environ | path | variables,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )

    def installs(self) -> list[str]:
        return self.calls.read_text().split() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test", "scripts/venv.sh", ".ci/run"])
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_a_second_call_installs_nothing(machine: Machine) -> None:
    first, second = machine.test("-k", "two words"), machine.test()
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert machine.installs() == [".[dev]"]
    assert "torch" in first.stderr
    assert second.stderr == ""
    assert first.stdout == "pytest got: -m pytest --numprocesses 3 --dist loadfile -k two words\n"


def test_changed_requirements_are_installed(machine: Machine) -> None:
    machine.test()
    (machine.root / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    machine.test()
    assert machine.installs() == [".[dev]"] * 2


def test_an_incomplete_environment_is_made_again(machine: Machine) -> None:
    machine.test(PIP_SAYS="ERROR: interrupted")
    leftover = machine.root / ".venv" / "leftover"
    leftover.touch()
    assert machine.test().returncode == 0
    assert not leftover.exists()


def test_venv_of_a_moved_checkout_is_made_again(machine: Machine) -> None:
    machine.test()
    (machine.root / ".venv" / "leftover").touch()
    machine.root = machine.root.rename(machine.root.parent / "moved")
    assert machine.test().returncode == 0
    assert not (machine.root / ".venv" / "leftover").exists()


def test_own_venv_is_kept(machine: Machine) -> None:
    machine.test()
    (machine.root / ".venv" / "installed").unlink()
    (machine.root / ".venv" / "leftover").touch()
    assert machine.test().returncode == 0
    assert (machine.root / ".venv" / "leftover").exists()


def test_old_python_is_named(machine: Machine) -> None:
    for name in PYTHONS:
        machine.put(name, OLD_PYTHON)
    line = only_line(machine.test())
    assert "Python 3.11 or newer is needed, but python3 is Python 3.9.2" in line


def test_a_missing_venv_module_is_reported(machine: Machine) -> None:
    for name in PYTHONS:
        machine.put(name, OLD_PYTHON)
    machine.put("python3.11", PYTHON_WITHOUT_VENV)
    assert "apt install python3.11-venv" in only_line(machine.test())


def test_another_python_is_used_where_the_newest_has_no_venv_module(machine: Machine) -> None:
    machine.put("python3.13", PYTHON_WITHOUT_VENV)
    assert machine.test().returncode == 0


def test_a_small_disk_is_reported_before_the_download(machine: Machine) -> None:
    machine.put("df", "#!/bin/sh\nprintf 'head\\ndisk 1 1 3145728 1%% /\\n'")
    assert "3 GB free, but the installation needs" in only_line(machine.test())
    assert not (machine.root / ".venv").exists()


@pytest.mark.parametrize(
    ("pip_says", "reason"),
    [
        ("ERROR: [Errno 28] No space left on device", "the disk is full"),
        (
            "NewConnectionError\nERROR: No matching distribution",
            "cannot reach the package registry",
        ),
        ("ERROR: No wheel for torch", "pip failed: ERROR: No wheel for torch"),
    ],
)
def test_failing_pip_is_explained(machine: Machine, pip_says: str, reason: str) -> None:
    result = machine.test(PIP_SAYS=pip_says)
    assert result.returncode == 1
    assert reason in result.stderr.splitlines()[-1]
