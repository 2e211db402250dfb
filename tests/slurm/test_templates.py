"""What the batch scripts do around a run: a fake torchrun records its calls."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, commands
from slurm.cluster import HERE, TEMPLATES, Cluster

PAGES = ("README.md", "docs/slurm.md", "docs/tutorials/slurm.md")
LINES = [line for page in PAGES for line in commands((ROOT / page).read_text())]
BATCH_LINES = sorted({line for line in LINES if line.startswith("sbatch ") and "--dependency" not in line})
"""Lines that submit a script; their shape is fitted to the emulated nodes."""

FEDERATED, SWEEP, COMPARE = (str(TEMPLATES / f"{name}.sbatch") for name in ("federated", "sweep", "compare"))


class Submitter:
    """Submits jobs from `folder`, with the fake torchrun and fedddp of bin/ on their PATH."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.calls_file = cluster, folder, folder / "calls"

    def submit(self, *arguments: str, do: str = "end", **variables: str) -> str:
        """Submit a job whose torchrun does `do` ("end", "stop" or "fail"), and return its id."""
        fakes = {
            "PATH": f"{HERE / 'bin'}:{self.cluster.environment['PATH']}",
            "CALLS": str(self.calls_file),
            "DO": do,
        }
        command = ("sbatch", "--parsable", *arguments)
        return self.cluster.call(*command, cwd=self.folder, **fakes, **variables)

    def calls(self) -> list[dict[str, Any]]:
        """Return the calls of torchrun, sorted by the job's restarts, array task and node."""
        calls = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        keys = ("SLURM_ARRAY_TASK_ID", "SLURM_NODEID")
        return sorted(calls, key=lambda call: [call["restarts"], *(call["environment"].get(k) for k in keys)])

    def signal_once_waiting(self, job_id: str, *options: str, nodes: int = 1) -> None:
        """Signal a job when all its nodes wait to be stopped."""
        self.await_waiting(job_id, nodes)
        self.cluster.call("scancel", *options, job_id)

    def await_waiting(self, job_id: str, nodes: int) -> None:
        """Return when all nodes of a job wait to be stopped."""
        self.await_printed(job_id, "waiting", nodes)

    def await_printed(self, job_id: str, word: str, nodes: int) -> None:
        """Return when all nodes of a job have printed `word`."""
        deadline = time.monotonic() + 20
        while (job := self.cluster.job(job_id)) and self.cluster.output(job).count(word) < nodes:
            assert time.monotonic() < deadline, f"{job}\n{self.cluster.output(job)}"
            time.sleep(0.05)


@pytest.fixture
def submitter(cluster: Cluster, tmp_path: Path) -> Submitter:
    return Submitter(cluster, tmp_path)


@pytest.mark.parametrize("path", [FEDERATED, SWEEP, COMPARE, *map(str, HERE.glob("*.sh"))])
def test_a_script_parses(path: str) -> None:
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", [FEDERATED, SWEEP, COMPARE])
def test_slurm_accepts_the_shipped_script(cluster: Cluster, path: str) -> None:
    cluster.call("sbatch", "--test-only", path, "digits")


def test_torchrun_starts_on_each_node(submitter: Submitter) -> None:
    arguments = ("digits", "--name", "my run", "--seed=1")
    job_id = submitter.submit("--nodes=2", "--ntasks-per-node=2", FEDERATED, *arguments)
    assert submitter.cluster.end(job_id)["JobState"] == "COMPLETED"
    first, second = submitter.calls()
    for rank, call in enumerate((first, second)):
        head = {"plain": "127.0.0.1"}.get(submitter.cluster.mode, "node1")
        assert call["arguments"] == [
            *("--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=2"),
            *(f"--master-addr={head}", f"--master-port={20000 + int(job_id) % 10000}"),
            *("-m", "fedddp", "run", "digits", "--name", f"fedddp-{job_id}", "--resume", "auto"),
            *arguments[1:],
        ]
        assert call["environment"]["OMP_NUM_THREADS"] == "1"
        assert call["environment"]["WANDB_MODE"] == "offline"
        assert call["ignores_usr1"], "USR1 would kill torchrun"
    assert first["environment"]["SLURMD_NODENAME"] != second["environment"]["SLURMD_NODENAME"]


def test_one_rank_per_gpu_all_cpus_and_torchruns_own_options(submitter: Submitter) -> None:
    options = {"FEDDDP_TORCHRUN": "--redirects 3 --log-dir logs"}
    job_id = submitter.submit("--gpus-per-node=2", "--cpus-per-task=4", FEDERATED, "digits", **options)
    assert submitter.cluster.end(job_id)["JobState"] == "COMPLETED"
    (call,) = submitter.calls()
    assert "--nproc-per-node=2" in call["arguments"]
    assert call["arguments"][5:12] == ["--redirects", "3", "--log-dir", "logs", "-m", "fedddp", "run"]
    assert call["environment"]["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("line", BATCH_LINES)
def test_slurm_accepts_the_lines_of_the_pages(submitter: Submitter, line: str) -> None:
    shutil.copytree(TEMPLATES, submitter.folder / "slurm")
    fitting = re.sub(r"(--(?:gpus-per-node|cpus-per-task|ntasks-per-node))=\d+", r"\1=2", line)
    program, *words = shlex.split(fitting)
    submitter.cluster.call(program, "--test-only", *words, cwd=submitter.folder)


def test_a_failed_run_fails_the_job_without_a_requeue(submitter: Submitter) -> None:
    job = submitter.cluster.end(submitter.submit("--nodes=2", FEDERATED, "digits", do="fail"))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "7:0", "0")


def test_a_port_in_use_is_passed_over(submitter: Submitter) -> None:
    job_id = submitter.submit("--hold", FEDERATED, "digits")
    port = 20000 + int(job_id) % 10000
    with socket.create_server(("127.0.0.1", port)):
        submitter.cluster.call("scontrol", "release", job_id)
        assert submitter.cluster.end(job_id)["JobState"] == "COMPLETED"
    (call,) = submitter.calls()
    assert f"--master-port={port + 1}" in call["arguments"]


def test_the_ranks_get_the_environment_of_the_script_where_jobs_start_without_one(
    submitter: Submitter,
) -> None:
    torchrun = submitter.folder / ".venv/bin/torchrun"
    torchrun.parent.mkdir(parents=True)
    calls = f"CALLS={submitter.calls_file} DO=end"
    torchrun.write_text(f'#!/bin/bash\n{calls} exec {sys.executable} {HERE}/bin/torchrun "$@"\n')
    torchrun.chmod(0o755)
    job_id = submitter.submit("--export=NONE", FEDERATED, "digits")
    assert submitter.cluster.end(job_id)["JobState"] == "COMPLETED"
    (call,) = submitter.calls()
    assert call["environment"]["PATH"].startswith(str(torchrun.parent))
    assert call["environment"]["MASTER_PORT"]


def test_a_signal_before_the_ranks_listen_is_sent_again(submitter: Submitter) -> None:
    job_id = submitter.submit("--nodes=2", FEDERATED, "digits", do="start slowly")
    submitter.await_printed(job_id, "starting", 2)
    submitter.cluster.call("scancel", "--signal=USR1", "--batch", job_id)
    (submitter.folder / "calls.listen").touch()
    job = submitter.cluster.end(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")


def test_a_missing_recipe_and_a_missing_torchrun_are_reported(submitter: Submitter) -> None:
    without_recipe = submitter.submit(FEDERATED)
    without_torchrun = submitter.cluster.call(
        *("sbatch", "--parsable", FEDERATED, "digits"), cwd=submitter.folder, PATH="/usr/bin:/bin"
    )
    for job_id, words in ((without_recipe, "usage: sbatch"), (without_torchrun, "no torchrun")):
        job = submitter.cluster.end(job_id)
        assert job["ExitCode"] == "2:0"
        assert words in submitter.cluster.output(job)


def test_a_stopped_run_is_requeued_and_resumes(submitter: Submitter) -> None:
    shape = {
        "near-limit": ("--nodes=2", "--ntasks-per-node=1"),
        "terminated": ("--nodes=2", "--ntasks-per-node=1"),
        "preempted": ("--nodes=2", "--ntasks-per-node=1", "--partition=low"),
    }
    jobs = {
        name: submitter.submit(*options, f"--job-name={name}", FEDERATED, "digits", do="stop")
        for name, options in shape.items()
    }
    submitter.signal_once_waiting(jobs["near-limit"], "--signal=USR1", "--batch", nodes=2)
    submitter.signal_once_waiting(jobs["terminated"], "--signal=TERM", nodes=2)
    submitter.await_waiting(jobs["preempted"], nodes=2)
    urgent = submitter.submit("--nodes=2", "--exclusive", "--job-name=urgent", FEDERATED, "digits")
    assert submitter.cluster.end(urgent)["JobState"] == "COMPLETED"
    for name, job_id in jobs.items():
        job = submitter.cluster.end(job_id)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
        calls = [call for call in submitter.calls() if call["environment"]["SLURM_JOB_ID"] == job_id]
        assert [call["restarts"] for call in calls] == [0, 0, 1, 1]
        runs = {tuple(call["arguments"][-4:]) for call in calls}
        assert runs == {("--name", f"{name}-{job_id}", "--resume", "auto")}
        output = submitter.cluster.output(job)
        assert output.index("waiting") < output.index("ended after 1 restarts")
    assert not list(submitter.folder.glob(".*stopped"))


def test_a_cancelled_run_is_not_requeued(submitter: Submitter) -> None:
    job_id = submitter.submit(FEDERATED, "digits", do="stop")
    submitter.signal_once_waiting(job_id)
    assert submitter.cluster.end(job_id)["JobState"] == "CANCELLED"
    assert len(submitter.calls()) == 1


def test_a_sweep_runs_every_line_and_then_compares(submitter: Submitter) -> None:
    lines = ["--algorithm FedAvg", "--seed=3 --name 'by hand'\r", "--algorithm FedProx --seed 1"]
    (submitter.folder / "lines.txt").write_text("\n".join(lines))  # an editor's: no end of the last line
    sweep = submitter.folder / "a folder" / "sweep.sbatch"
    shutil.copytree(TEMPLATES, sweep.parent)
    common = ("lines.txt", "digits", "--rounds", "5")
    # The last task's own id is the array's, and it is the one that is requeued.
    job_id = submitter.submit("--array=1-3", str(sweep), *common, do="stop", ONLY_TASK="3")
    compare_id = submitter.submit(
        f"--dependency=afterok:{job_id}", COMPARE, f"runs/sweep-{job_id}", "--accuracy", "0.9"
    )
    for name in ("01-algorithm=FedAvg", "03-algorithm=FedProx-seed=1"):
        (submitter.folder / "runs" / f"sweep-{job_id}" / name).mkdir(parents=True)
    submitter.signal_once_waiting(f"{job_id}_3", "--signal=USR1", "--batch")
    ended = [submitter.cluster.end(f"{job_id}_{task}") for task in (1, 2, 3)]
    assert [job["JobState"] for job in ended] == ["COMPLETED"] * 3
    assert [job["Restarts"] for job in ended] == ["0", "0", "1"]

    first, second, _, restarted = submitter.calls()
    assert first["arguments"][-4:] == ["--rounds", "5", "--algorithm", "FedAvg"]
    assert second["arguments"][-5:] == ["--rounds", "5", "--seed=3", "--name", "by hand"]
    arguments = restarted["arguments"][restarted["arguments"].index("run") + 1 :]
    assert arguments == [
        *("digits", "--name", f"sweep-{job_id}_3", "--resume", "auto"),
        *("--output", f"runs/sweep-{job_id}", "--tracking.group", f"sweep-{job_id}"),
        *("--name", "03-algorithm=FedProx-seed=1"),
        *("--rounds", "5", "--algorithm", "FedProx", "--seed", "1"),
    ]
    compare = submitter.cluster.end(compare_id)
    assert submitter.cluster.output(compare) == f"fedddp compare runs/sweep-{job_id} --accuracy 0.9\n"


def test_an_array_longer_than_its_file_is_reported(submitter: Submitter) -> None:
    (submitter.folder / "lines.txt").write_text("--seed 0")
    job = submitter.cluster.end(submitter.submit("--array=2-2", SWEEP, "lines.txt", "digits"))
    assert job["ExitCode"] == "2:0"
    assert "lines.txt has no line 2; use --array=1-1" in submitter.cluster.output(job)


def test_the_shipped_sweep_has_a_line_for_every_array_task() -> None:
    lines = (TEMPLATES / "sweep.txt").read_text().splitlines()
    assert f"#SBATCH --array=1-{len(lines)}\n" in Path(SWEEP).read_text()
