#!/usr/bin/env python3
"""Measure the seconds per round of fedddp and of a hand-written loop, the limit of the machine.

    .venv/bin/python scripts/benchmark/speed.py --repeat 3 --table docs/benchmarks.md

Both train the same model on the same images with FedAvg. All setups are measured in turn (A B C A B C), and
medians are compared with the loop's. With `--root DIR` (torchvision's MNIST files) they train on MNIST, else
on the synthetic dataset `shapes`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from fedddp.storage.history import read_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

WORKLOADS = {
    # model, clients, cohort, examples per client, batch, rounds
    "cnn": ("lenet", 100, 10, 600, 32, 8),
    "tiny": ("2nn", 1000, 100, 60, 20, 10),
}
SETUPS: dict[str, tuple[int, list[str] | None]] = {
    # processes, further arguments of fedddp; None is the hand-written loop
    "loop, 1 process": (1, None),
    "fedddp, 1 rank": (1, []),
    "fedddp, 1 rank, channels last": (1, ["--local.channels_last", "true"]),
    "loop, 2 processes": (2, None),
    "fedddp, 2 groups of 1": (2, []),
    "fedddp, 2 groups of 1, channels last": (2, ["--local.channels_last", "true"]),
    "fedddp, 1 group of 2 (DDP)": (2, ["--topology.ranks_per_client", "2"]),
}
WARM_UP = 2  # rounds that are not counted


def arguments(workload: str, root: str | None) -> list[str]:
    """Return the arguments of `fedddp run` for a workload, but for the recipe or file."""
    model, clients, cohort, examples, batch, rounds = WORKLOADS[workload]
    data = ["mnist", "--data.root", root] if root else ["shapes", "--data.image_size", "28"]
    flags = {
        "data.examples": clients * examples,
        "data.clients": clients,
        "cohort.size": cohort,
        "model.name": model,
        "local.batch_size": batch,
        "local.lr": 0.05,
        "rounds": rounds,
        "evaluation.every": rounds,
        "checkpoint.every": rounds,
    }
    return ["--data.dataset", *data, *[word for k, v in flags.items() for word in (f"--{k}", str(v))]]


def time_fedddp(workload: str, root: str | None, processes: int, extra: list[str]) -> list[float]:
    """Return the seconds of each round, without evaluation and checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "speed.yaml"
        file.write_text("{}\n")
        quiet = ["--tracking.trackers", "[]", "--tracking.progress", "false"]
        command = [str(file), *arguments(workload, root), "--output", folder, "--name", "run", *quiet]
        launch(processes, ["-m", "fedddp", "run", *command, *extra])
        rows = read_rows(Path(folder) / "run" / "history.jsonl")
    excluded = ("time/evaluate", "time/checkpoint")
    return [row["time/round"] - sum(row.get(key, 0.0) for key in excluded) for row in rows]


def time_loop(workload: str, root: str | None, processes: int) -> list[float]:
    """Return the seconds of each round of the hand-written loop."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "seconds.json")
        launch(processes, [__file__, "--loop", workload, "--out", out, *(["--root", root] if root else [])])
        seconds: list[float] = json.loads(Path(out).read_text())
    return seconds


def launch(processes: int, program: list[str]) -> None:
    """Start ranks with torchrun, one thread each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*torchrun, str(processes), *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")


def load_clients(workload: str, root: str | None) -> tuple[Tensor, Tensor, nn.Module]:
    """Return the images (clients, examples, C, H, W) and labels (clients, examples), and the model."""
    import torch

    from fedddp import DataConfig, ModelConfig
    from fedddp.data.datasets import load

    model_name, clients, _, examples, _, _ = WORKLOADS[workload]
    if root:
        data = DataConfig(dataset="mnist", root=root, examples=clients * examples)
    else:
        data = DataConfig(dataset="shapes", image_size=28, examples=clients * examples)
    images, _ = load(data)
    assert images.pixels is not None
    x = images.pixels.float().div_(255)
    x = x.sub_(torch.tensor(images.mean).view(-1, 1, 1)).div_(torch.tensor(images.std).view(-1, 1, 1))
    y = torch.from_numpy(images.labels)
    permutation = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    model = ModelConfig(name=model_name).build(classes=images.classes, shape=images.shape, seed=0)
    x = x[permutation].view(clients, examples, *images.shape)
    return x, y[permutation].view(clients, examples), model


def hand_written(workload: str, root: str | None, out: str) -> None:
    """Train FedAvg, written for this model alone: flat views, index slices, fused SGD, one all-reduce."""
    import torch
    import torch.distributed as dist
    from torch.nn.functional import cross_entropy

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    _, clients, cohort, examples, batch, rounds = WORKLOADS[workload]
    x, y, model = load_clients(workload, root)
    parameters = list(model.parameters())
    with torch.no_grad():
        flat = torch.cat([p.reshape(-1) for p in parameters])
        for p, view in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            p.data = view.view_as(p)
    optimizer = torch.optim.SGD(parameters, lr=0.05, fused=True)
    server, total = flat.clone(), torch.zeros_like(flat)
    rng = torch.Generator().manual_seed(0)
    seconds: list[float] = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        total.zero_()
        for client in torch.randperm(clients, generator=rng)[:cohort][rank::size].tolist():
            flat.copy_(server)
            for indices in torch.split(torch.randperm(examples), batch):
                optimizer.zero_grad()
                loss = cross_entropy(model(x[client][indices]), y[client][indices])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            total.add_(flat, alpha=1 / cohort)
        dist.all_reduce(total)
        server.copy_(total)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        Path(out).write_text(json.dumps(seconds))
    dist.destroy_process_group()


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Return the results as Markdown: medians over the counted rounds, and ratios to the loop."""
    lines = []
    for workload, by_setup in results.items():
        model, clients, cohort, examples, batch, _ = WORKLOADS[workload]
        lines += [
            f"### {workload}: {model}, {cohort} of {clients:,} clients per round, {examples} images each, "
            f"batch {batch}",
            "",
            "| configuration | s/round | images/s | against the loop |",
            "|---|--:|--:|--:|",
        ]
        for setup, seconds in by_setup.items():
            processes, _ = SETUPS[setup]
            loop = median(by_setup[f"loop, {processes} process{'es' if processes > 1 else ''}"])
            own = median(seconds)
            lines.append(f"| {setup} | {own:.3f} | {cohort * examples / own:,.0f} | {own / loop:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure all setups in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", default="cnn,tiny")
    parser.add_argument("--repeat", type=int, default=3, help="how often each setup runs")
    parser.add_argument("--root", help="folder with torchvision's MNIST files")
    parser.add_argument("--table", help="Markdown file in which the part between the speed marks is replaced")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args()
    root = str(Path(given.root).resolve()) if given.root else None
    if given.loop:
        hand_written(given.loop, root, given.out)
        return
    from rich.progress import track

    names = given.workloads.split(",")
    results: dict[str, dict[str, list[float]]] = {name: {setup: [] for setup in SETUPS} for name in names}
    work = [(w, c) for w in names for _ in range(given.repeat) for c in SETUPS]
    for workload, setup in track(work, description="measuring"):
        processes, extra = SETUPS[setup]
        if extra is None:
            seconds = time_loop(workload, root, processes)
        else:
            seconds = time_fedddp(workload, root, processes, extra)
        results[workload][setup] += seconds[WARM_UP:]
    import torch

    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    when = f"Measured {time.strftime('%Y-%m-%d')} on {machine}; {given.repeat} runs of each, in turn."
    text = f"{when}\n\n{table(results)}"
    print(text)
    if given.table:
        path = Path(given.table)
        before, _, rest = path.read_text().partition("<!-- speed -->\n")
        after = rest.partition("<!-- /speed -->")[2]
        path.write_text(f"{before}<!-- speed -->\n{text}<!-- /speed -->{after}")


if __name__ == "__main__":
    main()
