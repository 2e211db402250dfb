#!/usr/bin/env python3
"""Compare the synchronous algorithms on label-skewed MNIST with equal budgets, for docs/algorithms.md.

    .venv/bin/python scripts/benchmark/algorithms.py --root data --output runs/algorithms --write

With `--write` the table and the plot go into docs/. Finished runs in OUTPUT are not repeated, so the script
can be stopped and started again. `--root` holds torchvision's MNIST files; `fedddp run mnist-lenet
--data.download true` downloads them. It takes eight minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedddp import (
    CohortConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    TrackingConfig,
    algorithms,
    partitions,
)

ROUNDS, EVERY, SEEDS = 40, 2, (0, 1, 2)
STEPS = 16  # of a local training: 2 epochs of 80 examples in batches of 10
SGD = LocalConfig(epochs=2, batch_size=10, lr=0.05)
ADAMW = LocalConfig(epochs=2, batch_size=10, lr=0.001, optimizer="adamw", optimizer_state="keep")
ONE = LocalConfig(steps=1, batch_size=10, lr=0.05)
KEYS = {"global": "eval/accuracy", "clients": "clients/accuracy_mean", "worst": "clients/accuracy_worst10"}
ALGORITHMS: dict[str, tuple[algorithms.Algorithm, LocalConfig]] = {
    "FedAvg": (algorithms.FedAvg(), SGD),
    "FedAvgM": (algorithms.FedAvgM(momentum=0.9, lr=0.3), SGD),
    "FedProx": (algorithms.FedProx(mu=0.1), SGD),
    "FedAdam": (algorithms.FedAdam(lr=0.01), SGD),
    "FedYogi": (algorithms.FedYogi(lr=0.01), SGD),
    "FedAdagrad": (algorithms.FedAdagrad(lr=0.03), SGD),
    "ServerOptimizer": (algorithms.ServerOptimizer(optimizer="Adam", lr=0.01), SGD),
    "SCAFFOLD": (algorithms.SCAFFOLD(), SGD),
    "FedDyn": (algorithms.FedDyn(alpha=0.1), SGD),
    "FedNova": (algorithms.FedNova(), SGD),
    "QFedAvg": (algorithms.QFedAvg(q=0.1), SGD),
    "MOON": (algorithms.MOON(), SGD),
    "LocalSGD": (algorithms.LocalSGD(), SGD),
    "DiLoCo": (algorithms.DiLoCo(), ADAMW),
    "SyncSGD": (algorithms.SyncSGD(), ONE),
    "FedBN": (algorithms.FedBN(), SGD),
    "FedPer": (algorithms.FedPer(), SGD),
    "Ditto": (algorithms.Ditto(), SGD),
}
PANELS = (
    ("Server optimizers", "global", ("FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "ServerOptimizer")),
    ("Corrections of client drift", "global", ("FedProx", "SCAFFOLD", "FedDyn", "FedNova", "MOON")),
    ("Other weights and numbers of steps", "global", ("QFedAvg", "LocalSGD", "DiLoCo", "SyncSGD")),
    ("Personalized models", "clients", ("FedBN", "FedPer", "Ditto")),
)
"""The panels of the plot: title, what is measured, and the algorithms drawn beside FedAvg."""


def config_of(name: str, seed: int, root: str) -> Config:
    """Return the configuration of an algorithm; SyncSGD has a round for every step of the others."""
    algorithm, local = ALGORITHMS[name]
    rounds = ROUNDS * (STEPS if local is ONE else 1)
    return Config(
        data=DataConfig(
            dataset="mnist",
            root=root,
            examples=6000,
            clients=60,
            partition=partitions.Shards(per_client=2),
            holdout=0.2,
        ),
        model=ModelConfig(name="2nn"),
        local=local,
        cohort=CohortConfig(size=10),
        algorithm=algorithm,
        evaluation=EvaluationConfig(every=EVERY * rounds // ROUNDS, clients=60),
        tracking=TrackingConfig(trackers=[], progress=False),
        rounds=rounds,
        seed=seed,
    )


def with_layer_norm(seed: int) -> nn.Module:
    """Return the model 2nn with layer norm, for FedBN."""
    torch.manual_seed(seed)
    first = [nn.Flatten(), nn.Linear(784, 200), nn.LayerNorm(200), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(200, 200), nn.LayerNorm(200), nn.ReLU(), nn.Linear(200, 10))


def results(name: str, seed: int, root: str, output: Path) -> dict[str, list[float]]:
    """Return the accuracies of a run, which is trained unless its file exists."""
    file = output / f"{name}-{seed}.json"
    if not file.exists():
        with tempfile.TemporaryDirectory() as folder:
            module = with_layer_norm(seed) if name == "FedBN" else None
            federation = Federation(config_of(name, seed, root), module=module, output=folder)
            try:
                rows = federation.run().history
            except ValueError as error:
                sys.exit(f"error: {name}: {error}")
        rows = [row for row in rows if "clients/accuracy_mean" in row]
        found = {short: [row[key] for row in rows if key in row] for short, key in KEYS.items()}
        file.write_text(json.dumps(found))
        print(f"{name}, seed {seed}: {found['clients'][-1]:.3f}", flush=True)
    saved: dict[str, list[float]] = json.loads(file.read_text())
    return saved


def table(curves: dict[str, list[dict[str, list[float]]]]) -> str:
    """Return the table: means and standard deviations over seeds, in percent."""
    lines = ["| algorithm | global model | clients' held-out data | worst tenth |", "|---|--:|--:|--:|"]
    for name, runs in curves.items():
        cells = []
        for key in ("global", "clients", "worst"):
            if not all(run[key] for run in runs):  # there is no global model
                cells.append("–")
                continue
            last = 100 * np.array([run[key][-1] for run in runs])
            cells.append(f"{last.mean():.1f} ± {last.std():.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(curves: dict[str, list[dict[str, list[float]]]], file: Path) -> None:
    """Draw accuracy over rounds, the mean over seeds: a panel per family, with FedAvg in all."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharex=True, sharey=True, layout="constrained")
    for axis, (title, key, names) in zip(axes.flat, PANELS, strict=True):
        for number, name in enumerate(("FedAvg", *names)):
            values = 100 * np.mean([run[key] for run in curves[name]], axis=0)
            style = {"color": f"C{number - 1}", "linewidth": 3.5 - 0.5 * number}  # equal curves stay visible
            style |= {"color": "0.75", "linewidth": 6} if name == "FedAvg" else {}
            axis.plot(np.arange(1, len(values) + 1) * EVERY, values, label=name, **style)
        measured = "on the test set" if key == "global" else "on clients' held-out data"
        axis.set(title=f"{title}: {measured}", xlim=(EVERY, ROUNDS), ylim=(10, 100))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    for axis in axes[1]:
        axis.set_xlabel("round")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy in %")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Train what is missing, then print the table, and write it with `--write`."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--root", default="data", help="folder with torchvision's MNIST")
    parser.add_argument("--output", type=Path, default=Path("runs/algorithms"), help="folder of results")
    parser.add_argument("--write", action="store_true", help="put table and plot into docs/")
    options = parser.parse_args()
    if not (Path(options.root) / "MNIST").is_dir():
        sys.exit(f"error: --root {options.root} has no folder MNIST; give the one that torchvision made")
    options.output.mkdir(parents=True, exist_ok=True)
    curves = {
        name: [results(name, seed, options.root, options.output) for seed in SEEDS] for name in ALGORITHMS
    }
    print(table(curves))
    if options.write:
        docs = Path(__file__).resolve().parents[2] / "docs"
        page, begin, end = docs / "algorithms.md", "<!-- benchmark -->\n", "\n<!-- end -->"
        before, _, rest = page.read_text().partition(begin)
        page.write_text(before + begin + table(curves) + end + rest.partition(end)[2])
        plot(curves, docs / "algorithms.svg")


if __name__ == "__main__":
    main()
