#!/usr/bin/env python3
"""Train with every codec of `transport.up`, and write the figure and the table of docs/compression.md.

    .venv/bin/python scripts/compression.py                                       # digits, a minute
    .venv/bin/python scripts/compression.py --dataset mnist --root data           # what the page shows

The figure is docs/compression.svg. The table, the command and the numbers stand in the page between the two
marks `<!-- measured -->`; nothing else of it changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from fedddp import (
    CheckpointConfig,
    CohortConfig,
    Config,
    DataConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    TrackingConfig,
    TransportConfig,
    codecs,
    partitions,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARK = "<!-- measured -->"
RUNS: dict[str, TransportConfig] = {
    "none": TransportConfig(),
    "Cast bf16": TransportConfig(up=codecs.Cast()),
    "Int8": TransportConfig(up=codecs.Int8()),
    "QSGD s=127": TransportConfig(up=codecs.QSGD(levels=127)),
    "QSGD s=7": TransportConfig(up=codecs.QSGD(levels=7)),
    "QSGD s=7, bucket 512": TransportConfig(up=codecs.QSGD(levels=7, bucket=512)),
    "QSGD s=1, bucket 512": TransportConfig(up=codecs.QSGD(levels=1, bucket=512)),
    "TopK 10 %": TransportConfig(up=codecs.TopK(fraction=0.1)),
    "TopK 1 %": TransportConfig(up=codecs.TopK(fraction=0.01)),
    "Sign": TransportConfig(up=codecs.Sign()),
    "EDEN 4 bits": TransportConfig(up=codecs.EDEN(bits=4)),
    "EDEN 2 bits": TransportConfig(up=codecs.EDEN(bits=2)),
    "EDEN 1 bit": TransportConfig(up=codecs.EDEN(bits=1)),
    "EDEN 2 bits, Int8 down": TransportConfig(up=codecs.EDEN(bits=2), down=codecs.Int8()),
}
"""What is compared, by the name in the figure."""
Rows = list[dict[str, Any]]


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=["digits", "mnist"], default="digits", help="default: digits")
    parser.add_argument("--root", default="data", help="folder of MNIST (data.root); default: data")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each run; default: 30")
    parser.add_argument("--seed", type=int, default=0, help="seed of all runs; default: 0")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of compression.md; default: docs")
    return parser.parse_args()


def config_of(options: argparse.Namespace, output: str) -> Config:
    """Return what all runs have in common."""
    clients = {"digits": 20, "mnist": 100}[options.dataset]
    partition = partitions.Dirichlet(alpha=0.3)
    return Config(
        data=DataConfig(
            dataset=options.dataset, root=options.root, clients=clients, partition=partition, download=False
        ),
        model=ModelConfig(name="2nn"),
        local=LocalConfig(epochs=1, batch_size={"digits": 16, "mnist": 32}[options.dataset], lr=0.1),
        cohort=CohortConfig(size=10),
        checkpoint=CheckpointConfig(every=options.rounds),
        tracking=TrackingConfig(trackers=[], progress=False),
        rounds=options.rounds,
        seed=options.seed,
        output=output,
    )


def train_all(config: Config) -> dict[str, Rows]:
    """Return the history of every run."""
    histories: dict[str, Rows] = {}
    for name, transport in RUNS.items():
        started = time.perf_counter()
        histories[name] = Federation(dataclasses.replace(config, transport=transport)).run().history
        last = histories[name][-1]
        sys.stderr.write(
            f"{name}: {last['eval/accuracy']:.4f} after {sum(r['bytes/up'] for r in histories[name]):,} "
            f"bytes up, {time.perf_counter() - started:.0f} s\n"
        )
    return histories


def draw(histories: dict[str, Rows], title: str, path: Path) -> None:
    """Draw accuracy against the bytes that clients have sent."""
    marks = itertools.cycle("osD^vPX")
    with rc_context({"svg.hashsalt": "fedddp", "font.size": 9}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for number, (name, rows) in enumerate(histories.items()):
            sent = list(itertools.accumulate(row["bytes/up"] / 1e6 for row in rows))
            line = "--" if number >= 10 else "-"
            shown = [100 * row["eval/accuracy"] for row in rows]
            axes.plot(sent, shown, line, marker=next(marks), markersize=3, linewidth=1, label=name)
        axes.set(xscale="log", xlabel="MB sent by clients", ylabel="test accuracy, %", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, format="svg", metadata={"Date": None})
    # matplotlib leaves spaces at the ends of lines.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def table(histories: dict[str, Rows], command: str, config: Config) -> str:
    """Return the measured part of the page."""
    plain = histories["none"]
    target = 0.95 * max(row["eval/accuracy"] for row in plain)
    lines = [
        "```text",
        command,
        "```",
        "",
        f"{config.data.dataset}, {config.data.clients} clients (Dirichlet 0.3), 10 of them per round, "
        f"{config.rounds} rounds, 2NN, seed {config.seed}, torch {torch.__version__.partition('+')[0]}, one "
        "run each. Accuracy is the mean of the last five rounds; MB are sums over the run. The last column "
        f"counts what clients sent until the accuracy was first {100 * target:.1f} %, 0.95 of the best of "
        "`none`.",
        "",
        f"| `transport` | accuracy, % | MB up | of `none` | MB down | MB up to {100 * target:.1f} % |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    whole = sum(row["bytes/up"] for row in plain)
    for name, rows in histories.items():
        last = [row["eval/accuracy"] for row in rows[-5:]]
        up, down = (sum(row[f"bytes/{way}"] for row in rows) for way in ("up", "down"))
        reached = next((n for n, row in enumerate(rows, 1) if row["eval/accuracy"] >= target), None)
        until = "not reached"
        if reached is not None:
            until = f"{sum(row['bytes/up'] for row in rows[:reached]) / 1e6:.2f}"
        accuracy = 100 * sum(last) / len(last)
        lines.append(
            f"| {name} | {accuracy:.2f} | {up / 1e6:.2f} | 1/{whole / up:.1f} | {down / 1e6:.2f} | {until} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, draw, and write the numbers into the page."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(options, folder)
        histories = train_all(config)
    options.output.mkdir(parents=True, exist_ok=True)
    title = f"{options.dataset}, 2NN, {config.data.clients} clients, {options.rounds} rounds"
    draw(histories, title, options.output / "compression.svg")
    command = shlex.join([".venv/bin/python", "scripts/compression.py", *sys.argv[1:]])
    measured = f"{MARK}\n\n{table(histories, command, config)}\n\n{MARK}"
    page = options.output / "compression.md"
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Compression\n\n{MARK}\n{MARK}\n"
    parts = re.split(re.escape(MARK), text)
    if len(parts) != 3:
        sys.exit(f"error: {page} must have the mark {MARK} twice; restore it")
    page.write_text(parts[0] + measured + parts[2], encoding="utf-8")


if __name__ == "__main__":
    main()
