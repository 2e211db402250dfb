"""A wandb sweep over `fedddp run`: the example file, wandb's own agent, and a small server of this test."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_files import last_summary, read_run

FILE = Path(__file__).parent.parent / "docs" / "sweep.yaml"


SWEEP_AND_AGENT = """
import wandb.wandb_agent as agent
from wandb.cli.cli import cli
agent.Agent.POLL_INTERVAL = 0.2
cli(["sweep", "--project", "fedddp", "sweep.yaml"], standalone_mode=False)
cli(["agent", "me/fedddp/abcd1234", "--count", "2"])
"""
"""What a user types, one command after the other, in a process that imports wandb once."""


class SweepServer(ThreadingHTTPServer):
    """The part of a wandb server that `wandb sweep` and `wandb agent` need; it gives out two runs."""

    config = ""
    """The sweep as it was sent, YAML."""

    def runs(self) -> list[dict[str, Any]]:
        """Return commands for the agent: the first and the last combination of the parameters."""
        sweep = yaml.safe_load(self.config)
        names = list(sweep["parameters"])
        grid = list(itertools.product(*(sweep["parameters"][name]["values"] for name in names)))
        return [
            {
                "type": "run",
                "run_id": f"sweeprun{number}",
                "program": sweep["program"],
                "args": {name: {"value": value} for name, value in zip(names, values, strict=True)},
            }
            for number, values in enumerate((grid[0], grid[-1]))
        ]


class Handler(BaseHTTPRequestHandler):
    server: SweepServer
    protocol_version = "HTTP/1.1"
    given_out = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        text = json.dumps({"data": self.answer(body) if self.path == "/graphql" else {}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def answer(self, body: bytes) -> dict[str, Any]:
        call = json.loads(body)
        query, variables = call["query"], call.get("variables") or {}
        project = {"name": "fedddp", "entity": {"id": "e", "name": "me"}}
        if "upsertSweep" in query:
            self.server.config = variables["config"]
            return {"upsertSweep": {"sweep": {"name": "abcd1234", "project": project}}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "agentHeartbeat" in query:
            new, Handler.given_out = not Handler.given_out, True
            commands = self.server.runs() if new else []
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        if "sweep(sweepName" in query:
            sweep = {"id": "s", "name": "abcd1234", "config": self.server.config, "runs": {"edges": []}}
            return {"project": {"sweep": sweep}}
        viewer = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[SweepServer]:
    with SweepServer(("127.0.0.1", 0), Handler) as server:
        Handler.given_out = False
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_example_sweep_runs_under_wandbs_own_agent(tmp_path: Path, server: SweepServer) -> None:
    """The agent is real, and so are its runs, which are offline; the server's side is this file's."""
    env = {
        **os.environ,
        **{f"WANDB_{name}_DIR": str(tmp_path / "home") for name in ("DATA", "CACHE", "CONFIG")},
        "WANDB_API_KEY": "k" * 40,
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_MODE": "offline",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    text = FILE.read_text()
    assert text.count('"10"') == 1
    small = '"2"\n  - --data.examples\n  - "200"'
    (tmp_path / "sweep.yaml").write_text(text.replace('"10"', small))
    done = subprocess.run(
        [sys.executable, "-c", SWEEP_AND_AGENT],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert "wandb agent me/fedddp/abcd1234" in shown

    found = {}
    for folder in tmp_path.glob("runs/*/wandb/offline-run-*"):
        records = read_run(folder)
        run = next(record["run"] for record in records if record["type"] == "run")
        found[run["run_id"]] = run, last_summary(records), folder.parent.parent
    assert found.keys() == {"sweeprun0", "sweeprun1"}, shown
    scores = []
    for number, (mu, lr) in enumerate([(0.0, 0.1), (0.1, 0.2)]):
        run, summary, folder = found[f"sweeprun{number}"]
        config = run["config"]["update"]
        assert run["sweep_id"] == "abcd1234"
        assert (config["algorithm"]["name"], config["algorithm"]["mu"]) == ("FedProx", mu)
        assert (config["algorithm.mu"], config["local.lr"]) == (mu, lr), "columns of the sweep's table"
        recorded = yaml.safe_load((folder / "config.yaml").read_text())
        assert (recorded["algorithm"]["mu"], recorded["local"]["lr"], recorded["rounds"]) == (mu, lr, 2)
        rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        objective = yaml.safe_load(text)["metric"]
        assert objective["goal"] == "maximize"
        assert summary[objective["name"]] == rows[-1]["eval/accuracy"]
        scores.append(rows[-1]["eval/loss"])
    assert scores[0] != scores[1]
