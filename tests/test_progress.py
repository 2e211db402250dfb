"""Progress on the screen: a terminal's bar, lines elsewhere, a notebook's display, and how a run ends."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import shlex
import signal
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import type_on_this_rank
from rich.console import Console

from fedddp import Result
from fedddp.cli import main
from fedddp.commands.console import STOPPED
from fedddp.storage.history import main_metric, read_rows
from fedddp.testing import run_world
from fedddp.tracking.memory import gpu_bytes, resident_bytes
from fedddp.tracking.progress import QuietConsole, RoundProgress, silence
from fedddp.tracking.status import Part, Status, about, fitting, size_text
from fedddp.tracking.summary import phases_text, score_of, summary
from fedddp.tracking.tracker import Tracker, TrackingConfig

ROOT = Path(__file__).parent.parent
SMALL = "--data.examples 200 --tracking.trackers []"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def row(number: int, **more: Any) -> dict[str, Any]:
    """Return the row of a round of 4 clients and 2 groups that took 2 seconds, of which 0.5 s to evaluate."""
    return {
        "round": number,
        "train/loss": 1 / number,
        "train/examples": 300,
        "eval/accuracy": 0.5,
        "bytes/up": 1_000_000,
        "bytes/down": 2_000_000,
        "time/round": 2.0,
        "time/evaluate": 0.5,
        "time/idle": [0.0, 0.6],
        "cohort": [3, 1, 4, 2],
        **more,
    }


def screen_of(text: str) -> list[str]:
    """Return the lines that are left of a terminal's output: every redrawn line as it was drawn last."""
    lines, cursor = [""], 0
    for piece in re.split(r"(\x1b\[\d*[AK]|\r|\n)", re.sub(r"\x1b\[[\d;?]*[a-zHJlh](?<![AK])", "", text)):
        up = re.fullmatch(r"\x1b\[(\d*)A", piece)
        if up:
            cursor -= int(up[1] or 1)
        elif piece == "\n":
            cursor += 1
            lines += [""] * (cursor + 1 - len(lines))
        elif piece.startswith("\x1b"):
            lines[cursor] = ""
        elif piece != "\r":
            lines[cursor] += piece
    return [line.rstrip() for line in lines if line.strip()]


# ---- numbers ----


def test_rates_and_the_remaining_time_are_those_of_this_launch() -> None:
    clock = Clock()
    status = Status(12, 2, clock=clock)
    status.earlier([row(1), row(2)])
    status.begin_round(4)
    status.clients_done(4)
    clock.now += 5.0
    status.round(row(3))
    assert [part.text for part in status.pace()] == ["0.8 clients/s", "60 images/s"]
    assert [part.text for part in status.left()] == ["ETA 0:00:45"], "5 s per round, 9 rounds left"
    assert status.costs()[0].text == "sent 9.0 MB", "of all launches"
    clock.now += 5.0
    status.begin_round(4)
    status.clients_done(2)
    assert status.fraction == 3.5
    assert [part.text for part in status.left()] == ["ETA 0:00:57"], "10 s for 1.5 rounds, 8.5 rounds left"


def test_idle_time_is_a_share_of_the_groups_training_time() -> None:
    status = Status(5)
    status.round(row(1))
    status.round(row(2, **{"time/idle": [0.3, 0.0]}))
    (idle,) = (part.value for part in status.costs() if part.label == "idle")
    assert idle == f"{100 * (0.6 + 0.3) / (2 * 2 * 1.5):.0f} %" == "15 %"


@pytest.mark.parametrize(
    ("before", "after", "shown", "plain"),
    [
        (0.9, 0.9417, "94.17 % ↑4.17", "94.17 % +4.17"),
        (0.95, 0.9417, "94.17 % ↓0.83", "94.17 % -0.83"),
        (0.5, 0.500001, "50.00 % =", "50.00 % +0"),
    ],
)
def test_the_accuracy_has_its_change_since_the_evaluation_before(
    before: float, after: float, shown: str, plain: str
) -> None:
    status = Status(5)
    status.round(row(1, **{"eval/accuracy": before}))
    status.round({"round": 2, "train/loss": 1.0})  # not evaluated
    assert status.scores()[1].value == f"{100 * before:.2f} %"
    status.round(row(3, **{"eval/accuracy": after}))
    assert status.scores()[1].text == f"accuracy {shown}"
    assert status.scores(arrows=False)[1].text == f"accuracy {plain}"


def test_a_metric_other_than_accuracy_is_shown_where_there_is_none() -> None:
    line = {"round": 1, "eval/loss": 0.5, "eval/recall": [1.0], "eval/iou": 0.25, "eval/dice": 0.4}
    assert main_metric(line) == "eval/iou"
    assert main_metric({**line, "eval/accuracy": 0.1}) == "eval/accuracy"
    status = Status(2)
    status.round(line)
    assert [part.text for part in status.scores()] == ["test loss 0.5000", "IoU 0.2500"], "no training loss"
    status.round({"round": 2, "train/loss": 0.25, "eval/loss": 0.75})
    assert status.scores()[0].text == "train loss 0.2500"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "about 1 second"),
        (12.4, "about 12 seconds"),
        (62, "about a minute"),
        (300, "about 5 minutes"),
        (3500, "about an hour"),
        (3 * 3600, "about 3 hours"),
        (40 * 3600, "about 2 days"),
    ],
)
def test_a_length_of_time_in_words(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_the_first_round_forecasts_the_run() -> None:
    status = Status(30)
    status.round(row(1, **{"time/round": 2.1}))
    assert (
        status.forecast(row(1, **{"time/round": 2.1}))
        == "round 1 took 2.1 s; 30 rounds will take about a minute"
    )
    resumed = Status(30, 10)
    resumed.round(row(11))
    assert resumed.forecast(row(11)) == "round 11 took 2.0 s; the 19 rounds left will take about 38 seconds"
    last = Status(1)
    last.round(row(1))
    assert last.forecast(row(1)) is None


@pytest.mark.parametrize(
    ("clients", "at_once", "done", "work"),
    [
        (10, 1, 6, "client 7 of 10"),
        (10, 2, 6, "clients 7 to 8 of 10"),
        (10, 4, 8, "clients 9 to 10 of 10"),
        (10, 25, 0, "clients 1 to 10 of 10"),
        (10, 1, 10, "round 3"),
    ],
)
def test_a_run_that_stops_names_what_it_finishes(clients: int, at_once: int, done: int, work: str) -> None:
    status = Status(5, 2)
    status.begin_round(clients, at_once)
    status.clients_done(done)
    assert status.stopping() == f"stopping: finishing {work} (Ctrl-C again stops at once, unsaved)"
    assert len(status.stopping()) <= 80


def test_asynchronous_arrivals_of_the_next_round_are_not_lost() -> None:
    status = Status(5)
    status.begin_round(4)
    status.clients_done(6)
    assert status.fraction == 1.0
    status.round(row(1))
    assert (status.in_round, status.fraction) == (2, 1.5)


def test_what_does_not_fit_is_left_out_by_rank_and_nothing_is_cut() -> None:
    parts = [Part("a", "1111", 2), Part("", "22", 1), Part("c", "333333333", 3)]
    assert fitting(parts, 23) == parts
    assert fitting(parts, 22) == parts[:2]
    assert fitting(parts, 9) == [parts[1]]
    assert fitting(parts, 1) == []


def test_memory_is_that_of_this_process() -> None:
    before = resident_bytes()
    ballast = bytearray(os.urandom(1 << 20) * 100)
    assert 0.9e8 < resident_bytes() - before < 1.5e8
    assert gpu_bytes() is None or gpu_bytes() > 0  # type: ignore[operator]
    del ballast


@pytest.mark.parametrize(
    ("count", "text"), [(3_210_000_000, "3.2 GB"), (126_400_000, "126 MB"), (900, "900 bytes")]
)
def test_bytes_have_two_or_three_digits(count: int, text: str) -> None:
    assert size_text(count) == text


# ---- where they are shown ----


def test_plain_progress_is_one_unwrapped_line_per_round() -> None:
    console, clock = Console(file=io.StringIO(), width=100), Clock()
    progress = RoundProgress(12, 2, visible=True, console=console, clock=clock, memory=False)
    progress.begin_round(30)
    progress.clients_done(30)
    clock.now += 10
    progress.round({"round": 4, "train/loss": 0.25, "eval/accuracy": 0.5, "train/examples": 2500})
    progress.round({"round": 12, "train/loss": float("nan")})
    progress.stopping()
    progress.stopping()
    progress.close()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "round 4/12  train loss 0.2500  accuracy 50.00 %  ETA 0:00:40  3 clients/s  250 images/s",
        "round 4 took 10.0 s; the 8 rounds left will take about a minute",
        "round 12/12  train loss nan  took 0:00:10  3 clients/s  250 images/s",
        "stopping: finishing client 1 of 30 (Ctrl-C again stops at once, unsaved)",
    ]


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (20, "round 4/12"),
        (53, "round 4/12  accuracy 50.00 %  ETA 0:00:40"),
        (54, "round 4/12  accuracy 50.00 %  ETA 0:00:40  6 clients/s"),
        (60, "round 4/12  train loss 0.2500  accuracy 50.00 %  ETA 0:00:40"),
        (80, "round 4/12  train loss 0.2500  accuracy 50.00 %  ETA 0:00:40  6 clients/s"),
    ],
)
def test_a_plain_line_leaves_out_parts_as_the_bar_does(width: int, line: str) -> None:
    console, clock = Console(file=io.StringIO(), width=width), Clock()
    progress = RoundProgress(12, 3, visible=True, console=console, clock=clock, memory=False)
    progress.begin_round(30)
    progress.clients_done(30)
    clock.now += 5
    progress.round({"round": 4, "train/loss": 0.25, "eval/accuracy": 0.5, "train/examples": 2500})
    assert console.file.getvalue().splitlines()[0] == line  # type: ignore[attr-defined]


def bar_at(width: int, rounds: int = 2) -> str:
    """Return what a terminal of that width receives in some rounds of 30."""
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, width=width, force_terminal=True, force_interactive=True)
    progress = RoundProgress(30, visible=True, console=console, clock=clock)
    for number in range(1, rounds + 1):
        progress.begin_round(4)
        clock.now += 2.0
        progress.round(row(number, **{"eval/accuracy": 0.4 + number / 100}))
    progress.close()
    return file.getvalue()


def test_a_terminal_of_80_columns_shows_all_numbers_in_two_lines() -> None:
    text = bar_at(80)
    assert text.endswith("\x1b[?25h"), "the cursor is restored"
    forecast, first, second = screen_of(text)
    assert forecast == "round 1 took 2.0 s; 30 rounds will take about a minute"
    assert re.fullmatch(
        r"round 2/30  [━╸╺]{8,} +train loss 0\.5000  accuracy 42\.00 % ↑1\.00  took 0:00:04", first
    )
    assert re.fullmatch(
        r"2 clients/s  150 images/s  sent 6\.0 MB  idle 20 %  memory [\d.]+ [MG]B( .*)?", second
    )


@pytest.mark.parametrize("width", [18, 30, 40, 60, 79, 80, 100, 200])
def test_no_line_of_the_bar_is_longer_than_the_terminal_or_cut(width: int) -> None:
    lines = [line for line in screen_of(bar_at(width)) if "will take" not in line]
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines), lines
    assert not re.search("…|\\.\\.\\.", "".join(lines))
    assert re.match("round 2/30  [━╸]", lines[0])
    parts = "train loss 0.5000", "accuracy 42.00 % ↑1.00", "took 0:00:04"
    for part in parts:
        assert part in lines[0] or part.split()[0] not in lines[0], "a part is there or not"


def test_the_bar_moves_within_a_round() -> None:
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, width=80, force_terminal=True, force_interactive=True)
    progress = RoundProgress(1, visible=True, console=console, clock=clock)
    progress.begin_round(4)
    for done in (1, 2, 3):
        progress.clients_done(1)
        clock.now += 1.0
        progress._view._draw()  # type: ignore[attr-defined]
        first, second = screen_of(file.getvalue())
        assert first.startswith("round 1/1")
        assert second.startswith(f"{done}/4 clients, 1/s")
        bar = next(c for c in progress._view.__rich_console__(console, console.options)).columns[1]  # type: ignore[attr-defined]
        (shown,) = bar.cells
        assert shown.percentage_completed == 25 * done
    progress.close()


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, terminal: bool
) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # which the console would turn away from its file
    stream = Gone(error)
    console = QuietConsole(file=stream, width=80, force_terminal=terminal, force_interactive=terminal)
    tracker = Tracker(TrackingConfig(trackers=[]), tmp_path, {}, name="demo", total_rounds=5, console=console)
    for index in range(1, 6):
        tracker.log({"round": index, "train/loss": 1.0})
    tracker.finish()
    assert len(read_rows(tmp_path / "history.jsonl")) == 5
    assert stream.lines == 3, "nothing is written after the error"


def test_a_silenced_console_shows_nothing_and_only_within_the_block() -> None:
    with silence():
        quiet = QuietConsole(file=io.StringIO())
    after = QuietConsole(file=io.StringIO())
    for console in (quiet, after):
        console.print("x")
    assert [c.file.getvalue() for c in (quiet, after)] == ["", "x\n"]  # type: ignore[attr-defined]


# ---- how a run ends ----


def test_the_best_value_is_the_first_of_the_largest_and_of_a_loss_the_smallest() -> None:
    rows = [
        {"round": r, "eval/accuracy": a, "eval/loss": x}
        for r, a, x in ((1, 0.5, 2.0), (2, 0.9, 0.5), (3, 0.9, 0.7), (4, 0.8, 0.6))
    ]
    score, loss = score_of(rows), score_of(rows, "eval/loss")
    assert score is not None
    assert loss is not None
    assert score.text == "80.00 % in round 4 (best: 90.00 % in round 2)"
    assert loss.text == "0.6000 in round 4 (best: 0.5000 in round 2)"
    assert score_of(rows[:3]).text == "90.00 % in round 3, the best"  # type: ignore[union-attr]
    assert score_of([{"round": 1}]) is None


def test_the_summary_adds_up_the_rounds_and_names_what_comes_next() -> None:
    rows = [row(n, **{"time/train": 1.4, "time/send": 0.001}) for n in (1, 2, 3)]
    assert phases_text(rows) == "6.0 s: train 4.2, evaluate 1.5"
    console = Console(file=io.StringIO(), width=80)
    console.print(summary(rows, Path("runs/my run"), 5, finished=True))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split(maxsplit=1) for line in console.file.getvalue().splitlines()]
    assert [[word.strip() for word in line] for line in lines] == [
        ["accuracy", "50.00 % in round 3, the best"],
        ["train", "loss  0.3333"],
        ["rounds", "3 of 5 (ended early)"],
        ["examples", "900"],
        ["bytes", "3.0 MB up, 6.0 MB down"],
        ["time", "6.0 s: train 4.2, evaluate 1.5"],
        ["next", "fedddp report 'runs/my run'"],
        ["fedddp", "predict 'runs/my run' IMAGE"],
    ]
    stopped = Console(file=io.StringIO(), width=80)
    stopped.print(summary(rows, Path("runs/x"), 5, finished=False))
    assert "fedddp" not in stopped.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("best", "stop_after", "judged"),
    [
        ("eval/loss", 0, ["test loss", "0.5000 in round 3 (best: 0.2000 in round 2)"]),
        (
            "clients/accuracy_mean",
            0,
            ["mean accuracy of clients", "70.00 % in round 3 (best: 90.00 % in round 1)"],
        ),
        (None, 4, None),
        ("eval/accuracy", 0, None),
        (None, 0, None),
    ],
)
def test_the_summary_begins_with_the_metric_that_the_best_model_is_chosen_by(
    best: str | None, stop_after: int, judged: list[str] | None
) -> None:
    values = ((1, 0.6, 0.7, 0.9), (2, 0.9, 0.2, 0.8), (3, 0.8, 0.5, 0.7))
    rows = [
        row(n, **{"eval/accuracy": a, "eval/loss": x, "clients/accuracy_mean": mean})
        for n, a, x, mean in values
    ]
    folder = Path("runs/x")
    folder.mkdir(parents=True)
    sections = {"checkpoint": {"best": best}, "evaluation": {"stop_after": stop_after}}
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    if best:
        (folder / "best.safetensors").touch()
    lines = summary_of(rows, folder)
    accuracy = ["accuracy", "80.00 % in round 3 (best: 90.00 % in round 2)"]
    assert lines[:-6] == [*([judged] if judged else []), accuracy, ["train loss", "0.3333"]]
    assert lines[-1] == [f"fedddp predict runs/x IMAGE{' --best' if best else ''}"]


def test_a_run_without_accuracy_is_stopped_by_its_test_loss() -> None:
    rows = [{"round": n, "train/loss": 9.0, "eval/loss": x} for n, x in ((1, 0.5), (2, 0.7))]
    folder = Path("runs/x")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{checkpoint: {best: null}, evaluation: {stop_after: 1}}")
    assert summary_of(rows, folder)[0] == ["test loss", "0.7000 in round 2 (best: 0.5000 in round 1)"]


def summary_of(rows: list[dict[str, Any]], folder: Path) -> list[list[str]]:
    """Return the cells of the table that ends a finished run."""
    console = Console(file=io.StringIO(), width=100)
    console.print(summary(rows, folder, 3, finished=True))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_a_result_is_one_line_and_a_small_table() -> None:
    result = Result(None, [row(n) for n in range(1, 100)], Path("runs/<x>"), finished=True)  # type: ignore[arg-type]
    assert repr(result) == (
        "Result(folder runs/<x>, rounds 99, eval/accuracy 50.00 % in round 99, the best, state finished)"
    )
    table = result._repr_html_()
    assert table.count("<tr>") == 4
    assert "runs/&lt;x&gt;" in table
    other = Result(None, [], Path("runs/y"), finished=False)  # type: ignore[arg-type]
    assert repr(other) == "Result(folder runs/y, rounds 0, state stopped)"


# ---- real runs ----


class Terminal:
    """A process on a pseudo-terminal of 80 columns."""

    def __init__(self, command: str, folder: Path) -> None:
        self.received = b""
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
            for name in ("COLUMNS", "LINES", "NO_COLOR"):
                environment.pop(name, None)
            os.execve(sys.executable, [sys.executable, "-m", "fedddp", *shlex.split(command)], environment)
        ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))

    def read_until(self, found: Callable[[str], bool]) -> None:
        """Read until `found` is true of all that was received, or the process ends."""
        while not found(self.text):
            try:
                piece = os.read(self.descriptor, 1 << 16)
            except OSError:  # the process has ended
                return
            if not piece:
                return
            self.received += piece

    @property
    def text(self) -> str:
        return self.received.decode(errors="replace")

    def end(self) -> int:
        """Read to the end; return the exit code."""
        self.read_until(lambda _: False)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[[str], Terminal]]:
    started: list[Terminal] = []

    def start(command: str) -> Terminal:
        started.append(Terminal(command, tmp_path))
        return started[-1]

    yield start
    for one in started:
        try:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_a_run_on_a_terminal_shows_stages_a_moving_bar_and_what_ctrl_c_finishes(
    terminal: Callable[[str], Terminal], tmp_path: Path
) -> None:
    process = terminal(f"run digits {SMALL} --rounds 50 --local.engine eager --local.steps 60")
    process.read_until(lambda text: bool(re.search(r"round .*2/50[^\n]*\n[^\n]*[3-9]/10 clients", text)))
    os.write(process.descriptor, b"\x03")  # as the key does
    assert process.end() == STOPPED
    lines = screen_of(process.text)
    assert lines[:3] == [
        "loading PyTorch ...",
        "preparing the data (digits) ...",
        "building the model (lenet) ...",
    ]
    assert re.fullmatch(r"round 1 took \d+\.\d s; 50 rounds will take about .*", lines[3])
    stopping = next(line for line in lines if line.startswith("stopping"))
    assert re.fullmatch(
        r"stopping: finishing (client \d+ of 10|round \d+) \(Ctrl-C again stops at once, unsaved\)", stopping
    )
    assert max(len(line) for line in lines if "Resume" not in line) <= 80
    done = len(read_rows(tmp_path / "runs/digits/history.jsonl"))
    assert any(re.match(f"round {done}/50  [━╸╺]{{8,}}", line) for line in lines), (
        "it ends with the rounds done"
    )
    assert "Stopped. Resume with the same launcher and: fedddp run digits" in process.text
    drawn = {int(n) for n in re.findall(r"(\d+)/10 clients", process.text)}
    assert len(drawn) > 3, "the bar moves within a round"


def exit_code(command: str) -> object:
    """Return the exit code of `fedddp COMMAND`."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    return stop.value.code


def test_a_run_without_a_terminal_writes_a_line_per_round_and_a_summary(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "140")
        assert exit_code(f"run digits {SMALL} --rounds 3") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\x1b" not in printed.out
    first, forecast, second, third, *table, last = printed.out.splitlines()
    number = r"[\d.,]+"
    for index, line in enumerate((first, second, third), 1):
        change = "" if index == 1 else f" ([↑↓]{number}|=)"
        assert re.fullmatch(
            rf"round {index}/3  train loss {number}  accuracy {number} %{change}  (ETA|took) 0:0\d:\d\d  "
            rf"{number} clients/s  {number} images/s  memory {number} [MG]B( .*)?",
            line,
        ), line
    assert re.fullmatch(r"round 1 took \d+\.\d s; 3 rounds will take about .*", forecast)
    assert [line.split()[0] for line in table[:6]] == [
        "accuracy",
        "train",
        "rounds",
        "examples",
        "bytes",
        "time",
    ]
    assert table[-2].split() == ["next", "fedddp", "report", "runs/digits"]
    assert last == "run directory: runs/digits"


def test_a_quiet_run_prints_its_last_line_and_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(f"run digits {SMALL} --rounds 2 --quiet --name one") == 0
    assert capsys.readouterr().out == "run directory: runs/one\n"
    assert "quiet" not in Path("runs/one/config.yaml").read_text()
    assert exit_code("run digits --quiet --local.lr 0") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: local.lr must be > 0")
    assert exit_code(f"run digits {SMALL} --rounds 1 --name two") == 0
    assert capsys.readouterr().out.startswith("round 1/1"), "the next run is not quiet"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--quiet --verbose", "--quiet and --verbose exclude each other"),
        ("--profile 0", "--profile must be a number of rounds >= 1, got 0"),
        ("--profile=x", "--profile must be a number of rounds >= 1, got x"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(f"run digits {options}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("target", "proposed"),
    [
        ("digitz", "digits"),
        ("quickstart", "digits"),
        ("mnist", "mnist-lenet"),
        ("figs", "figs.yaml"),
        ("trees", "trees.yml"),
        ("digits-of-mine", "digits-of-mine.yaml"),
        ("qqq", None),
    ],
)
def test_an_unknown_recipe_is_answered_with_what_may_be_meant(
    target: str, proposed: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("figs.yaml", "trees.yml", "digits-of-mine.yaml"):
        Path(name).touch()
    assert exit_code(f"run {target}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: unknown recipe {target!r}; `fedddp recipes` lists them, or give the path of a .yaml file"
        + (f". Did you mean {proposed!r}?" if proposed else "")
    )


NOTEBOOK = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from fedddp import *
data, tracking = DataConfig(dataset="digits", examples=200), TrackingConfig(trackers=[])
Federation(data=data, rounds=4, tracking=tracking).run()
"""


def test_a_notebook_has_one_display_that_is_updated(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client").manager
    kernel, client = manager.start_new_kernel(cwd=str(tmp_path))
    try:
        shown: list[dict[str, Any]] = []
        reply = client.execute_interactive(NOTEBOOK, output_hook=shown.append, timeout=300)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok"
    made = [message for message in shown if message["msg_type"] == "display_data"]
    updates = [message for message in shown if message["msg_type"] == "update_display_data"]
    assert len(made) == 1, "no line per round"
    ids = {message["content"]["transient"]["display_id"] for message in made + updates}
    assert len(ids) == 1
    last = updates[-1]["content"]["data"]
    assert last["text/plain"].startswith("round 4/4\ntrain loss ")
    assert '<progress value="4.000" max="4">' in last["text/html"]
    (result,) = (message["content"]["data"] for message in shown if message["msg_type"] == "execute_result")
    assert result["text/plain"].startswith("Result(folder runs/run, rounds 4, ")
    assert result["text/html"].startswith("<table>")


def test_every_rank_of_a_verbose_run_prints_with_its_prefix_and_has_a_file(tmp_path: Path) -> None:
    command = f"run digits {SMALL} --rounds 3 --verbose --profile 1"
    typed = run_world(type_on_this_rank, command, size=2)
    assert [code for code, _ in typed] == [0, 0], typed
    for rank, (_, lines) in enumerate(typed):
        log = (tmp_path / f"runs/digits/logs/rank-{rank}.log").read_text()
        assert f"rank {rank} of 2: client group {rank} of 2, data rank 0, on cpu" in log
        clients = re.findall(r"DEBUG client (\d+): (\d+) steps, loss", log)
        assert clients
        for text in (f"client {clients[0][0]}: {clients[0][1]} steps", "preparing the data (digits) ..."):
            assert any(line.startswith(f"[rank {rank}] {text}") for line in lines)
        assert len(re.findall(r"DEBUG round \d of 3: .*train \d", log)) == 3
        assert (tmp_path / f"runs/digits/profile/rank-{rank}.json.gz").exists()
    cohort = read_rows(tmp_path / "runs/digits/history.jsonl")[0]["cohort"]
    first = [
        set(re.findall(r"DEBUG client (\d+):", (tmp_path / f"runs/digits/logs/rank-{rank}.log").read_text()))
        for rank in (0, 1)
    ]
    assert {str(client) for client in cohort} <= first[0] | first[1]
    assert "DEBUG" not in (tmp_path / "runs/digits/run.log").read_text()
