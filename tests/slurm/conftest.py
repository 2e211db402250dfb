"""Start the emulated Slurm once for all tests of this folder, and stop it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from slurm.cluster import HERE, SEARCH, Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes with 4 CPUs and 2 fake GPUs each; jobs in the partition `low` can be preempted."""
    programs = ("slurmctld", "slurmd", "sbatch", "munged")
    missing = [program for program in programs if not shutil.which(program, path=SEARCH)]
    if missing:
        reason = (
            f"no {', '.join(missing)}; on Debian or Ubuntu: "
            "apt install --no-install-recommends slurmctld slurmd slurm-client munge"
        )
        if os.environ.get("FEDDDP_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    start = subprocess.run(
        [HERE / "start-slurm.sh", "-n", "2", "-c", "4", "-g", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert start.returncode == 0, start.stderr
    lines = [line.removeprefix("export ") for line in start.stdout.splitlines()]
    variables = dict(line.split("=", 1) for line in lines)
    try:
        yield Cluster(variables)
    finally:
        subprocess.run([HERE / "stop-slurm.sh", variables["SLURM_CI_DIR"], "--rm"], check=True, timeout=60)
