"""What users import, and that every setting is documented and survives the way to disk and back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedddp
from fedddp import Cohort, Data, Dirichlet, Federation, Local, Run, Track, load
from fedddp.config.loader import CHOICES, choices, recipes, to_yaml
from fedddp.config.loader import load as load_run


def test_everything_public_can_be_imported_and_is_documented() -> None:
    for name in fedddp.__all__:
        value = getattr(fedddp, name)
        assert isinstance(value, str) or value.__doc__, name
    assert set(dir(fedddp)) == set(fedddp.__all__)


def sections(cls: Any) -> Iterator[Any]:
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for kind in typing.get_args(hint) or (hint,):
            if dataclasses.is_dataclass(kind):
                for option in choices(kind).values() if kind in CHOICES else [kind]:  # type: ignore[arg-type]
                    yield from sections(option)


def test_every_setting_is_documented() -> None:
    for cls in set(sections(Run)):
        documented = {
            p.arg_name
            for owner in cls.__mro__
            if dataclasses.is_dataclass(owner)
            for p in docstring_parser.parse_from_object(owner).params  # type: ignore[arg-type]
            if p.description
        }
        missing = {item.name for item in dataclasses.fields(cls)} - documented
        assert not missing, (cls, missing)


@pytest.mark.parametrize("recipe", [name for name in recipes() if not name.startswith("compare-")])
def test_recipes_survive_the_way_to_disk_and_back(recipe: str, tmp_path: Path) -> None:
    run = load(recipe)
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(run))
    assert load(str(file)) == run
    assert len(recipes()[recipe]) > 10, "the first line says what it trains"


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"rounds": 7, "algorithm": {"name": "FedProx", "mu": 0.5}, "seed": 3}))
    run = load_run(str(file), ["--rounds", "9", "--algorithm.mu", "0.25"])
    assert (run.rounds, run.seed, run.local) == (9, 3, Local())
    assert (type(run.algorithm).__name__, run.algorithm.mu) == ("FedProx", 0.25)  # type: ignore[attr-defined]
    switched = load_run(str(file), ["--algorithm", "FedAvgM", "--algorithm.momentum", "0.3"])
    assert (type(switched.algorithm).__name__, switched.algorithm.momentum) == ("FedAvgM", 0.3)  # type: ignore[attr-defined]
    steps = load_run("digits", ["--local.steps", "4", "--track.with", "[tensorboard]"])
    assert (steps.local.steps, steps.track.with_) == (4, ["tensorboard"])


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits


def test_a_users_module_and_datasets_train_twice_in_one_process(tmp_path: Path) -> None:
    labels = torch.arange(120) % 2
    images = torch.zeros(120, 1, 4, 4, dtype=torch.uint8)
    images[labels == 1, :, :2] = 200
    model = Own()
    before = [p.clone() for p in model.parameters()]
    outcomes = [
        Federation(
            model=model,
            train=TensorDataset(images[:100], labels[:100]),
            test=TensorDataset(images[100:], labels[100:]),
            data=Data(clients=5, partition=Dirichlet(alpha=1.0)),
            cohort=Cohort(size=3),
            local=Local(lr=0.2, batch_size=8),
            track=Track(with_=[], progress=False),
            output=str(tmp_path),
            rounds=3,
        ).run()
        for _ in range(2)
    ]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "it is copied"
    assert outcomes[0].folder != outcomes[1].folder
    for one, two in zip(*(o.model.parameters() for o in outcomes), strict=True):
        assert torch.equal(one, two)
    assert outcomes[0].history[-1]["eval/accuracy"] == 1.0
    assert isinstance(outcomes[0].model, Own)
    assert not outcomes[0].model.training


def test_short_commands_import_nothing_heavy() -> None:
    """`fedddp --help`, `recipes` and `runs` answer at once, because torch and the like stay out."""
    heavy = ("torch", "jsonargparse", "accelerate", "wandb", "sklearn", "matplotlib")
    for command in (["--help"], ["recipes"], ["runs", "."]):
        code = (
            "import sys\nfrom fedddp.cli import main\n"
            f"try:\n    main({command!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
            f"found = [name for name in {heavy!r} if name in sys.modules]\nassert not found, found"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
