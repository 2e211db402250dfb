"""Fixtures of all tests: an empty folder, the same environment afterwards, no dashboards."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before the fork server starts and torch counts the cores: ranks of one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
# A suite under nohup, or in the background of a script, inherits these ignored, which its runs would heed.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# One worker waits for Slurm while the others train in worlds of ranks; short files come last, so that
# all end at the same time. A worker takes another file when two tests or fewer are left of its own.
FIRST = (
    *("slurm/test_training", "test_algorithms", "slurm/test_templates", "test_robust", "test_identities"),
    *("e2e/test_torchrun", "e2e/test_killed_group", "test_faults", "test_docs", "test_benchmarks"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Have xdist give out files as they are ordered here, not by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of FIRST."""
    order = {Path(__file__).parent / f"{name}.py": index for index, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_runtest_setup() -> None:
    """Seed the global generators: a module that a test makes does not depend on the tests before."""
    for name, seed in (("numpy.random", "seed"), ("torch", "manual_seed")):
        if name in sys.modules:
            getattr(sys.modules[name], seed)(0)


@pytest.fixture(scope="session")
def empty_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield empty folders; `tmp_path` searches those of all tests before for each new one."""
    root = tmp_path_factory.mktemp("empty")

    def made() -> Iterator[Path]:
        for number in itertools.count():
            folder = root / str(number)
            folder.mkdir()
            yield folder

    return made()


@pytest.fixture(autouse=True)
def no_leaks(
    request: pytest.FixtureRequest, empty_folders: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Run in an empty folder; environment and process group are the same before and after."""
    own = "tmp_path" in request.fixturenames
    monkeypatch.chdir(request.getfixturevalue("tmp_path") if own else next(empty_folders))
    before = dict(os.environ)
    yield
    changed = {k for k in {*before, *os.environ} if before.get(k) != os.environ.get(k)}
    for name in changed:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    # Importing torchvision sets the third (by way of torch's compiler), importing scikit-learn the last two.
    allowed = {"PYTEST_CURRENT_TEST", "GLOO_SOCKET_IFNAME", "TORCHINDUCTOR_CACHE_DIR"}
    allowed |= {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
    assert changed <= allowed, changed
    # Not imported here, where xdist's controller would wait for it.
    dist = sys.modules.get("torch.distributed")
    assert not (dist and dist.is_initialized()), "a process group was left behind"


@pytest.fixture
def no_dashboards() -> Iterator[None]:
    """Keep wandb out of tests that are about something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()  # it would stay disabled for the tests that follow
