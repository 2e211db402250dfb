"""The clients' own models of a run: the server's parameters, and what each client keeps."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedddp.config.baselines import in_effect, trained_by
from fedddp.config.schema import Config
from fedddp.inference.loading import client_names, read_run
from fedddp.inference.model import TrainedModel
from fedddp.models.flat import FlatModel
from fedddp.section import ConfigError
from fedddp.storage.checkpoint import newest_intact
from fedddp.storage.client_states import best_files
from fedddp.storage.run_record import CLIENT, read_record
from fedddp.training.engine import channels_last

MOST_NAMES = 12
"""Names of clients in a message, at most."""


def has_own_models(config: Config) -> bool:
    """Return whether the clients of a run have models of their own."""
    return in_effect(config).algorithm.personalizes


def of_client(model: TrainedModel, directory: Path, client: str | int) -> TrainedModel:
    """Return the model of one client of the run in `directory`, from the server's `model`.

    Raises:
        ConfigError: there is no such client, it was never trained, or clients have no models of their own.
    """
    config, _ = read_run(directory)
    if not has_own_models(config):
        raise ConfigError(
            f"{directory}: with {trained_by(config)} clients have no models of their own; leave client out"
        )
    names = client_names(directory)
    number = number_of(client, names, config.data.clients)
    states = States(directory, model)
    problem = states.problem
    if problem is not None:
        raise ConfigError(f"{directory}: {problem}")
    state, who = states.of_client(number), names[number] if names else str(number)
    if not state:
        raise ConfigError(f"{directory}: client {who} was never trained, and has no model; give another")
    own = PersonalModel(model, config, states)
    own.load(state)
    module = copy.deepcopy(model.module)
    module.load_state_dict(own.flat.module.state_dict())
    return dataclasses.replace(model, module=module.eval(), metadata={**model.metadata, CLIENT: who})


def number_of(client: str | int, names: Sequence[str], clients: int) -> int:
    """Return the number of the client with this name or number.

    Raises:
        ConfigError: there is none.
    """
    given = str(client)
    if given in names:
        return list(names).index(given)
    named_by_number = any(name.isdecimal() for name in names)
    if given.isdecimal() and int(given) < clients and not named_by_number:
        return int(given)
    raise ConfigError(f"client={given} is none of the run's; choose one: {listed(names, clients)}")


def listed(names: Sequence[str], clients: int) -> str:
    """Return how the clients are called: by their `names`, or by numbers where these are empty."""
    if not names:
        return f"0..{clients - 1}"
    more = ", ..." if len(names) > MOST_NAMES else ""
    numbers = "" if any(name.isdecimal() for name in names) else f" (or 0..{clients - 1})"
    return f"{', '.join(names[:MOST_NAMES])}{more}{numbers}"


class PersonalModel:
    """A copy of the server's model that becomes one client's own after the other."""

    def __init__(self, model: TrainedModel, config: Config, states: States) -> None:
        """Copy `model`, of a run with `config`, whose clients keep `states`."""
        config, module = in_effect(config), copy.deepcopy(model.module)
        # A client's state is a flat vector in the memory layout that the run trained with.
        last = states.channels_last
        if last is None:
            record = read_record(states.directory)
            trained_on = record.sessions[-1].device.split()[0] if record and record.sessions else "cpu"
            last = channels_last(config.local, module.cpu(), model.shape, torch.device(trained_on))
        module.to(model.device).to(memory_format=torch.channels_last if last else torch.contiguous_format)
        self.algorithm, self.flat = config.algorithm, FlatModel(module)
        self._server = (
            self.flat.params.clone(),
            self.flat.buffers.clone(),
            self.flat.integer_buffers.clone(),
        )

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put the server's model with what the client keeps into the module."""
        self.flat.load(*self._server)
        self.algorithm.personalize(self.flat, state)


class States:
    """What the clients of a run keep, of the round of a model of it; read when it is needed."""

    def __init__(self, directory: Path, model: TrainedModel) -> None:
        """Find the files: those beside the best model, or of the newest intact checkpoint."""
        self.directory = directory
        saved = newest_intact(directory / "checkpoints")
        self.channels_last: bool | None = None if saved is None else saved.metadata.get("channels_last")
        """The memory layout that the run trained with; None where the checkpoint is older and has none."""
        self.round = None if saved is None else int(saved.metadata["round"])
        wanted = int(model.metadata["round"]) if "round" in model.metadata else None
        files = [] if wanted is None else best_files(directory, model.metadata["metric"], wanted)
        if files:
            self.round = wanted
        elif saved is not None:
            files = saved.files("clients-*.safetensors")
        self.problem: str | None = None
        """Why there are none that go with the model; None where there are."""
        if self.round is None:
            self.problem = "it has no checkpoint with the models of its clients"
        elif wanted not in (None, self.round):
            self.problem = (
                f"the model is of round {wanted}, but what the clients keep is there of round {self.round} "
                "alone; take the final model, without best"
            )
        self._files: dict[int, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as opened:
                self._files |= {int(key.split(".", 1)[0]): path for key in opened.keys()}  # noqa: SIM118

    def __contains__(self, client: int) -> bool:
        """Return whether `client` has a state."""
        return client in self._files

    def of_client(self, client: int) -> dict[str, Tensor]:
        """Return the state of `client`; empty where it has none."""
        if client not in self:
            return {}
        with safe_open(self._files[client], framework="pt") as opened:
            names = [key for key in opened.keys() if key.split(".", 1)[0] == str(client)]  # noqa: SIM118
            return {key.split(".", 1)[1]: opened.get_tensor(key).clone() for key in names}
