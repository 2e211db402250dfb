"""The sdist is the whole project; the wheel built from it holds what a run needs, and the page on PyPI."""

from __future__ import annotations

import email.message
import email.parser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from pages import ROOT, assert_target_exists

from fedddp.cli import main

FILES, IMAGES = (
    "https://github.com/fedddp/fedddp/blob/main/",
    "https://raw.githubusercontent.com/fedddp/fedddp/main/",
)
FOLDERS = (".git", ".github", ".venv", ".hypothesis", "site", "runs", "wandb", "build", "dist")
NOT_SHIPPED = (*FOLDERS, "slurm")
"""What a checkout has and the sdist has not; `slurm` leads to fedddp/slurm."""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an unpacked sdist, made from a copy of the checkout, without a network."""
    copy, output = tmp_path_factory.mktemp("checkout") / "fedddp", tmp_path_factory.mktemp("sdist")
    left_out = shutil.ignore_patterns("__pycache__", ".*_cache", ".cache", "*.egg-info", *FOLDERS)
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(output)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (archive,) = output.glob("fedddp-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(output, filter="data")
    return output / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the sdist alone."""
    output = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(output), str(unpacked)], check=True, capture_output=True)
    (built,) = output.glob("fedddp-*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    """Return what PyPI's page is made of."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def shipped(folder: Path) -> set[str]:
    """Return the files of a checkout or of an unpacked sdist, without what tools leave there."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    tools = re.compile(r"__pycache__|_cache$|\.cache$|\.egg-info$")
    mine = {file for file in files if not any(tools.search(part) for part in file.parts)}
    return {str(file) for file in mine if file.parts[0] not in NOT_SHIPPED and file.suffix != ".pyc"}


# ---- the sdist ----


def test_sdist_holds_every_file_of_the_project(unpacked: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode == 0:
        names = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()}
        files = {name for name in names if name.partition("/")[0] not in NOT_SHIPPED}
    else:  # an sdist that tests itself
        files = shipped(ROOT) - {"PKG-INFO", "setup.cfg"}
    assert len(files) > 200
    assert files - shipped(unpacked) == set()
    assert shipped(unpacked) - files <= {"PKG-INFO", "setup.cfg"}


def test_tests_of_the_sdist_find_their_helpers_and_the_pages(unpacked: Path) -> None:
    names = ("tests/test_readme.py", "tests/slurm/test_templates.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names, "-k", "links or parses"],
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": str(unpacked), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


# ---- the wheel ----


def test_wheel_holds_recipes_digits_batch_scripts_licences_and_type_marker(
    wheel: Path, unpacked: Path
) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {name for name in shipped(unpacked) if name.startswith("fedddp/")}
    assert files <= names
    assert {"fedddp/py.typed", "fedddp/recipes/digits.yaml", "fedddp/data/digits.csv.gz"} <= names
    assert "fedddp/slurm/federated.sbatch" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("digits.LICENSE.txt") and "dist-info" in name for name in names)
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"fedddp"}


def test_wheel_trains_a_recipe_elsewhere_and_writes_the_batch_scripts(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:  # what an installer does with a pure Python wheel
        archive.extractall(site)
    code = (
        "import fedddp, sys, contextlib\n"
        "assert fedddp.__file__.startswith(sys.argv.pop(1)), fedddp.__file__\n"
        "from fedddp.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['slurm'])\n"
        "main(sys.argv[1:])"
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
    for script in (ROOT / "fedddp" / "slurm").iterdir():
        assert (tmp_path / "slurm" / script.name).read_bytes() == script.read_bytes()


# ---- the batch scripts ----


def type_slurm(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(["slurm", *words])
    return stop.value.code


def test_the_folder_of_a_checkout_is_that_of_the_package() -> None:
    if (ROOT / "slurm").exists():  # an sdist has none
        assert (ROOT / "slurm").resolve() == ROOT / "fedddp" / "slurm"


def test_batch_scripts_are_written_once_and_changed_ones_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert type_slurm("jobs/mine") == 0
    lines = capsys.readouterr().out.splitlines()
    names = sorted(path.name for path in (ROOT / "fedddp" / "slurm").iterdir())
    assert lines == [
        *(f"jobs/mine/{name}" for name in names),
        "Submit a run: sbatch jobs/mine/federated.sbatch digits",
    ]
    Path("jobs/mine/sweep.txt").write_text("--seed 7\n")
    assert type_slurm("jobs/mine") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("(there already" in line for line in lines[:-1])
    assert Path("jobs/mine/sweep.txt").read_text() == "--seed 7\n"
    assert "not as it ships" in lines[names.index("sweep.txt")]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("a", "b"), "slurm takes one folder, got a b"),
        (("--copy",), "slurm takes one folder"),
        (("file",), "slurm: "),
    ],
)
def test_a_wrong_folder_is_one_line(
    words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    assert type_slurm(*words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {error}")
    assert printed.count("\n") == 1


# ---- the page on PyPI ----


def test_pypi_shows_authors_links_classifiers_and_keywords(metadata: email.message.Message) -> None:
    assert metadata["Author"] == "The fedddp authors"
    assert metadata["License-Expression"] == "Apache-2.0"
    labels = {url.partition(",")[0] for url in metadata.get_all("Project-URL", [])}
    assert labels == {"Homepage", "Documentation", "Repository", "Changelog", "Issues"}
    classifiers = metadata.get_all("Classifier", [])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)} <= set(classifiers)
    assert len(metadata["Keywords"].split(",")) >= 6
    extras = {"dev", "docs", "export", "detection", "tiff", "privacy", "secure"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_links_of_the_page_lead_to_files_of_the_repository(
    metadata: email.message.Message,
) -> None:
    text = str(metadata.get_payload())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert text.startswith("# fedddp")
    targets = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", text)
    own = {(image, target) for image, target in targets if target.startswith((FILES, IMAGES))}
    assert len(own) > 10
    for image, target in targets:
        assert target.startswith("https://"), target
        assert target.startswith(IMAGES if image else "https://"), target
    for _, target in own:
        assert_target_exists(target.removeprefix(FILES).removeprefix(IMAGES), ROOT / "README.md")
    assert re.findall(r'(?:src|srcset|href)="(?!https?://)', text) == []


# ---- the citation ----


def test_citation_has_the_keys_of_its_schema_and_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # required
    known = """abstract authors cff-version date-released doi identifiers keywords license license-url message
        preferred-citation references repository repository-artifact repository-code title type url version"""
    assert set(citation) <= set(known.split())
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset")
    assert citation["authors"] == [{"name": author["name"]} for author in project["authors"]]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["repository-code"] == project["urls"]["Repository"]
    assert len(set(citation["keywords"])) == len(citation["keywords"]) > 0
