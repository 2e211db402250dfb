"""Every algorithm again, in a few lines of float64 on one process, from the papers' equations alone."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import Dataset

from fedddp import Config
from fedddp.data.datasets import Images, from_dataset
from fedddp.rng import stream
from fedddp.tasks.classification import Classification

ROUNDS, CLIENTS, COHORT = 3, 5, 3

Indices = NDArray[np.int64]


class Pixels(Dataset[tuple[Tensor, int]]):
    """36 images of 3 x 3 in 3 classes."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.pixels = torch.from_numpy(rng.integers(0, 256, (36, 1, 3, 3), dtype=np.uint8))
        self.targets: list[int] = rng.integers(0, 3, 36).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], self.targets[index]


def net(norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        middle = nn.BatchNorm1d(4) if norm else nn.Identity()
        layers = [nn.Flatten(), nn.Linear(9, 4), middle, nn.Tanh(), nn.Linear(4, 3)]
        if dropout:
            layers.insert(4, nn.Dropout(dropout))
        return nn.Sequential(*layers)


class Point(nn.Module):
    """The one parameter w, as an output (b, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.w.expand(len(images), 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadratic(Classification):
    """(w − 1)²/2 for targets 0, 10 (w + 1)²/2 for targets 1."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        curvature, minimum = 1.0 + 9.0 * targets, 1.0 - 2.0 * targets
        return (0.5 * curvature * (outputs[:, 0] - minimum).square()).sum()


class TwoExamples(Dataset[tuple[Tensor, int]]):
    """One of each target."""

    def __init__(self) -> None:
        self.targets = [0, 1]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), 100 * index, dtype=torch.uint8), index


HEAD = slice(-15, None)  # of the parameters: 4 x 3 weights, 3 biases
NORM = slice(40, 48)


class Reference:
    """The data and the local training of a run, in float64 and without fedddp's own loops."""

    def __init__(self, config: Config, norm: bool = False, clients: int = CLIENTS) -> None:
        images: Images = from_dataset(Pixels())
        assert images.pixels is not None
        x = images.pixels.double() / 255
        self.x = (x - images.mean[0]) / images.std[0]
        self.y = torch.from_numpy(images.labels)
        self.split = config.data.partition.split(images.labels, clients, config.seed)
        self.config, self.local = config, config.local
        self.net = net(norm).double()
        self.w0 = parameters_to_vector(self.net.parameters()).detach().clone()
        self.b0 = self.buffers()
        self.b = self.b0  # after the last local training
        self.round = 0
        self.losses: list[list[tuple[float, int]]] = [[] for _ in range(ROUNDS)]
        """Summed loss and examples of every step, by round."""

    @property
    def lr(self) -> float:
        """η of this round: the first one trains with all of it."""
        factors = {
            "constant": 1.0,
            "cosine": (1 + math.cos(math.pi * self.round / ROUNDS)) / 2,
            "step": math.prod([self.local.decay] * (self.round // self.local.decay_every)),
        }
        return self.local.lr * factors[self.local.schedule]

    def buffers(self) -> Tensor:
        floats = [b.flatten() for b in self.net.buffers() if b.dtype.is_floating_point]
        return torch.cat(floats).clone() if floats else torch.empty(0)

    def set(self, w: Tensor, b: Tensor | None = None) -> None:
        vector_to_parameters(w, self.net.parameters())
        if b is not None and len(b):
            statistics = dict(self.net[2].named_buffers())
            statistics["running_mean"].copy_(b[:4])
            statistics["running_var"].copy_(b[4:])

    def cohorts(self) -> Iterator[list[int]]:
        for self.round in range(ROUNDS):
            yield self.config.cohort.sample(CLIENTS, self.config.seed, self.round).tolist()

    def n(self, client: int) -> int:
        return len(self.split.indices(client))

    def p(self, cohort: list[int]) -> list[float]:
        total = sum(map(self.n, cohort))
        return [self.n(k) / total for k in cohort]

    def batches(self, client: int) -> Iterator[Indices]:
        step, epoch, size = 0, 0, self.local.batch_size
        while epoch < self.local.epochs if self.local.steps is None else step < self.local.steps:
            rng = stream("batches", self.config.seed, self.round, client, epoch)
            indices = rng.permutation(self.split.indices(client))
            for start in range(0, len(indices), size):
                if step == self.local.steps:
                    return
                yield indices[start : start + size]
                step += 1
            epoch += 1

    def loss(self, w: Tensor, client: int, b: Tensor | None = None) -> float:
        """Return F_k(w), of the model as it predicts: in evaluation mode."""
        self.set(w, b)
        chosen = self.split.indices(client)
        self.net.eval()
        return float(F.cross_entropy(self.net(self.x[chosen]), self.y[chosen]).detach())

    def train(
        self,
        w: Tensor,
        client: int,
        correct: Callable[[Tensor], Tensor | float] = lambda w: 0.0,
        extra: Callable[[Indices], Tensor | float] = lambda chosen: 0.0,
        b: Tensor | None = None,
        make: Callable[[Tensor], torch.optim.Optimizer] | None = None,
    ) -> tuple[Tensor, int]:
        """Return y_k and K_k; `correct(w)` is added to each gradient, `extra(batch)` to each loss."""
        weights = nn.Parameter(w.clone())
        optimizer = (
            torch.optim.SGD([weights], self.lr, self.local.momentum) if make is None else make(weights)
        )
        steps = 0
        self.set(weights, self.b0 if b is None else b)
        for chosen in self.batches(client):
            self.set(weights.detach().clone())
            self.net.train().zero_grad()
            loss = F.cross_entropy(self.net(self.x[chosen]), self.y[chosen])
            self.losses[self.round].append((float(loss.detach()) * len(chosen), len(chosen)))
            backward(loss + extra(chosen))
            weights.grad = gradient(self.net) + correct(weights.detach())
            if self.local.clip_norm is not None:  # the whole step
                nn.utils.clip_grad_norm_(weights, self.local.clip_norm)
            optimizer.step()
            steps += 1
        self.b = self.buffers()
        return weights.detach().clone(), steps


def pull(strength: float, x: Tensor, constant: Tensor | float = 0.0) -> Callable[[Tensor], Tensor]:
    """Return w -> strength (w − x) + constant, which is added to gradients."""
    return lambda w: strength * (w - x) + constant


def backward(objective: Tensor) -> None:
    objective.backward()  # type: ignore[no-untyped-call]


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def mean(vectors: list[Tensor], weights: list[float] | None = None) -> Tensor:
    weights = weights or [1 / len(vectors)] * len(vectors)
    return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))  # type: ignore[return-value]


def fedavg(r: Reference, mu: float = 0.0, lr: float = 1.0, beta: float = 0.0) -> Tensor:
    x, b, v = r.w0, r.b0, torch.zeros_like(r.w0)
    for cohort in r.cohorts():
        updates, bs = [], []
        for k in cohort:
            updates.append(r.train(x, k, pull(mu, x), b=b)[0] - x)
            bs.append(r.b)
        v = beta * v - mean(updates, r.p(cohort))
        x, b = x - lr * v, mean(bs, r.p(cohort))
    return torch.cat([x, b])


def adaptive(r: Reference, kind: str, lr: float, b1: float, tau: float, b2: float = 0.99) -> Tensor:
    x, m, v = r.w0, torch.zeros_like(r.w0), torch.full_like(r.w0, tau**2)
    for cohort in r.cohorts():
        d = mean([r.train(x, k)[0] - x for k in cohort], r.p(cohort))
        m = b1 * m + (1 - b1) * d
        if kind == "adam":
            v = b2 * v + (1 - b2) * d**2
        elif kind == "yogi":
            v = v - (1 - b2) * d**2 * torch.sign(v - d**2)
        else:
            v = v + d**2
        x = x + lr * m / (v.sqrt() + tau)
    return x


def server_adam(r: Reference, lr: float, betas: tuple[float, float]) -> Tensor:
    x, m, v = r.w0, torch.zeros_like(r.w0), torch.zeros_like(r.w0)
    for t, cohort in enumerate(r.cohorts(), 1):
        g = -mean([r.train(x, k)[0] - x for k in cohort], r.p(cohort))
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        x = x - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
    return x


def scaffold(r: Reference, lr: float) -> Tensor:
    x, c = r.w0, torch.zeros_like(r.w0)
    own: dict[int, Tensor] = {}
    for cohort in r.cohorts():
        updates, changes = [], []
        for k in cohort:
            c_k = own.get(k, torch.zeros_like(x))
            y, steps = r.train(x, k, pull(0.0, x, c - c_k))
            own[k] = c_k - c + (x - y) / (steps * r.lr) if steps else c_k
            updates.append(y - x)
            changes.append(own[k] - c_k)
        x = x + lr * mean(updates)
        c = c + len(cohort) / CLIENTS * mean(changes)
    return x


def feddyn(r: Reference, alpha: float) -> Tensor:
    x, h = r.w0, torch.zeros_like(r.w0)
    own: dict[int, Tensor] = {}
    for cohort in r.cohorts():
        ys = []
        for k in cohort:
            dual = own.get(k, torch.zeros_like(x))
            y, _ = r.train(x, k, pull(alpha, x, -dual))
            own[k] = dual - alpha * (y - x)
            ys.append(y)
        h = h - alpha / CLIENTS * sum(y - x for y in ys)
        x = mean(ys) - h / alpha
    return x


def norm_of_coefficients(steps: int, lr: float, rho: float, mu: float) -> float:
    """Return ‖a‖₁: torch's SGD is linear in the gradients, so each alone gives its own coefficient."""
    a = 0.0
    for number in range(steps):
        w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr, rho)
        for step in range(steps):
            w.grad = mu * w.detach() + float(step == number)
            optimizer.step()
        a += abs(float(w.detach()) / lr)
    return a


def fednova(r: Reference, mu: float = 0.0) -> Tensor:
    x, b, rho, eta = r.w0, r.b0, r.local.momentum, r.local.lr
    for cohort in r.cohorts():
        directions, a, bs = [], [], []
        for k in cohort:
            y, steps = r.train(x, k, pull(mu, x), b=b)
            bs.append(r.b)
            if mu and rho:
                a_k = norm_of_coefficients(steps, eta, rho, mu)
            elif mu:  # the paper's forms, for prox and for momentum
                a_k = sum((1 - eta * mu) ** i for i in range(steps))
            else:
                a_k = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
            directions.append((y - x) / a_k if steps else torch.zeros_like(x))
            a.append(a_k)
        p = r.p(cohort)
        x = x + sum(w * a_k for w, a_k in zip(p, a, strict=True)) * mean(directions, p)
        b = mean(bs, p)
    return torch.cat([x, b])


def qfedavg(r: Reference, q: float) -> Tensor:
    x, b = r.w0, r.b0
    for cohort in r.cohorts():
        total, h, lipschitz, bs = torch.zeros_like(x), 0.0, 1 / r.lr, []
        for k in cohort:
            loss = r.loss(x, k, b) if r.n(k) else 0.0
            step = lipschitz * (x - r.train(x, k, b=b)[0])
            bs.append(r.b)
            total += loss**q * step
            if not loss:  # of a client without examples
                continue
            h += q * loss ** (q - 1) * float(step.square().sum()) + lipschitz * loss**q
        x, b = x - total / h, mean(bs, r.p(cohort))
    return torch.cat([x, b])


def local_sgd(r: Reference, lr: float, beta: float, adamw: bool = False) -> Tensor:
    outer = nn.Parameter(r.w0.clone())
    optimizer = torch.optim.SGD([outer], lr, beta, nesterov=beta > 0)
    kept: dict[int, dict[str, Tensor]] = {}
    for cohort in r.cohorts():
        x, updates = outer.detach().clone(), []
        for k in cohort:
            inner: list[torch.optim.Optimizer] = []

            def make(
                weights: Tensor, k: int = k, inner: list[torch.optim.Optimizer] = inner
            ) -> torch.optim.Optimizer:
                inner.append(torch.optim.AdamW([weights], lr=r.local.lr, weight_decay=0.0))
                inner[0].state[weights] = kept.get(k, {})
                return inner[0]

            updates.append(r.train(x, k, make=make if adamw else None)[0] - x)
            if adamw:
                kept[k] = next(iter(inner[0].state.values()))
        outer.grad = -mean(updates)
        optimizer.step()
    return outer.detach()


def sync_sgd(r: Reference) -> Tensor:
    x = r.w0
    for cohort in r.cohorts():  # one batch of all clients' examples, at once
        together = np.concatenate([next(iter(r.batches(k))) for k in cohort])
        r.set(x)
        r.net.zero_grad()
        backward(F.cross_entropy(r.net(r.x[together]), r.y[together]))
        x = x - r.local.lr * gradient(r.net)
    return x


def moon(r: Reference, mu: float, temperature: float) -> Tensor:
    x, b = r.w0, r.b0
    previous: dict[int, tuple[Tensor, Tensor]] = {}

    def frozen(w: Tensor, b: Tensor, chosen: Indices) -> Tensor:
        other = copy.copy(r)
        other.net = copy.deepcopy(r.net)
        other.set(w, b)
        features: Tensor = other.net.eval()[:-1](r.x[chosen])
        return features.detach()

    for cohort in r.cohorts():
        ys, bs = [], []
        for k in cohort:
            models = [(x, b), *([previous[k]] if k in previous else [])]

            def term(chosen: Indices, models: list[tuple[Tensor, Tensor]] = models) -> Tensor | float:
                if len(models) == 1:
                    return 0.0
                near, far = (frozen(*model, chosen) for model in models)
                body = r.net[:-1]  # whose statistics count each batch once
                buffers = {name: buffer.clone() for name, buffer in body.named_buffers()}
                z = torch.func.functional_call(body, buffers, (r.x[chosen],))
                near, far = (
                    torch.exp((z * f).sum(1) / z.norm(dim=1) / f.norm(dim=1) / temperature)
                    for f in (near, far)
                )
                return mu * -torch.log(near / (near + far)).mean()

            y, _ = r.train(x, k, extra=term, b=b)
            previous[k] = (y, r.b)
            ys.append(y)
            bs.append(r.b)
        x, b = mean(ys, r.p(cohort)), mean(bs, r.p(cohort))
    return torch.cat([x, b])


def local_layers(r: Reference, where: slice, *, buffers: bool) -> tuple[Tensor, dict[int, Tensor]]:
    x, b = r.w0, r.b0
    own: dict[int, Tensor] = {}
    own_b: dict[int, Tensor] = {}
    for cohort in r.cohorts():
        ys, bs = [], []
        for k in cohort:
            start = x.clone()
            start[where] = own.get(k, x[where])
            y, _ = r.train(start, k, b=own_b.get(k, b))
            own[k] = y[where].clone()
            bs.append(r.b)
            if buffers:
                own_b[k] = r.b
            y[where] = x[where]
            ys.append(y)
        x = mean(ys, r.p(cohort))
        b = b if buffers else mean(bs, r.p(cohort))
    return torch.cat([x, b]), {k: torch.cat([own[k], own_b.get(k, torch.empty(0))]) for k in own}


def ditto(r: Reference, lam: float) -> tuple[Tensor, dict[int, Tensor]]:
    x = r.w0
    own: dict[int, Tensor] = {}
    for cohort in r.cohorts():
        ys = []
        for k in cohort:
            own[k] = r.train(own.get(k, x), k, pull(lam, x))[0]
            ys.append(r.train(x, k)[0])
        x = mean(ys, r.p(cohort))
    return x, own
