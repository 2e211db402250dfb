"""The wheel holds everything that a run needs, and works from another directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the checkout, without a network."""
    copy, output = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "fedddp", copy / "fedddp", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(output), str(copy)], check=True, capture_output=True)
    (built,) = output.glob("fedddp-*.whl")
    return built


def test_wheel_holds_recipes_digits_licences_and_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "fedddp").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {str(path.relative_to(ROOT)) for path in files} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("digits.LICENSE.txt") and "dist-info" in name for name in names)


def test_wheel_trains_a_recipe_in_another_directory(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:  # what an installer does with a pure Python wheel
        archive.extractall(site)
    code = (
        "import fedddp, sys; assert fedddp.__file__.startswith(sys.argv.pop(1)), fedddp.__file__;"
        "from fedddp.cli import main; main(sys.argv[1:])"
    )
    command = ["run", "digits", "--rounds", "1", "--data.examples", "100", "--tracking.trackers", "[]"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(site), *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "digits" / "model.safetensors").exists()
