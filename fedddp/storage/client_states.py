"""Client states: what clients keep between rounds, and how it moves with a client to another group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from fedddp.distributed.world import World
from fedddp.storage.checkpoint import write_tensors

State = dict[str, Tensor]

BEST_CLIENTS = "best-clients"
"""Folder of a run directory with what clients kept in the rounds of its best models."""


class ClientStates:
    """The states of the clients trained so far, each in CPU memory of the leader of its home group.

    A client's home is the group that trained it last. Clients never sampled cost nothing. Every rank knows
    all homes, because it knows every assignment; so a state moves by one message, without a request.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.kept: dict[int, State] = {}
        self.homes: dict[int, int] = {}  # client -> group

    def move(self, assignment: list[list[int]]) -> None:
        """Collective. Bring the states of each group's clients (`assignment[group]`) to its leader."""
        for group, clients in enumerate(assignment):
            for client in clients:
                home = self.homes.get(client, group)
                if home != group:
                    self._move(client, home, group)
                    self.homes[client] = group

    def _move(self, client: int, home: int, group: int) -> None:
        source, target = self.world.leader(home), self.world.leader(group)
        if self.world.rank == source:
            packed = _pack(self.kept.pop(client, {}))  # none, if its update was never valid
            self.world.send(torch.tensor([packed.numel()]), target)
            self.world.send(packed, target)
        elif self.world.rank == target:
            length = torch.zeros(1, dtype=torch.int64)
            self.world.receive(length, source)
            packed = torch.empty(int(length), dtype=torch.uint8)
            self.world.receive(packed, source)
            self.kept[client] = _unpack(packed)

    def share(self, client: int) -> State:
        """Collective over the group. Return a copy of the client's state on every rank of its group."""
        state = self.kept.get(client, {}) if self.world.leads_group else {}
        if self.world.ranks_per_client == 1:
            return dict(state)
        device = self.world.device
        packed = _pack(state).to(device)
        length = torch.tensor([packed.numel()], device=device)
        self.world.group_broadcast(length)
        if not self.world.leads_group:
            packed = torch.empty(int(length), dtype=torch.uint8, device=device)
        self.world.group_broadcast(packed)
        return _unpack(packed.cpu())

    def keep(self, client: int, state: State) -> None:
        """Keep `state` until the client is trained again; the group's leader does."""
        if self.world.leads_group and state:
            self.kept[client] = state

    def settle(self, assignment: list[list[int]], trained: Iterable[int]) -> None:
        """Record, on every rank, the groups of `assignment` as the homes of the `trained` clients."""
        done = set(trained)
        for group, clients in enumerate(assignment):
            self.homes.update({client: group for client in clients if client in done})

    def save(self, folder: Path) -> list[Path]:
        """Write the states this rank keeps to `folder`, one file per group; return it, if there are any."""
        if not self.kept:
            return []
        path = folder / f"clients-{self.world.group:05d}.safetensors"
        _write(self.kept, path)
        return [path]

    def save_best(self, directory: Path, metric: str, round_number: int, kept: Mapping[int, State]) -> None:
        """Collective. Write the states `kept` by this rank in the best round by `metric`."""
        if self.world.is_coordinator:
            (directory / BEST_CLIENTS).mkdir(exist_ok=True)
        self.world.barrier()
        if kept:
            name = _best_name(metric, round_number, f"{self.world.group:05d}")
            _write(kept, directory / BEST_CLIENTS / name)

    def load(self, files: Iterable[Path]) -> None:
        """Restore states saved with any number of groups; client k goes to group k mod G."""
        self.kept, self.homes = {}, {}
        for path in sorted(files):
            with safe_open(path, framework="pt") as saved:
                for key in saved.keys():  # noqa: SIM118 - not a dict
                    client, name = int(key.split(".", 1)[0]), key.split(".", 1)[1]
                    self.homes[client] = client % self.world.groups
                    if self.world.leads_group and self.homes[client] == self.world.group:
                        self.kept.setdefault(client, {})[name] = saved.get_tensor(key).clone()


def best_files(directory: Path, metric: str, round_number: int) -> list[Path]:
    """Return the files of a run with what its clients kept in the best round by `metric`."""
    return sorted((directory / BEST_CLIENTS).glob(_best_name(metric, round_number, "*")))


def prune_best(directory: Path, metric: str, round_number: int) -> None:
    """Delete the states of other rounds than `round_number`, that of the best model by `metric`."""
    of_round = {*best_files(directory, metric, round_number)}
    for path in {*(directory / BEST_CLIENTS).glob(_best_name(metric, None, "*"))} - of_round:
        path.unlink(missing_ok=True)


def _best_name(metric: str, round_number: int | None, group: str) -> str:
    of_round = "*" if round_number is None else f"{round_number:05d}"
    return f"{metric.replace('/', '-')}-{of_round}-{group}.safetensors"


def _write(states: Mapping[int, State], path: Path) -> None:
    flat = {f"{client}.{n}": t for client, s in states.items() for n, t in s.items()}
    write_tensors(flat, path)


def _pack(state: Mapping[str, Tensor]) -> Tensor:
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _unpack(packed: Tensor) -> State:
    # Cloned, as above: kernels round differently where memory is not aligned as torch aligns its own.
    return {name: tensor.clone() for name, tensor in safetensors.torch.load(packed.numpy().tobytes()).items()}
