"""What the commands print, and the codes they exit with, when all is well or a run is stopped."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path

import pytest

from fedddp import FedAvg, Server, Total
from fedddp.cli import STOPPED, main
from fedddp.storage.history import read_rows

RUN = "run digits --rounds 4 --data.examples 200 --track.with [] --track.progress false"


class StopsInTheSecondRound(FedAvg):
    """FedAvg in a process that is asked to end while it steps the second time."""

    def step(self, server: Server, total: Total) -> None:
        super().step(server, total)
        if server.version == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def typed(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """Return the exit code and the printed lines of `fedddp COMMAND`."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    printed = capsys.readouterr()
    assert printed.err == ""
    return stop.value.code, printed.out.splitlines()


def test_a_stopped_run_says_what_to_type_and_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = typed(f"{RUN} --algorithm {__name__}.StopsInTheSecondRound --name 'a+b'", capsys)
    assert code == STOPPED == 75
    start, command = out[-1].split(": fedddp ")
    assert start == "stopped; go on with the same launcher and"
    assert command.endswith("--name a+b --resume auto")
    history = Path("runs/a+b/history.jsonl")
    assert [row["round"] for row in read_rows(history)] == [1, 2]
    code, out = typed(command, capsys)
    assert code == 0
    assert out[0].startswith("resuming runs/a+b from round-00002")
    assert out[-1] == "run directory: runs/a+b"
    assert [row["round"] for row in read_rows(history)] == [1, 2, 3, 4]


def test_a_batch_script_is_told_by_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDDDP_STOPPED_FILE", "stopped")
        code, out = typed(f"{RUN} --algorithm {__name__}.StopsInTheSecondRound", capsys)
        assert code == 0
        assert out[-1].endswith("--name digits --resume auto")
        Path("stopped").unlink()
        code, _ = typed(out[-1].split(": fedddp ")[1], capsys)
    assert code == 0
    assert not Path("stopped").exists()


@pytest.mark.parametrize("option", ["--help", "help", "run --help", "run digits -h", "--version"])
def test_help_and_version_are_no_errors(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = typed(option, capsys)
    assert code == 0
    assert out


def test_help_names_every_section_and_the_settings_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = typed("run --help", capsys)
    text = "\n".join(out)
    for setting in ("--data.partition", "--local.lr", "--algorithm", "--track.with ", "--resume"):
        assert setting in text
    assert "with_" not in text
    _, out = typed("run digits --algorithm.help FedProx", capsys)
    assert "Strength of the pull" in " ".join(" ".join(out).split())
