"""What a run directory records: launches with versions and commit, state, log, split, last evaluation."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file
from torch import nn

import fedddp
from fedddp import (
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    Federation,
    LocalConfig,
    Result,
    TrackingConfig,
)
from fedddp.algorithms import ClientContext, FedAvg
from fedddp.cli import main
from fedddp.data.datasets import load
from fedddp.data.partition import Dirichlet
from fedddp.distributed.launch import AnotherRankFailedError
from fedddp.storage.run_record import (
    LaunchRecord,
    age_s,
    begin,
    end,
    held,
    launch_record,
    log_file,
    read_record,
    read_warnings,
    state_of,
)
from fedddp.testing import run_world

BASE = Config(
    data=DataConfig(clients=4, partition=Dirichlet(alpha=1.0)),
    local=LocalConfig(steps=1, batch_size=20),
    cohort=CohortConfig(size=2),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=2,
    name="one",
)


def train(output: Path, **changes: Any) -> Result:
    return Federation(dataclasses.replace(BASE, output=str(output), **changes)).run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(tmp_path_factory.mktemp("finished"))


def test_a_finished_run_records_its_launch(finished: Result) -> None:
    record = read_record(finished.folder)
    assert record is not None
    assert (record.state, record.error, state_of(finished.folder)) == ("finished", None, "finished")
    (launch,) = record.sessions
    assert launch.fedddp == fedddp.__version__
    assert launch.torch == torch.__version__
    assert launch.python == ".".join(map(str, sys.version_info[:3]))
    assert launch.platform == platform.platform()
    assert (launch.ranks, launch.groups, launch.ranks_per_client, launch.from_round) == (1, 1, 1, 0)
    assert launch.threads == torch.get_num_threads()
    assert launch.device.startswith("cpu (")
    assert shlex.split(launch.command)[1:] == sys.argv[1:]
    started, ended = datetime.fromisoformat(launch.started), datetime.fromisoformat(launch.ended or "")
    assert started <= ended <= datetime.now(UTC)
    assert 0 <= age_s(launch.started) < 86_400


def test_each_launch_is_a_session(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path, resume="auto")  # nothing is left to train
    longer = train(tmp_path, resume="auto", rounds=3)
    record = read_record(longer.folder)
    assert record is not None
    assert [session.from_round for session in record.sessions] == [0, 2]
    assert all(session.ended for session in record.sessions)


class Broken(nn.Module):
    """Fails while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("no forward pass\nin this model")
        logits: torch.Tensor = self.layer(images.flatten(1))
        return logits


class FailsOnRank1(FedAvg):
    def begin(self, context: ClientContext) -> None:
        if os.environ["RANK"] == "1":
            raise ValueError("no luck\non this rank")


def fail_on_rank_1(output: str) -> str:
    with pytest.raises((AnotherRankFailedError, ValueError)) as caught:
        Federation(dataclasses.replace(BASE, algorithm=FailsOnRank1(), output=output)).run()
    return type(caught.value).__name__


def test_the_record_has_the_error_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    assert run_world(fail_on_rank_1, str(tmp_path), size=2) == ["AnotherRankFailedError", "ValueError"]
    record = read_record(tmp_path / "one")
    assert record is not None
    assert record.error is not None
    assert record.error.startswith("rank 1: no luck on this rank; while training client ")


def test_a_failed_run_records_its_error_and_a_resume_starts_afresh(tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, output=str(tmp_path))
    with pytest.raises(RuntimeError, match="no forward pass"):
        Federation(config, module=Broken()).run()
    record = read_record(tmp_path / "one")
    assert record is not None
    assert (record.state, state_of(tmp_path / "one")) == ("failed", "failed")
    assert record.error is not None
    assert record.error.startswith("no forward pass in this model")
    begin(tmp_path / "one", record.sessions[0])
    with held(tmp_path / "one"):
        assert state_of(tmp_path / "one") == "running"
    assert state_of(tmp_path / "one") == "failed", "no process holds its lock"
    end(tmp_path / "one", "stopped")
    again = read_record(tmp_path / "one")
    assert again is not None
    assert (again.state, again.error, len(again.sessions)) == ("stopped", None, 2)


def test_a_run_is_running_while_it_runs_and_has_failed_when_it_was_killed(tmp_path: Path) -> None:
    flags = ["--rounds", "100000", "--output", str(tmp_path), "--name", "one", "--tracking.trackers", "[]"]
    command = [sys.executable, "-m", "fedddp", "run", "digits", *flags]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    folder = tmp_path / "one"
    try:
        while not (folder / "history.jsonl").exists() or not (folder / "history.jsonl").stat().st_size:
            assert process.poll() is None
            time.sleep(0.05)
        assert state_of(folder) == "running"
        assert state_of(folder) == "running", "looking does not end the run's lock"
        record = read_record(folder)
        assert record is not None
        assert record.sessions[0].command == shlex.join(["fedddp", "run", "digits", *flags])
        assert record.sessions[0].ended is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert state_of(folder) == "failed"


def test_runs_of_before_have_a_state_by_their_model(tmp_path: Path) -> None:
    assert state_of(tmp_path) == "stopped"
    (tmp_path / "model.safetensors").touch()
    assert state_of(tmp_path) == "finished"
    for content in ("", "[]", '{"state": "finished"}', '{"sessions": [{"x": 1}]}', "[" * 100_000):
        (tmp_path / "run.json").write_text(content)
        assert read_record(tmp_path) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("started", 5), ("started", "yesterday"), ("started", "2026-11-26T10:00:00"), ("ended", 5)),
        *(("git_commit", 5), ("from_round", "x"), ("ranks", None), ("device", ["cpu"])),
        *(("state", "odd"), ("state", [1]), ("error", 5), ("sessions", [])),
    ],
    ids=str,
)
def test_a_record_with_a_wrong_value_is_none(finished: Result, tmp_path: Path, key: str, value: Any) -> None:
    content = json.loads((finished.folder / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert read_record(tmp_path) is not None
    (content if key in content else content["sessions"][0])[key] = value
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert read_record(tmp_path) is None


def test_a_run_does_not_end_its_own_lock_by_looking_at_itself(tmp_path: Path) -> None:
    """A run killed after its last checkpoint: its record is `running`, and nothing is left to train."""
    folder = train(tmp_path).folder
    record = folder / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    look = (
        "import sys; from pathlib import Path; from fedddp.storage.run_record import state_of\n"
        f"print(state_of(Path({str(folder)!r})))"
    )
    seen: list[str] = []

    class Look(fedddp.Callback):
        def on_run_end(self, result: Any) -> None:
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            run = subprocess.run(
                [sys.executable, "-c", look], env=env, capture_output=True, text=True, check=False
            )
            seen.append(run.stdout.strip() or run.stderr)

    config = dataclasses.replace(BASE, output=str(tmp_path), resume="auto")
    (folder / ".lock").chmod(0o644)
    Federation(config, callbacks=[Look()]).run()
    assert seen == ["running"]
    assert state_of(folder) == "finished"


def test_the_commit_of_the_working_folder_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    def recorded() -> str | None:
        cpu = torch.device("cpu")
        return launch_record(cpu, ranks=1, groups=1, ranks_per_client=1, from_round=0).git_commit

    monkeypatch.chdir(tmp_path)
    assert recorded() is None
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "first")
    git("tag", "-a", "v1", "-m", "a tag is not the commit")
    commit = git("rev-parse", "HEAD")
    assert recorded() == commit
    (tmp_path / "file").write_text("b")
    assert recorded() == f"{commit}+"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert recorded() is None, "a machine without git"


def test_warnings_are_read_back_from_the_log(tmp_path: Path) -> None:
    logger = logging.getLogger("fedddp.some.module")
    lost = ["round 3: lost", "worse: WARNING"] * 2
    for launch in range(2):
        with log_file(tmp_path) as write:
            logger.info("not a warning")
            logger.warning("round %d: lost", 3)
            assert read_warnings(tmp_path) == lost[: 2 * launch], "held until the run begins"
            write()
            assert read_warnings(tmp_path)[-1] == "round 3: lost"
            logger.error("worse: WARNING")
    logger.warning("outside of the run")
    with log_file(tmp_path):
        logger.warning("of a run that was refused")
    assert read_warnings(tmp_path) == lost
    assert read_warnings(tmp_path / "none") == []


def test_a_log_that_cannot_be_opened_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "run.log").mkdir()
    with log_file(tmp_path) as write:
        logging.getLogger("fedddp").warning("lost")
        write()
        logging.getLogger("fedddp").warning("lost too")


def test_what_a_full_disk_leaves_of_the_last_evaluation_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "one" / "wrong.safetensors").mkdir(parents=True)
    result = train(tmp_path)
    assert state_of(result.folder) == "finished"
    (line,) = read_warnings(result.folder)
    assert line.endswith("; the run has no evaluation.json")


def test_what_is_known_of_the_final_model_goes_with_it(tmp_path: Path) -> None:
    class Stop(fedddp.Callback):
        def on_round_end(self, round: int, metrics: dict[str, Any], model: nn.Module) -> None:
            if round == 3:
                raise KeyboardInterrupt

    folder = train(tmp_path).folder
    files = ("model.safetensors", "evaluation.json", "wrong.safetensors")
    lines = (folder / "history.jsonl").read_text()
    config = dataclasses.replace(BASE, output=str(tmp_path), resume="auto", rounds=4)
    (folder / "history.jsonl").write_text("")
    with pytest.raises(ConfigError, match="does not have one row"):
        Federation(config).run()
    assert all((folder / name).exists() for name in files), "a resume that is refused takes nothing away"
    (folder / "history.jsonl").write_text(lines)
    with pytest.raises(KeyboardInterrupt):
        Federation(config, callbacks=[Stop()]).run()
    assert not any((folder / name).exists() for name in files)
    assert (folder / "model-00002.safetensors").exists()


def test_a_log_on_a_full_disk_is_no_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "run.log").symlink_to("/dev/full")
    with log_file(tmp_path) as write:
        write()
        logging.getLogger("fedddp").warning("lost")
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_ends_with_its_report_where_a_setting_asks_for_it(tmp_path: Path) -> None:
    tracking = TrackingConfig(trackers=[], progress=False, report=True)
    folder = train(tmp_path, tracking=tracking).folder
    assert ">finished<" in (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    assert train(tmp_path, tracking=tracking, resume="auto", rounds=3).finished
    (line,) = read_warnings(folder)
    assert line.startswith("report: ")
    assert line.endswith("; the run has no report page")


def test_the_record_of_the_split_holds_what_each_client_holds(finished: Result) -> None:
    split = json.loads((finished.folder / "split.json").read_text())
    train_images, _ = load(BASE.data)
    clients, _ = BASE.data.split(train_images, BASE.seed)
    assert split["clients"] == 4
    assert split["examples"] == len(train_images)
    assert split["class_names"] == list("0123456789")
    for client, share in enumerate(split["shares"]):
        labels = train_images.labels[clients.indices(client)].tolist()
        assert share == {
            "client": client,
            "name": None,
            "size": len(labels),
            "histogram": [labels.count(c) for c in range(10)],
        }


def test_the_last_evaluation_holds_the_confusion_matrix_and_the_most_certain_errors(finished: Result) -> None:
    content = json.loads((finished.folder / "evaluation.json").read_text())
    images = load_file(finished.folder / "wrong.safetensors")["images"]
    _, test = load(BASE.data)
    assert test is not None
    assert test.pixels is not None
    # By hand, one image at a time.
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (test.mean, test.std))
    confusion, wrong = np.zeros((10, 10), dtype=int), []
    with torch.no_grad():
        for index, (pixels, label) in enumerate(zip(test.pixels, test.labels.tolist(), strict=True)):
            logits = finished.model(((pixels / 255 - mean) / std)[None])[0].double()
            exponents = np.exp(logits.numpy() - logits.max().item())
            predicted = int(exponents.argmax())
            confusion[label, predicted] += 1
            if predicted != label:
                wrong.append((exponents[predicted] / exponents.sum(), index, label, predicted))
    assert content["round"] == 2
    assert content["confusion"] == confusion.tolist()
    wrong.sort(key=lambda one: -one[0])
    assert len(wrong) > 24, "the test needs more than are kept"
    assert [one["index"] for one in content["wrong"]] == [index for _, index, _, _ in wrong[:24]]
    assert [(one["label"], one["predicted"]) for one in content["wrong"]] == [o[2:] for o in wrong[:24]]
    assert [one["probability"] for one in content["wrong"]] == pytest.approx([o[0] for o in wrong[:24]], 1e-4)
    assert torch.equal(images, test.pixels[[index for _, index, _, _ in wrong[:24]]])
    last = finished.history[-1]
    assert content["metrics"]["accuracy"] == last["eval/accuracy"] == confusion.trace() / confusion.sum()
    assert content["metrics"]["loss"] == pytest.approx(last["eval/loss"], rel=1e-6)


def test_the_last_evaluation_is_the_same_for_any_number_of_ranks(finished: Result, tmp_path: Path) -> None:
    run_world(train, tmp_path, size=3)
    for name in ("evaluation.json", "split.json"):
        one, three = (
            json.loads((folder / name).read_text()) for folder in (finished.folder, tmp_path / "one")
        )
        metrics = [part.pop("metrics", {}) for part in (one, three)]
        assert one == three or name == "evaluation.json"
        if name == "evaluation.json":
            assert one["confusion"] == three["confusion"]
            assert [w["index"] for w in one["wrong"]] == [w["index"] for w in three["wrong"]]
            assert metrics[0]["recall"] == metrics[1]["recall"]
    images = [load_file(f / "wrong.safetensors")["images"] for f in (finished.folder, tmp_path / "one")]
    assert torch.equal(*images)
    record = read_record(tmp_path / "one")
    assert record is not None
    assert (record.sessions[0].ranks, record.sessions[0].groups) == (3, 3)


def test_a_record_survives_writing_and_reading(tmp_path: Path) -> None:
    launch = launch_record(torch.device("cpu"), ranks=4, groups=2, ranks_per_client=2, from_round=7)
    begin(tmp_path, launch)
    end(tmp_path, "failed", "why")
    record = read_record(tmp_path)
    assert record is not None
    assert isinstance(record.sessions[0], LaunchRecord)
    assert dataclasses.replace(record.sessions[0], ended=None) == launch
    assert (record.state, record.error) == ("failed", "why")
    end(tmp_path / "gone", "finished")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("name", ["run.json", "split.json", "evaluation.json", "history.jsonl"])
def test_a_file_that_is_nested_too_deeply_is_a_corrupt_file(
    finished: Result, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deep"
    shutil.copytree(finished.folder, folder)
    (folder / name).write_text("[" * 200_000 + "\n" + (folder / name).read_text())
    for command in ("card", "show", "report", "runs"):
        with pytest.raises(SystemExit):
            main([command, str(folder if command != "runs" else tmp_path)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        assert len(printed.err.splitlines()) <= 1, command
