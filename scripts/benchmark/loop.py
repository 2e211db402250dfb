#!/usr/bin/env python3
"""Train FedAvg by a loop written by hand for one model: what the machine can do with plain torch.

    python scripts/benchmark/loop.py OUT WORKLOAD ROUNDS [--root DIR] [--device cuda]

Flat views, index slices of tensors in memory, fused SGD, one all-reduce per round; or DDP alone, for the
workload `ddp`. It has no checks, no history, no exact sums and no resume. `speed.py`, `breakdown.py` and
`gpu.py` start it, under torchrun for several processes; it imports neither fedddp nor anything that it does
not use.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from inputs import MODELS, clients
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from workloads import LR, WORKLOADS


def train(name: str, root: str, rounds: int, device: str) -> dict[str, list[float]]:
    """Train a workload; return when each round ended: in seconds of a steady clock, and of CPU time."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    w = WORKLOADS[name]
    x, y = (tensor.to(device) for tensor in clients(name, root))
    torch.manual_seed(0)
    model = MODELS[name]().to(device)
    parameters = list(model.parameters())
    with torch.no_grad():
        flat = torch.cat([p.reshape(-1) for p in parameters])
        for p, view in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            p.data = view.view_as(p)
    optimizer = torch.optim.SGD(parameters, lr=LR, fused=True)
    server, total = flat.clone(), torch.zeros_like(flat)
    by_ddp = w.ddp and size > 1
    network = DistributedDataParallel(model, gradient_as_bucket_view=True) if by_ddp else model
    rng = torch.Generator().manual_seed(0)
    noted: dict[str, list[float]] = {"ended": [], "cpu": []}
    for _ in range(rounds):
        total.zero_()
        cohort = torch.randperm(w.clients, generator=rng)[: w.cohort]
        for client in (cohort if by_ddp else cohort[rank::size]).tolist():
            flat.copy_(server)
            own_x, own_y = x[client], y[client]
            for batch in torch.split(torch.randperm(w.examples, device=device), w.batch):
                indices = batch[rank::size] if by_ddp else batch
                optimizer.zero_grad()
                cross_entropy(network(own_x[indices]), own_y[indices]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            total.add_(flat, alpha=1 / w.cohort)
        if size > 1 and not by_ddp:
            dist.all_reduce(total)
        server.copy_(total)
        if device == "cuda":
            torch.cuda.synchronize()
        noted["ended"].append(time.perf_counter())
        noted["cpu"].append(time.process_time())
    return noted


def main() -> None:
    """Train, and write when each round ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for rank-0.json")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("rounds", type=int)
    parser.add_argument("--root", default="", help="folder with torchvision's MNIST")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    noted = train(given.workload, given.root, given.rounds, given.device)
    if rank == 0:
        (given.out / "rank-0.json").write_text(json.dumps(noted))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
