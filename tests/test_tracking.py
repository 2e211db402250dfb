"""History on disk, progress on the screen, and trackers that may fail without ending the run."""

from __future__ import annotations

import errno
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
import torch.distributed as dist
from rich.console import Console

from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.storage.history import History, read_rows
from fedddp.testing import run_world
from fedddp.tracking import tracker as module
from fedddp.tracking.progress import QuietConsole, RoundProgress
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
    model.write_bytes(b"weights")
    tracker.finish(model, {"eval/accuracy": 0.75})
    tracker.finish()
    assert tracker.run_id is None or tracker.run_id in str(list(folder.glob("wandb/*")))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def inspect(folder: Path) -> list[dict[str, Any]]:
    """Read a run file with wandb's own reader."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


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


def test_plain_progress_is_one_unwrapped_line_per_round(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=20)
    progress = RoundProgress(12, 2, visible=True, console=console)
    progress._start -= 10
    progress.clients_done(30)
    progress.round({"round": 4, "train/loss": 0.25, "eval/accuracy": 0.5})
    progress.round({"round": 12, "train/loss": float("nan")})
    progress.close()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "round 4/12  loss 0.2500  accuracy 50.00 %  3 clients/s  ETA 0:00:40",
        "round 12/12  loss nan  3 clients/s  took 0:00:10",
    ]


def test_a_terminal_shows_one_live_line_and_its_cursor_is_restored() -> None:
    file = io.StringIO()
    console = Console(file=file, width=90, force_terminal=True, force_interactive=True)
    progress = RoundProgress(8, visible=True, console=console)
    progress.round({"round": 2, "train/loss": 0.25, "eval/accuracy": 0.5})
    progress.round({"round": 3, "train/loss": 0.125})
    progress.close()
    text = file.getvalue()
    assert text.endswith("\x1b[?25h")
    *_, last = text.split("\r")
    shown = Console(file=io.StringIO()).render_str("")
    shown = type(shown).from_ansi(last)
    assert shown.plain.startswith("round 3/8 ━")
    assert "loss 0.1250  accuracy 50.00 %  ETA 0:00:00" in shown.plain
    assert text.count("\n") == 1


class Gone(io.StringIO):
    """A stream whose reader has left, or whose disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error, self.lines = error, 0

    def write(self, text: str) -> int:
        self.lines += 1
        if self.lines > 2:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
    ],
    ids=str,
)
@pytest.mark.parametrize("terminal", [False, True])
def test_progress_falls_silent_where_it_cannot_be_written(
    tmp_path: Path, patch: pytest.MonkeyPatch, error: OSError, terminal: bool
) -> None:
    patch.setattr(sys, "stdout", io.StringIO())  # which the console would turn away from its file
    stream = Gone(error)
    console = QuietConsole(file=stream, width=80, force_terminal=terminal, force_interactive=terminal)
    tracker = Tracker(
        TrackingConfig(trackers=[]), tmp_path, CONFIG, name="demo", total_rounds=5, console=console
    )
    for index in range(1, 6):
        tracker.log({"round": index, "train/loss": 1.0})
    tracker.finish()
    assert len(read_rows(tmp_path / "history.jsonl")) == 5
    assert stream.lines == 3, "nothing is written after the error"


def test_without_progress_nothing_is_printed(tmp_path: Path) -> None:
    assert track_run(tmp_path, TrackingConfig(trackers=[], progress=False)) == ""
    assert len(read_rows(tmp_path / "clients.jsonl")) == 6


def test_an_offline_wandb_run_is_complete_and_a_resume_continues_it(tmp_path: Path) -> None:
    tracking = TrackingConfig(project="lab", group="sweep", tags=["x"])
    shown = track_run(tmp_path, tracking)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert shown.splitlines()[-1] == f"To upload the run: wandb sync {folder}"
    assert "wandb:" not in shown
    records = inspect(folder)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert {**run["config"]["update"], "_wandb": 0} == {**CONFIG, "_wandb": 0}
    assert (run["project"], run["display_name"], run["run_group"]) == ("lab", "demo", "sweep")
    items = [(r["history"]["step"]["num"], r["history"]["item"]) for r in records if "history" in r]
    assert [(step, item["train/loss"]) for step, item in items] == [(1, 1), (2, 1 / 2), (3, 1 / 3)]
    assert items[-1][1]["clients.nrows"] == 2
    table = json.loads((folder / "files" / items[-1][1]["clients.path"]).read_text())
    assert table["columns"] == ["round", "client", "eval/accuracy"]
    assert table["data"] == [[3, 0, 0.03], [3, 1, 0.28]]
    model = next(r["artifact"] for r in records if r.get("artifact", {}).get("type") == "model")
    (file,) = model["manifest"]["contents"]
    assert file["local_path"] == str(tmp_path / "model.safetensors")
    summary = {k: v for r in records if "summary" in r for k, v in r["summary"]["update"].items()}
    assert summary["eval/accuracy"] == 0.75
    assert records[-1]["exit"]["exit_code"] == 0

    shown = track_run(tmp_path, tracking, rounds=5, resume_round=3, run_id=run["run_id"])
    (again,) = set(tmp_path.glob("wandb/offline-run-*")) - {folder}
    records = inspect(again)
    assert next(r["run"]["run_id"] for r in records if r["type"] == "run") == run["run_id"]
    assert [r["history"]["step"]["num"] for r in records if "history" in r] == [4, 5]
    pattern = shown.split()[-1]
    # As wandb names a second session within the same second.
    again = again.rename(folder.with_name(f"{folder.name}-1"))
    assert set(tmp_path.parent.glob(str(Path(pattern).relative_to(tmp_path.parent)))) == {
        folder,
        again,
    }
    assert [row["round"] for row in read_rows(tmp_path / "history.jsonl")] == [1, 2, 3, 4, 5]


def wandb_ids(folder: Path) -> list[str]:
    """Return the id of the wandb run of every session in `folder`."""
    return [path.name.split("-")[3] for path in folder.glob("wandb/offline-run-*")]


def test_two_runs_of_one_process_are_two_wandb_runs_under_one_wandb_run_id(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    patch.setenv("WANDB_RUN_ID", "given")
    patch.setattr(module, "_USED_IDS", set())
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
        "wandb: artifact names must be shorter; the model is not among the run's artifacts",
        f"To upload the run: wandb sync {folder}",
    ]
    records = inspect(folder)
    assert sum("history" in record for record in records) == 3
    assert records[-1]["exit"]["exit_code"] == 0
    summary = {k: v for r in records if "summary" in r for k, v in r["summary"]["update"].items()}
    assert summary["eval/accuracy"] == 0.75


def test_a_wandb_server_unreachable_at_the_start_makes_the_run_offline(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(module, "WANDB_INIT_TIMEOUT_S", 1.0)
    patch.setenv("WANDB_API_KEY", "k" * 40)
    patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    first, *_, last = track_run(tmp_path, TrackingConfig()).splitlines()
    assert first.startswith("wandb: Timed out")
    assert first.endswith("; the run is logged offline")
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert last == f"To upload the run: wandb sync {folder}"
    assert sum("history" in record for record in inspect(folder)) == 3


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
    patch.setattr(module, "WANDB_FINISH_TIMEOUT_S", 20.0 if back_after_s else 1.0)
    console = Console(file=io.StringIO())
    tracker = Tracker(TrackingConfig(), tmp_path, CONFIG, name="demo", total_rounds=3, console=console)
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
        assert len(shown) == 4
    else:
        (folder,) = tmp_path.glob("wandb/run-*")
        assert shown[-2:] == [
            "wandb: not all of the run was uploaded in 1 s",
            f"To upload the run: wandb sync {folder}",
        ]
        assert sum("history" in record for record in inspect(folder)) == 3


def test_wandb_disabled_by_the_user_stays_disabled(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("WANDB_MODE", "disabled")
    shown = track_run(tmp_path, TrackingConfig())
    assert len(shown.splitlines()) == 3
    assert not list(tmp_path.glob("wandb/*run*"))


def test_tensorboard_events_can_be_read_and_a_resume_repeats_none(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = TrackingConfig(trackers=["tensorboard"])
    track_run(tmp_path, tracking)
    track_run(tmp_path, tracking, rounds=4, resume_round=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(s, pytest.approx(1 / s)) for s in (1, 2, 3, 4)]
    (settings,) = tmp_path.glob("tensorboard/*/hparams.yml")
    assert "data.partition.alpha: 0.3" in settings.read_text()


def test_a_failing_tracker_is_dropped_and_the_run_continues(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    shown = track_run(tmp_path, TrackingConfig(trackers=["tensorboard"])).splitlines()
    assert len(shown) == 1 + 3
    assert shown[0].startswith("tensorboard: ")
    assert shown[0].endswith("; the run continues without this tracker")
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
