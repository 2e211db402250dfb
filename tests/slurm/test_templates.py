"""What the batch scripts do around a run: a stand-in for torchrun notes how it was called."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import HERE, TEMPLATES, Cluster

FEDERATED, SWEEP, COMPARE = (str(TEMPLATES / f"{name}.sbatch") for name in ("federated", "sweep", "compare"))


class Desk:
    """A folder from which jobs with the stand-ins are submitted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.notes_file = cluster, folder, folder / "notes"

    def submit(self, *arguments: str, do: str = "end", **variables: str) -> str:
        """Submit a job and return its id."""
        stand_ins = {
            "PATH": f"{HERE / 'bin'}:{self.cluster.environment['PATH']}",
            "NOTES": str(self.notes_file),
            "DO": do,
        }
        command = ("sbatch", "--parsable", *arguments)
        return self.cluster.call(*command, cwd=self.folder, **stand_ins, **variables)

    def notes(self) -> list[dict[str, Any]]:
        """Return what every call of torchrun noted, in order of life, array task and node."""
        notes = [json.loads(line) for line in self.notes_file.read_text().splitlines()]
        keys = ("SLURM_ARRAY_TASK_ID", "SLURM_NODEID")
        return sorted(notes, key=lambda n: [n["life"], *(n["environment"].get(k) for k in keys)])

    def signal_once_waiting(self, job: str, *options: str, nodes: int = 1) -> None:
        """Signal a job when all its nodes wait to be stopped."""
        self.await_waiting(job, nodes)
        self.cluster.call("scancel", *options, job)

    def await_waiting(self, job: str, nodes: int) -> None:
        """Return when all nodes of a job wait to be stopped."""
        deadline = time.monotonic() + 20
        while (facts := self.cluster.facts(job)) and self.cluster.output(facts).count("waiting") < nodes:
            assert time.monotonic() < deadline, f"{facts}\n{self.cluster.output(facts)}"
            time.sleep(0.05)


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Desk:
    return Desk(cluster, tmp_path)


@pytest.mark.parametrize("path", [FEDERATED, SWEEP, COMPARE, *map(str, HERE.glob("*.sh"))])
def test_script_parses(path: str) -> None:
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", [FEDERATED, SWEEP, COMPARE])
def test_slurm_accepts_the_script_unmodified(cluster: Cluster, path: str) -> None:
    cluster.call("sbatch", "--test-only", path, "digits")


def test_torchrun_on_each_node(desk: Desk) -> None:
    arguments = ("digits", "--name", "my run", "--seed=1")
    job = desk.submit("--nodes=2", "--ntasks-per-node=2", FEDERATED, *arguments)
    assert desk.cluster.end(job)["JobState"] == "COMPLETED"
    first, second = desk.notes()
    for rank, note in enumerate((first, second)):
        head = {"plain": "127.0.0.1"}.get(desk.cluster.mode, "node1")
        assert note["arguments"] == [
            *("--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=2"),
            *(f"--master-addr={head}", f"--master-port={20000 + int(job) % 10000}"),
            *("-m", "fedddp", "run", "digits", "--name", f"fedddp-{job}", "--resume", "auto"),
            *arguments[1:],
        ]
        assert note["environment"]["OMP_NUM_THREADS"] == "1"
        assert note["environment"]["WANDB_MODE"] == "offline"
        assert note["ignored"], "USR1 would kill torchrun"
    assert first["environment"]["SLURMD_NODENAME"] != second["environment"]["SLURMD_NODENAME"]


def test_one_rank_per_gpu_and_all_cpus_by_default(desk: Desk) -> None:
    job = desk.submit("--gpus-per-node=2", "--cpus-per-task=4", FEDERATED, "digits")
    assert desk.cluster.end(job)["JobState"] == "COMPLETED"
    (note,) = desk.notes()
    assert "--nproc-per-node=2" in note["arguments"]
    assert note["environment"]["OMP_NUM_THREADS"] == "2"


def test_failure_is_the_jobs_and_is_not_requeued(desk: Desk) -> None:
    facts = desk.cluster.end(desk.submit("--nodes=2", FEDERATED, "digits", do="fail"), timeout_s=20)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "7:0", "0")


def test_missing_recipe_and_missing_torchrun_are_told(desk: Desk) -> None:
    bare = desk.submit(FEDERATED)
    lost = desk.cluster.call(
        *("sbatch", "--parsable", FEDERATED, "digits"), cwd=desk.folder, PATH="/usr/bin:/bin"
    )
    for job, words in ((bare, "usage: sbatch"), (lost, "no torchrun")):
        facts = desk.cluster.end(job)
        assert facts["ExitCode"] == "2:0"
        assert words in desk.cluster.output(facts)


def test_stopped_runs_are_requeued_and_go_on(desk: Desk) -> None:
    shape = {
        "near-limit": ("--nodes=2", "--ntasks-per-node=1"),
        "terminated": ("--nodes=2", "--ntasks-per-node=1"),
        "preempted": ("--nodes=2", "--ntasks-per-node=1", "--partition=low"),
    }
    jobs = {
        name: desk.submit(*options, f"--job-name={name}", FEDERATED, "digits", do="stop")
        for name, options in shape.items()
    }
    desk.signal_once_waiting(jobs["near-limit"], "--signal=USR1", "--batch", nodes=2)
    desk.signal_once_waiting(jobs["terminated"], "--signal=TERM", nodes=2)
    desk.await_waiting(jobs["preempted"], nodes=2)
    urgent = desk.submit("--nodes=2", "--exclusive", "--job-name=urgent", FEDERATED, "digits")
    assert desk.cluster.end(urgent)["JobState"] == "COMPLETED"
    for name, job in jobs.items():
        facts = desk.cluster.end(job)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
        mine = [note for note in desk.notes() if note["environment"]["SLURM_JOB_ID"] == job]
        assert [note["life"] for note in mine] == [0, 0, 1, 1]
        runs = {tuple(note["arguments"][-4:]) for note in mine}
        assert runs == {("--name", f"{name}-{job}", "--resume", "auto")}
        output = desk.cluster.output(facts)
        assert output.index("waiting") < output.index("life 1 ends")
    assert not list(desk.folder.glob(".*stopped"))


def test_cancelled_run_is_not_requeued(desk: Desk) -> None:
    job = desk.submit(FEDERATED, "digits", do="stop")
    desk.signal_once_waiting(job)
    assert desk.cluster.end(job)["JobState"] == "CANCELLED"
    assert len(desk.notes()) == 1


def test_sweep_runs_every_line_and_compare_follows(desk: Desk) -> None:
    lines = ["--algorithm FedAvg", "--seed=3 --name 'by hand'", "--algorithm FedProx --seed 1"]
    (desk.folder / "lines.txt").write_text("\n".join(lines) + "\n")
    common = ("lines.txt", "digits", "--rounds", "5")
    # The last task's own id is the array's, and it is the one that is requeued.
    job = desk.submit("--array=1-3", SWEEP, *common, do="stop", ONLY_TASK="3")
    after = desk.submit(f"--dependency=afterok:{job}", COMPARE, f"runs/sweep-{job}", "--accuracy", "0.9")
    for name in ("01-algorithm=FedAvg", "03-algorithm=FedProx-seed=1"):
        (desk.folder / "runs" / f"sweep-{job}" / name).mkdir(parents=True)
    desk.signal_once_waiting(f"{job}_3", "--signal=USR1", "--batch")
    ended = [desk.cluster.end(f"{job}_{task}") for task in (1, 2, 3)]
    assert [facts["JobState"] for facts in ended] == ["COMPLETED"] * 3
    assert [facts["Restarts"] for facts in ended] == ["0", "0", "1"]

    one, two, _, again = desk.notes()
    assert one["arguments"][-4:] == ["--rounds", "5", "--algorithm", "FedAvg"]
    assert two["arguments"][-5:] == ["--rounds", "5", "--seed=3", "--name", "by hand"]
    run = again["arguments"][again["arguments"].index("run") + 1 :]
    assert run == [
        *("digits", "--name", f"sweep-{job}_3", "--resume", "auto"),
        *("--output", f"runs/sweep-{job}", "--track.group", f"sweep-{job}"),
        *("--name", "03-algorithm=FedProx-seed=1"),
        *("--rounds", "5", "--algorithm", "FedProx", "--seed", "1"),
    ]
    facts = desk.cluster.end(after)
    assert desk.cluster.output(facts) == f"fedddp compare runs/sweep-{job} --accuracy 0.9\n"


def test_array_longer_than_the_file_is_told(desk: Desk) -> None:
    (desk.folder / "lines.txt").write_text("--seed 0\n")
    facts = desk.cluster.end(desk.submit("--array=2-2", SWEEP, "lines.txt", "digits"))
    assert facts["ExitCode"] == "2:0"
    assert "lines.txt has no line 2; use --array=1-1" in desk.cluster.output(facts)


def test_shipped_sweep_fills_its_array() -> None:
    lines = (TEMPLATES / "sweep.txt").read_text().splitlines()
    assert f"#SBATCH --array=1-{len(lines)}\n" in Path(SWEEP).read_text()
