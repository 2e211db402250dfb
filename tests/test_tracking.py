"""History on disk, progress on the screen, and trackers that may fail without ending the run."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import save_file
from wandb_files import history as wandb_history
from wandb_files import last_summary, read_run

from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.storage.history import History, read_rows
from fedddp.testing import run_world
from fedddp.tracking import wandb_run
from fedddp.tracking.heat_map import heat_map
from fedddp.tracking.tracker import NullTracker, Tracker, TrackingConfig

CONFIG = {"seed": 3, "data": {"clients": 20, "partition": {"alpha": 0.3}}, "tags": ["a", "b"]}


@pytest.fixture(autouse=True)
def patch(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Keep wandb's caches and the user's login out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
        patch.setenv("NETRC", str(tmp_path / "no-netrc"))
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        yield patch
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()  # forgets login and settings, ends its service


def track_run(folder: Path, tracking: TrackingConfig, rounds: int = 3, **options: Any) -> str:
    """Track a small run to its end; return what it printed."""
    folder.mkdir(exist_ok=True)
    console = Console(file=io.StringIO(), width=80)
    tracker = Tracker(tracking, folder, CONFIG, name="demo", total_rounds=rounds, console=console, **options)
    for index in range(options.get("resume_round", 0) + 1, rounds + 1):
        tracker.client_done(4)
        tracker.log({"round": index, "train/loss": 1 / index, "eval/recall": [0.5, index / 4]})
        tracker.log_clients(
            [{"round": index, "client": c, "eval/accuracy": c / 4 + index / 100} for c in range(2)]
        )
    model = folder / "model.safetensors"
    save_file({"weight": torch.ones(2)}, model, {"config_digest": "0123"})
    tracker.finish(model, {"eval/accuracy": 0.75})
    tracker.finish()
    assert tracker.run_id is None or tracker.run_id in str(list(folder.glob("wandb/*")))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_are_on_disk_as_json_before_the_run_ends(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.log({"round": 1, "loss": np.float32(0.5), "recall": np.arange(2), "bad": float("nan")})
    assert read_rows(tmp_path / "history.jsonl") == [{"round": 1, "loss": 0.5, "recall": [0, 1], "bad": None}]
    history.sync()
    history.close()


def test_a_history_whose_folder_was_moved_away_is_refused_and_makes_none(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="it was deleted or moved while the run lasted: '.*run'"):
        History(folder)
    assert not folder.exists()


@pytest.mark.parametrize("partial", ["", '{"round": 4, "lo', '{"round": 4}'])
def test_a_resume_keeps_the_rows_up_to_the_checkpoint(tmp_path: Path, partial: str) -> None:
    for name, clients in (("history.jsonl", 1), ("clients.jsonl", 2)):
        lines = [json.dumps({"round": r, "é": i}) + "\n" for r in (1, 2, 3) for i in range(clients)]
        (tmp_path / name).write_text("".join(lines) + partial, encoding="utf-8")
    assert len(read_rows(tmp_path / "clients.jsonl")) == 6
    history = History(tmp_path, keep_rounds=2)
    history.log({"round": 3})
    history.log_clients([{"round": 3, "client": 7}])
    history.close()
    assert [row["round"] for row in read_rows(tmp_path / "history.jsonl")] == [1, 2, 3]
    assert [row["round"] for row in read_rows(tmp_path / "clients.jsonl")] == [1, 1, 2, 2, 3]
    assert read_rows(tmp_path / "clients.jsonl")[-1] == {"round": 3, "client": 7}
    History(tmp_path).close()
    assert read_rows(tmp_path / "history.jsonl") == []


def test_a_resume_from_the_last_round_keeps_all_rows(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"round": 1}\n{"round": 2}\n{"rou')
    History(tmp_path, keep_rounds=2).close()
    assert (tmp_path / "history.jsonl").read_text() == '{"round": 1}\n{"round": 2}\n'


def test_a_corrupt_line_inside_is_reported_and_no_row_is_cut(tmp_path: Path) -> None:
    text = '{"round": 1}\n{"rou\n{"round": 3}\n'
    (tmp_path / "history.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"history\.jsonl line 2 is corrupt.*another folder"):
        History(tmp_path, keep_rounds=3)
    assert (tmp_path / "history.jsonl").read_text() == text


@pytest.mark.parametrize(
    "rounds",
    [None, [], [1, 2], [2, 3], [1, 3], [1, 2, 2, 3], [1, 1, 2, 3], [0, 1, 2, 3], [1, 3, 2], [4]],
    ids=str,
)
def test_a_history_that_does_not_have_every_round_of_the_checkpoint_once_is_refused(
    tmp_path: Path, rounds: list[float] | None
) -> None:
    path = tmp_path / "history.jsonl"
    if rounds is not None:
        path.write_text("".join(json.dumps({"round": number}) + "\n" for number in rounds))
    with pytest.raises(ValueError, match="does not have one row for each of the rounds 1 to 3") as error:
        History(tmp_path, keep_rounds=3)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert path.exists() == (rounds is not None), "nothing is repaired"
    if rounds is not None:
        assert [row["round"] for row in read_rows(path)] == rounds


@pytest.mark.parametrize("file", ["history.jsonl", "clients.jsonl"])
@pytest.mark.parametrize("fate", ["deleted", "moved", "replaced"])
def test_a_row_is_not_written_to_a_file_that_is_gone(tmp_path: Path, file: str, fate: str) -> None:
    history = History(tmp_path)
    history.log({"round": 1})
    history.log_clients([{"round": 1, "client": 0}])
    (tmp_path / file).rename(tmp_path / "elsewhere")
    if fate == "deleted":
        (tmp_path / "elsewhere").unlink()
    if fate == "replaced":
        (tmp_path / file).write_text('{"round": 1}\n')
    with pytest.raises(FileNotFoundError, match="it was deleted or moved while the run lasted") as error:
        history.log({"round": 2}) if file == "history.jsonl" else history.log_clients([{"round": 2}])
    assert error.value.filename == str(tmp_path / file)
    assert (tmp_path / file).exists() == (fate == "replaced")
    if fate == "moved":
        assert len(read_rows(tmp_path / "elsewhere")) == 1
    history.close()


def test_a_killed_run_leaves_every_logged_round(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from fedddp.storage.history import History\n"
        "history = History(Path(sys.argv[1]))\n"
        "for index in range(1, 6): history.log({'round': index})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(read_rows(tmp_path / "history.jsonl")) == 5


@pytest.fixture
def small_files() -> Iterator[None]:
    """Limit files of this process to 4,000 bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_reported_in_one_line_and_leaves_no_partial_row(
    tmp_path: Path, small_files: None
) -> None:
    history, row = History(tmp_path), {"x": "y" * 300}
    for written in range(12):
        history.log({"round": written + 1, **row})
    with pytest.raises(OSError, match=r"make room, then resume with --resume auto .*history.jsonl"):
        history.log({"round": 13, **row})
    assert [r["round"] for r in read_rows(tmp_path / "history.jsonl")] == list(range(1, 13))
    assert (tmp_path / "history.jsonl").read_bytes().endswith(b"\n")
    with pytest.raises(OSError, match="make room"):  # rows that belong together: all or none
        history.log_clients([{"round": 1, **row}] * 100)
    assert (tmp_path / "clients.jsonl").read_bytes() == b""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    history.log({"round": 13, **row})
    assert len(read_rows(tmp_path / "history.jsonl")) == 13
    history.close()


def test_without_progress_nothing_is_printed(tmp_path: Path) -> None:
    assert track_run(tmp_path, TrackingConfig(trackers=[], progress=False)) == ""
    assert len(read_rows(tmp_path / "clients.jsonl")) == 6


def test_an_offline_wandb_run_is_complete_and_a_resume_continues_it(tmp_path: Path) -> None:
    tracking = TrackingConfig(project="lab", group="sweep", tags=["x"])
    shown = track_run(tmp_path, tracking)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert shown.splitlines()[-1] == f"To upload the run: wandb sync {folder}"
    assert "wandb:" not in shown
    records = read_run(folder)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert {**run["config"]["update"], "_wandb": 0} == {**CONFIG, "_wandb": 0}
    assert (run["project"], run["display_name"], run["run_group"]) == ("lab", "demo", "sweep")
    items = wandb_history(records)
    assert {step: item["train/loss"] for step, item in items.items()} == {1: 1, 2: 1 / 2, 3: 1 / 3}
    assert items[3]["clients/table.nrows"] == 2
    table = json.loads((folder / "files" / items[3]["clients/table.path"]).read_text())
    assert table["columns"] == ["round", "client", "eval/accuracy"]
    assert table["data"] == [[3, 0, 0.03], [3, 1, 0.28]]
    model = next(r["artifact"] for r in records if r.get("artifact", {}).get("type") == "model")
    (file,) = model["manifest"]["contents"]
    assert file["local_path"] == str(tmp_path / "model.safetensors")
    assert last_summary(records)["eval/accuracy"] == 0.75
    assert [record["exit"]["exit_code"] for record in records if "exit" in record] == [0]

    shown = track_run(tmp_path, tracking, rounds=5, resume_round=3, run_id=run["run_id"])
    (again,) = set(tmp_path.glob("wandb/offline-run-*")) - {folder}
    records = read_run(again)
    assert next(r["run"]["run_id"] for r in records if r["type"] == "run") == run["run_id"]
    assert list(wandb_history(records)) == [4, 5]
    pattern = shown.split()[-1]
    # As wandb names a second session within the same second.
    again = again.rename(folder.with_name(f"{folder.name}-1"))
    assert set(tmp_path.parent.glob(str(Path(pattern).relative_to(tmp_path.parent)))) == {
        folder,
        again,
    }
    assert [row["round"] for row in read_rows(tmp_path / "history.jsonl")] == [1, 2, 3, 4, 5]


def test_what_a_run_ends_with_is_drawn_for_wandb_and_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_ending(tmp_path)
    tracking = TrackingConfig(trackers=["wandb", "tensorboard"], mode="offline", progress=False)
    track_run(tmp_path, tracking)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    item = wandb_history(read_run(folder))[3]
    table = json.loads((folder / "files" / item["eval/confusion_table.path"]).read_text())
    assert table["columns"] == ["Actual", "Predicted", "nPredictions"]
    assert table["data"] == [["cat", "cat", 5], ["cat", "dog", 2], ["dog", "cat", 0], ["dog", "dog", 9]]
    assert (folder / "files" / item["clients/split.path"]).read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key in ("clients/split", "eval/confusion"):
        (picture,) = events.Images(key)
        assert (picture.step, picture.width, picture.height) == (3, 700, 600)


def write_ending(folder: Path, classes: int = 2) -> None:
    """Write what federation.py writes for the end of a run."""
    names = ["cat", "dog", *(f"class {index}" for index in range(2, classes))]
    shares = [{"client": c, "size": 3, "histogram": [3 * (k == c) for k in range(classes)]} for c in range(2)]
    (folder / "split.json").write_text(json.dumps({"class_names": names, "shares": shares}))
    confusion = np.zeros((classes, classes), dtype=int)
    confusion[:2, :2] = [[5, 2], [0, 9]]
    (folder / "evaluation.json").write_text(json.dumps({"round": 3, "confusion": confusion.tolist()}))


def test_a_confusion_matrix_of_many_classes_is_a_picture(tmp_path: Path) -> None:
    write_ending(tmp_path, classes=wandb_run.MOST_CHART_CLASSES + 1)
    track_run(tmp_path, TrackingConfig(mode="offline", progress=False))
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    item = wandb_history(read_run(folder))[3]
    assert item["eval/confusion._type"] == "image-file"
    assert "eval/confusion_table.path" not in item


@pytest.mark.parametrize("ends", ["stopped", "failed"])
def test_a_run_that_did_not_finish_has_no_model_and_no_confusion_matrix(tmp_path: Path, ends: str) -> None:
    write_ending(tmp_path)  # of an earlier end of the run, before it was given more rounds
    tracking = TrackingConfig(mode="offline", progress=False)
    tracker = Tracker(tracking, tmp_path, CONFIG, name="demo", total_rounds=3)
    tracker.log({"round": 1, "eval/accuracy": 0.5})
    tracker.finish(failed=ends == "failed")
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    records = read_run(folder)
    media = {key.partition(".")[0] for key in wandb_history(records)[1] if "." in key}
    assert media == ({"clients/split"} if ends == "stopped" else set())
    assert not any(record.get("artifact", {}).get("type") == "model" for record in records)
    codes = [record["exit"]["exit_code"] for record in records if "exit" in record]
    assert codes == [1 if ends == "failed" else 0]
    assert last_summary(records)["best/accuracy"] == 0.5


def test_corrupt_files_of_a_run_cost_what_is_in_them_only(tmp_path: Path) -> None:
    write_ending(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"confusion": [[1')
    shown = track_run(tmp_path, TrackingConfig(mode="offline", progress=False)).splitlines()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    pictures, sync = shown
    assert pictures.startswith("wandb: Expecting")
    assert pictures.endswith("; the pictures could not be added to the run")
    assert sync == f"To upload the run: wandb sync {folder}"
    records = read_run(folder)
    assert [record["exit"]["exit_code"] for record in records if "exit" in record] == [0]
    assert [r["artifact"]["aliases"] for r in records if r.get("artifact", {}).get("type") == "model"]

    (shown_too,) = track_run(tmp_path, TrackingConfig(trackers=["tensorboard"], progress=False)).splitlines()
    assert shown_too.startswith("tensorboard: Expecting")
    assert list(tmp_path.glob("tensorboard/events*"))


def test_a_heat_map_is_dark_where_the_count_is() -> None:
    """The first row is at the top, the first column on the left."""
    for row, column in ((0, 0), (0, 3), (3, 0)):
        counts = np.zeros((4, 4), dtype=int)
        counts[row, column] = 7
        picture = heat_map(counts.tolist(), list("abcd"), list("wxyz"), ("columns", "rows"), "title")
        dark = np.argwhere(np.abs(picture[:, :620].astype(int) - (8, 48, 107)).max(axis=2) < 4)
        height, width = dark.mean(axis=0)
        assert (height > 300, width > 300) == (row == 3, column == 3)
        assert 15_000 < len(dark) < 20_000, "a sixteenth of the axes"


def wandb_ids(folder: Path) -> list[str]:
    """Return the id of the wandb run of every session in `folder`."""
    return [path.name.split("-")[3] for path in folder.glob("wandb/offline-run-*")]


def test_two_runs_of_one_process_are_two_wandb_runs_under_one_wandb_run_id(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    patch.setenv("WANDB_RUN_ID", "given")
    patch.setattr(wandb_run, "_USED_IDS", set())
    offline = TrackingConfig(mode="offline", progress=False)
    for name in ("a", "b", "c"):
        track_run(tmp_path / name, offline)
    (first,), (second,), (third,) = (wandb_ids(tmp_path / name) for name in "abc")
    assert first == "given"
    assert len({first, second, third}) == 3
    track_run(tmp_path / "b", offline, rounds=4, resume_round=3, run_id=second)
    assert wandb_ids(tmp_path / "b") == [second, second], "a resumed run is the same one"


def test_a_model_that_wandb_refuses_costs_its_artifact_only(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("artifact names must be shorter\nand more")

    patch.setattr(wandb.Run, "log_artifact", refuse)
    shown = track_run(tmp_path, TrackingConfig(mode="offline")).splitlines()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert shown[-2:] == [
        "wandb: artifact names must be shorter; the model could not be added to the run",
        f"To upload the run: wandb sync {folder}",
    ]
    records = read_run(folder)
    assert sum("history" in record for record in records) == 3
    assert [record["exit"]["exit_code"] for record in records if "exit" in record] == [0]
    assert last_summary(records)["eval/accuracy"] == 0.75


def test_a_wandb_server_unreachable_at_the_start_makes_the_run_offline(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(wandb_run, "INIT_TIMEOUT_S", 1.0)
    patch.setenv("WANDB_API_KEY", "k" * 40)
    patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    first, *_, last = track_run(tmp_path, TrackingConfig()).splitlines()
    assert first.startswith("wandb: Timed out")
    assert first.endswith("; the run is logged offline")
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert last == f"To upload the run: wandb sync {folder}"
    assert sum("history" in record for record in read_run(folder)) == 3


class WandbServer(BaseHTTPRequestHandler):
    """The parts of a wandb server that a run needs; while `awake` is unset, it drops every connection."""

    awake: ClassVar[threading.Event]
    streamed: ClassVar[list[str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if not self.awake.is_set():
            self.close_connection = True
            return
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            call = json.loads(body)
            names = {"name": "fedddp", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "r", "name": call["variables"].get("name"), "project": names}
            if call["operationName"] == "UpsertBucket":
                answer = {"upsertBucket": {"bucket": bucket, "inserted": True}}
            if call["operationName"] == "CreateRunFiles":
                url = f"http://{self.headers['Host']}/upload"
                files = [{"name": n, "uploadUrl": url} for n in call["variables"]["files"]]
                answer = {"createRunFiles": {"uploadHeaders": [], "files": files}}
        elif self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.streamed.extend(history.get("content", []))
        text = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def wandb_server(patch: pytest.MonkeyPatch) -> Iterator[type[WandbServer]]:
    class Handler(WandbServer):
        awake = threading.Event()
        streamed: ClassVar[list[str]] = []

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        Handler.awake.set()
        patch.setenv("WANDB_API_KEY", "k" * 40)
        patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        yield Handler
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("back_after_s", [0.5, None])
def test_a_wandb_server_unreachable_for_a_while_delays_only_the_upload(
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    wandb_server: type[WandbServer],
    back_after_s: float | None,
) -> None:
    patch.setattr(wandb_run, "FINISH_TIMEOUT_S", 20.0 if back_after_s else 1.0)
    console = Console(file=io.StringIO())
    tracking = TrackingConfig(progress=False)
    tracker = Tracker(tracking, tmp_path, CONFIG, name="demo", total_rounds=3, console=console)
    wandb_server.awake.clear()
    for index in (1, 2, 3):  # returns though the server answers only later
        tracker.log({"round": index, "train/loss": 1 / index})
    if back_after_s:
        threading.Timer(back_after_s, wandb_server.awake.set).start()
    tracker.finish()
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue().splitlines()
    assert shown[0].startswith("wandb: http://127.0.0.1")
    if back_after_s:
        assert [json.loads(line)["_step"] for line in wandb_server.streamed] == [1, 2, 3]
        assert len(shown) == 1
    else:
        (folder,) = tmp_path.glob("wandb/run-*")
        assert shown[-2:] == [
            "wandb: not all of the run was uploaded in 1 s",
            f"To upload the run: wandb sync {folder}",
        ]
        assert sum("history" in record for record in read_run(folder)) == 3


def test_wandb_disabled_by_the_user_stays_disabled(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("WANDB_MODE", "disabled")
    assert track_run(tmp_path, TrackingConfig(progress=False)) == ""
    assert not list(tmp_path.glob("wandb/*run*"))


def test_tensorboard_events_can_be_read_and_a_resume_repeats_none(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = TrackingConfig(trackers=["tensorboard"])
    track_run(tmp_path, tracking)
    track_run(tmp_path, tracking, rounds=4, resume_round=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/loss", "eval/recall/1", "total/time", "system/memory"} <= set(scalars)
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(s, pytest.approx(1 / s)) for s in (1, 2, 3, 4)]
    (settings,) = tmp_path.glob("tensorboard/*/hparams.yml")
    assert "data.partition.alpha: 0.3" in settings.read_text()


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="needs mlflow or mlflow-skinny")
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_continues_its_mlflow_run(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    tracking = TrackingConfig(trackers=["mlflow"], project="lab", progress=False)
    assert track_run(tmp_path, tracking) == ""
    assert track_run(tmp_path, tracking, rounds=5, resume_round=3) == ""
    client: Any = importlib.import_module("mlflow.tracking").MlflowClient(f"file://{tmp_path}/mlruns")
    experiment = client.get_experiment_by_name("lab")
    (run,) = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert {point.step: point.value for point in points} == {n: 1 / n for n in (1, 2, 3, 4, 5)}
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert run.data.params["data.partition.alpha"] == "0.3"

    tracker = Tracker(tracking, tmp_path, CONFIG, name="broken", total_rounds=3)
    tracker.finish(failed=True)
    (failed,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'broken'")
    assert failed.info.status == "FAILED"


def test_a_failing_tracker_is_dropped_and_the_run_continues(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    (shown,) = track_run(tmp_path, TrackingConfig(trackers=["tensorboard"], progress=False)).splitlines()
    assert shown.startswith("tensorboard: ")
    assert shown.endswith("; the run continues without this tracker")
    assert len(read_rows(tmp_path / "history.jsonl")) == 3


def test_unknown_and_missing_trackers_are_rejected() -> None:
    with pytest.raises(
        ValueError, match=r"^tracking\.trackers: unknown tracker 'wandbb'; accelerate has .*wandb"
    ):
        TrackingConfig(trackers=["wandb", "wandbb"])
    with pytest.raises(
        ValueError, match=r"^tracking\.trackers: this needs the package of 'aim'; pip install aim"
    ):
        TrackingConfig(trackers=["aim"])


def test_tracking_config_imports_no_heavy_package() -> None:
    code = (
        "import sys; from fedddp.tracking.tracker import TrackingConfig; TrackingConfig()\n"
        "print({'wandb', 'accelerate', 'torch', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_without_trackers_nothing_of_them_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from fedddp.tracking.tracker import Tracker, TrackingConfig\n"
        "quiet = TrackingConfig(trackers=[], progress=False)\n"
        "tracker = Tracker(quiet, Path(sys.argv[1]), {}, name='demo', total_rounds=1)\n"
        "tracker.log({'round': 1, 'train/loss': 1.0}); tracker.finish()\n"
        "print({'wandb', 'accelerate', 'matplotlib', 'torch', 'fedddp.tracking.trackers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert (tmp_path / "history.jsonl").read_text() == '{"round": 1, "train/loss": 1.0}\n'


def track_on_the_coordinator(folder: str) -> tuple[int, bool]:
    world = connect(TopologyConfig())
    tracker = NullTracker()
    if world.is_coordinator:
        tracker = Tracker(
            TrackingConfig(trackers=["wandb", "tensorboard"], mode="offline", progress=False),
            Path(folder),
            CONFIG,
            name="demo",
            total_rounds=2,
        )
    for index in (1, 2):
        tracker.client_done()
        tracker.log({"round": index, "train/loss": 1.0})
    tracker.finish()
    from accelerate.state import PartialState

    return dist.get_world_size(), PartialState._shared_state == {}


def test_trackers_on_one_rank_of_two_start_no_process_group_of_their_own(tmp_path: Path) -> None:
    assert run_world(track_on_the_coordinator, str(tmp_path), size=2) == [(2, True)] * 2
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert len(list(tmp_path.glob("tensorboard/events*"))) == 1


def test_trackers_start_no_process_group_where_there_is_none(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        patch.setenv(name, value)
    track_run(tmp_path, TrackingConfig(trackers=["tensorboard"]))
    assert not dist.is_initialized()
