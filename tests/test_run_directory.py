"""The run directory: one run at a time, always the same run, whatever happened to its files."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from launching import await_file
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from fedddp import (
    CheckpointConfig,
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    Result,
    TopologyConfig,
    TrackingConfig,
)
from fedddp.algorithms import Algorithm, FedAvg, FedBuff
from fedddp.config.loader import dump_yaml, load_config, to_dict
from fedddp.data.partition import Dirichlet
from fedddp.distributed.launch import connect
from fedddp.distributed.world import World
from fedddp.privacy import CentralDP
from fedddp.storage.checkpoint import Checkpoints
from fedddp.testing import run_world
from fedddp.training import run_directory as module
from fedddp.training.run_directory import run_directory, write_record
from fedddp.training.session import Session

QUIET = TrackingConfig(trackers=[], progress=False)


@pytest.fixture
def world() -> World:
    world = connect(TopologyConfig())
    world.close()
    return world


def enter(world: World, default_name: str = "digits", **settings: Any) -> tuple[Path, Config]:
    """Start a run with these settings; return its directory and its configuration."""
    config = Config(**settings)
    with run_directory(config, default_name, world, to_dict(config)) as (directory, config):
        write_record(directory, to_dict(config))
        (directory / "history.jsonl").touch()
        return directory, config


def test_a_taken_default_name_is_numbered_and_auto_resumes_the_newest(world: World) -> None:
    made = [enter(world)[0].name for _ in range(11)]
    assert made == ["digits", *(f"digits-{n}" for n in range(2, 12))]
    Path("runs/digits-old").mkdir()
    directory, config = enter(world, resume="auto")
    assert (directory.name, config.name, config.resume) == ("digits-11", "digits-11", "auto")
    assert enter(world, "other", resume="auto")[0].name == "other"


@pytest.mark.parametrize("existing", ["history.jsonl", "checkpoints"])
def test_a_named_directory_that_holds_a_run_is_rejected_without_resume(world: World, existing: str) -> None:
    Path("runs/mine").mkdir(parents=True)
    (Path("runs/mine") / existing).mkdir()
    with pytest.raises(ConfigError, match=r"runs/mine holds a run already; .* --resume auto"):
        enter(world, name="mine")


def set_restart_count(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_a_restarted_launcher_resumes_in_its_own_directory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _ = enter(world)
    other = Path("runs/digits-2")
    other.mkdir()
    (other / ".launcher").write_text("elsewhere 1 ")
    with monkeypatch.context() as patch:
        set_restart_count(patch)
        directory, config = enter(world)
        assert (directory, config.resume) == (mine, "auto")
        named, config = enter(world, name="digits")
        assert (named, config.resume) == (mine, "auto")


def test_a_restarted_launcher_does_not_resume_a_directory_that_its_first_start_was_denied(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path("runs/theirs")
    other.mkdir(parents=True)
    (other / "history.jsonl").touch()
    with monkeypatch.context() as patch:
        set_restart_count(patch)
        with pytest.raises(ConfigError, match="holds a run already"):
            enter(world, name="theirs")


def _start_two_runs(output: Path, resume: Literal["never", "auto"], deleted: bool) -> str:
    """Rank 0 holds the directory until rank 1, a run of its own, is rejected."""
    rank = os.environ["RANK"]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    module.LOCK_WAIT_S = 0.3
    world = connect(TopologyConfig())
    config = Config(output=str(output), name="one", resume=resume)
    if rank == "0":
        with run_directory(config, "", world, to_dict(config)) as (directory, _):
            if deleted:
                (directory / ".lock").unlink()
            (output / "held").touch()
            await_file(output / "rejected")
            return directory.name
    await_file(output / "held")
    try:
        with run_directory(config, "", world, to_dict(config)):
            return "two runs in one directory"
    except ConfigError as error:
        (output / "rejected").touch()
        return str(error)
    finally:
        world.close()


@pytest.mark.parametrize(("resume", "deleted"), [("never", False), ("auto", False), ("auto", True)])
def test_a_second_run_is_rejected_from_a_locked_directory(tmp_path: Path, resume: str, deleted: bool) -> None:
    first, second = run_world(_start_two_runs, tmp_path, resume, deleted, size=2)
    assert first == "one"
    assert second == f"name: another run is writing to {tmp_path}/one; wait for it or choose another --name"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"rounds: [", "is corrupt"),
        (b"\xff\xfe\x00", "is corrupt"),
        (b"", "it holds no sections"),
        (b"- 1\n- 2\n", "it holds no sections"),
        (b"[" * 5000, "is corrupt"),
    ],
)
def test_a_corrupt_config_yaml_is_reported_in_one_line(world: World, text: bytes, words: str) -> None:
    directory, _ = enter(world)
    (directory / "config.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=words) as rejection:
        enter(world, resume="auto")
    assert "\n" not in str(rejection.value)
    assert "delete it to resume" in str(rejection.value)
    (directory / "config.yaml").unlink()
    enter(world, resume="auto")


def test_a_resume_with_other_settings_is_rejected_and_keeps_config_yaml(world: World) -> None:
    directory, _ = enter(world)
    before = (directory / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"local.lr: is 0.5, but .* was started with 0.05"):
        enter(world, resume="auto", local=LocalConfig(lr=0.5))
    assert (directory / "config.yaml").read_text() == before
    with pytest.raises(ConfigError, match=r"topology.threads: is 2, but .* was started with null"):
        enter(world, resume="auto", topology=TopologyConfig(threads=2))
    enter(world, resume="auto", rounds=99, topology=TopologyConfig(timeout_s=5))
    assert "rounds: 99" in (directory / "config.yaml").read_text()


EXECUTION: list[dict[str, Any]] = [
    {"data": DataConfig(root="elsewhere")},
    {"data": DataConfig(memory="stream")},
    {"data": DataConfig(workers=7)},
    {"topology": TopologyConfig(ranks_per_client=2)},
    {"topology": TopologyConfig(coordinator="dedicated")},
    {"topology": TopologyConfig(backend="gloo")},
    {"topology": TopologyConfig(device="cpu")},
    {"topology": TopologyConfig(timeout_s=5)},
]
"""Settings that decide where and how fast a run is computed, and no number of it."""

NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"data": DataConfig(clients=21)}, "data.clients: is 21"),
    ({"data": DataConfig(augment="crop")}, "data.augment: is crop"),
    ({"data": DataConfig(image_size=9)}, "data.image_size: is 9"),
    ({"data": DataConfig(examples=99)}, "data.examples: is 99"),
    ({"topology": TopologyConfig(threads=2)}, "topology.threads: is 2"),
    ({"seed": 1}, "seed: is 1"),
    ({"algorithm": FedAvg(momentum=0.5)}, "algorithm.momentum: is 0.5"),
]


@pytest.mark.parametrize("changes", EXECUTION, ids=str)
def test_a_resume_may_change_where_and_how_fast_a_run_is_computed(
    world: World, changes: dict[str, Any]
) -> None:
    directory, _ = enter(world)
    assert enter(world, resume="auto", **changes)[0] == directory
    assert load_config(str(directory / "config.yaml")) == Config(name="digits", resume="auto", **changes)


@pytest.mark.parametrize(("changes", "words"), NUMBERS, ids=str)
def test_a_resume_may_not_change_what_decides_a_number(
    world: World, changes: dict[str, Any], words: str
) -> None:
    directory, _ = enter(world)
    before = (directory / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as error:
        enter(world, resume="auto", **changes)
    assert str(error.value).startswith(words)
    assert (directory / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("schedule", "rounds", "warned"), [("cosine", 12, True), ("cosine", 10, False), ("step", 12, False)]
)
def test_other_rounds_on_resume_are_warned_of_where_the_schedule_depends_on_them(
    world: World, caplog: pytest.LogCaptureFixture, schedule: Any, rounds: int, warned: bool
) -> None:
    local = LocalConfig(schedule=schedule)
    enter(world, local=local, rounds=10)
    enter(world, local=local, rounds=rounds, resume="auto")
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == warned
    assert all(line.startswith("rounds was 10 and is 12: local.schedule=cosine") for line in warnings)


def test_a_tilde_is_the_home_folder_in_every_setting_that_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(home))
        first = train(output="~/runs", algorithm=FedBuff(buffer_size=1)).folder
        assert first == home / "runs" / "small"
        replayed = train(name="again", replay="~/runs/small", algorithm=FedBuff(buffer_size=1))
        assert replayed.finished
        assert train(name="pretrained", model=ModelConfig(weights="~/runs/small/model.safetensors")).finished
        (home / "list").write_text("0 0\n1 1\n2 0\n3 1\n")
        data = DataConfig(clients=2, dataset=f"{__name__}.listed_in_root", root="~")
        assert Federation(
            SMALL, module=nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), data=data, name="b"
        ).run()
    assert not Path("~").exists()


def listed_in_root(root: str, train: bool) -> TensorDataset:
    """Return the examples in the file `list` of the dataset's folder."""
    shutil.copy(Path(root) / "list", "list")
    return listed(root, train)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("output", {"output": "~nosuchuser/x"}),
        ("data.root", {"data": {"dataset": "mnist", "root": "~nosuchuser/x"}}),
        ("data.root", {"data": {"dataset": "image_folder", "root": "~nosuchuser/x"}}),
        ("model.weights", {"model": {"weights": "~nosuchuser/x.safetensors"}}),
        ("replay", {"replay": "~nosuchuser/x", "algorithm": "FedBuff"}),
    ],
    ids=str,
)
def test_an_unknown_home_folder_is_refused_in_one_line(key: str, settings: dict[str, Any]) -> None:
    Path("run.yaml").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as error:
        Federation(load_config("run.yaml"), tracking=QUIET).run()
    assert "~nosuchuser" in str(error.value)
    assert key in str(error.value)
    assert "write the folder out" in str(error.value)
    assert not Path("~nosuchuser").exists()


def test_a_run_of_an_older_version_is_rejected_in_one_line(world: World) -> None:
    directory, _ = enter(world)
    (directory / "config.yaml").write_text("track:\n  with: [wandb]\n")
    with pytest.raises(ConfigError, match=r"resume: .* was written by fedddp before 0\.1\.0") as rejection:
        enter(world, resume="auto")
    assert "\n" not in str(rejection.value)


def test_a_module_that_returns_no_logits_is_rejected_before_training() -> None:
    with pytest.raises(ConfigError, match="must return logits of shape"):
        Federation(module=nn.Flatten(), tracking=TrackingConfig(trackers=[], progress=False)).run()


# ---- whole runs, and what happens to their files ----


PIXELS = TensorDataset(torch.arange(48, dtype=torch.uint8).view(12, 1, 2, 2), torch.arange(12) % 2)


SMALL = Config(
    data=DataConfig(clients=2),
    cohort=CohortConfig(size=1),
    checkpoint=CheckpointConfig(every=1),
    tracking=QUIET,
    rounds=2,
    name="small",
    resume="auto",
)


def train(**changes: Any) -> Result:
    """Train a model of twelve numbers on twelve images; or resume its run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    return Federation(SMALL, module=module, train=PIXELS, **changes).run()


def files(directory: Path) -> dict[Path, bytes]:
    """Return every file below `directory` with its content."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_is_not_resumed_with_fewer_rounds_than_it_has_done() -> None:
    directory = train().folder
    before = files(directory)
    with pytest.raises(ConfigError, match=r"^rounds=1 is less than the 2 rounds that runs/small has done"):
        train(rounds=1)
    assert files(directory) == before


@pytest.mark.parametrize(
    ("setting", "changed", "message"),
    [
        (
            "privacy",
            {"privacy": CentralDP(delta=1e-3, clip=1.0, noise_multiplier=1.0)},
            r".*was started with null",
        ),
        ("local.engine", {"local": LocalConfig(engine="eager")}, "is eager, but .*was started with auto"),
        ("data.partition", {"data": DataConfig(clients=2, partition=Dirichlet())}, "was started with .*IID"),
        ("algorithm.lr", {"algorithm": FedAvg(lr=0.5)}, "is 0.5, but .*was started with 1.0"),
    ],
)
def test_a_run_from_before_a_setting_existed_had_its_default(
    setting: str, changed: dict[str, Any], message: str
) -> None:
    file = train().folder / "config.yaml"
    *sections, key = setting.split(".")
    record: Any = yaml.safe_load(file.read_text())
    section = record
    for name in sections:
        section = section[name]
    del section[key]
    file.write_text(yaml.safe_dump(record))
    assert [row["round"] for row in train(rounds=3).history] == [1, 2, 3]
    file.write_text(yaml.safe_dump(record))
    with pytest.raises(ConfigError, match=f"^{setting}.*{message}"):
        train(rounds=4, **changed)


@contextlib.contextmanager
def in_the_second_call(cls: type, name: str, before: bool, act: Callable[[], object]) -> Iterator[None]:
    """Make the second call of a method in the block also call `act`, before or after."""
    method, calls = getattr(cls, name), itertools.count(1)

    def call_and_act(self: object, *args: Any, **options: Any) -> None:
        second = next(calls) == 2
        if second and before:
            act()
        method(self, *args, **options)
        if second and not before:
            act()

    with mock.patch.object(cls, name, call_and_act):
        yield


def test_a_finished_run_that_is_given_more_rounds_keeps_its_model_under_another_name() -> None:
    def fail() -> None:
        raise RuntimeError("stopped here")

    directory = train().folder
    two_rounds = (directory / "model.safetensors").read_bytes()
    with (
        in_the_second_call(Session, "_write", True, fail),
        pytest.raises(RuntimeError, match="stopped here"),
    ):
        train(rounds=4)
    assert not (directory / "model.safetensors").exists(), "a run that is not at its end has none"
    assert (directory / "model-00002.safetensors").read_bytes() == two_rounds
    train(rounds=4)
    assert sorted(path.name for path in directory.glob("*.safetensors")) == [
        "model-00002.safetensors",
        "model.safetensors",
    ]
    assert (directory / "model-00002.safetensors").read_bytes() == two_rounds
    assert (directory / "model.safetensors").read_bytes() != two_rounds


@pytest.mark.parametrize("change", ["labels", "order", "number"])
def test_other_data_are_refused_on_resume(change: str) -> None:
    data = DataConfig(clients=2, dataset=f"{__name__}.listed")
    lines = [f"{number} {number % 2}" for number in range(12)]
    changed = {
        "labels": ["0 1", *lines[1:]],
        "order": lines[::-1],
        "number": lines[:-1],
    }
    Path("list").write_text("\n".join(lines))
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    directory = Federation(SMALL, module=module, data=data).run().folder
    before = files(directory)
    Path("list").write_text("\n".join(changed[change]))
    with pytest.raises(ConfigError, match=r"^data: the labels or images are not those that runs/small was"):
        Federation(SMALL, module=module, data=data, rounds=3).run()
    assert files(directory) == before
    Path("list").write_text("\n".join(lines))
    assert Federation(SMALL, module=module, data=data, rounds=3).run().finished


def listed(root: str, train: bool) -> TensorDataset:
    """Return the examples in the file `list`: a pixel and a label in every line."""
    lines = Path("list").read_text().splitlines()
    numbers = torch.tensor([[int(word) for word in line.split()] for line in lines])
    return TensorDataset(numbers[:, 0].byte().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), numbers[:, 1])


def test_a_run_resumes_when_the_weights_that_it_started_from_are_gone(tmp_path: Path) -> None:
    first = train(name="first").folder / "model.safetensors"
    model = ModelConfig(weights=str(shutil.copy(first, tmp_path / "first.safetensors")))
    train(model=model)
    (tmp_path / "first.safetensors").unlink()
    assert [row["round"] for row in train(model=model, rounds=3).history] == [1, 2, 3]
    with pytest.raises(ConfigError, match="first.safetensors is not a file"):
        train(model=model, name="from-scratch")


MOMENTS: dict[str, tuple[type, str, bool]] = {
    "before its row": (Session, "_write", True),
    "after its row": (Session, "_write", False),
    "after its checkpoint": (Checkpoints, "save", False),
}
"""A method that ends a round, and whether its directory is lost before it or after it."""


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("fate", ["deleted", "moved"])
@pytest.mark.parametrize("algorithm", [FedAvg(), FedBuff(buffer_size=1)], ids=["FedAvg", "FedBuff"])
def test_a_run_whose_directory_is_gone_fails_and_recreates_nothing(
    moment: str, fate: str, algorithm: Algorithm
) -> None:
    def lose() -> None:
        if fate == "moved":
            Path("runs/small").rename("elsewhere")
        else:
            while Path(
                "runs/small"
            ).exists():  # the thread that writes the checkpoint renames what is deleted
                shutil.rmtree("runs/small", ignore_errors=True)

    with in_the_second_call(*MOMENTS[moment], lose), pytest.raises(OSError, match="runs/small") as error:
        train(algorithm=algorithm)
    assert "deleted or moved while the run lasted" in str(error.value)
    assert list(Path("runs").iterdir()) == []
    if fate == "moved":
        Path("elsewhere").rename("runs/small")
        assert [row["round"] for row in train(algorithm=algorithm).history] == [1, 2]


@pytest.mark.parametrize("name", ["history.jsonl", "clients.jsonl", "config.yaml"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(name: str) -> None:
    file = train().folder / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises((OSError, ConfigError), match="it is no file") as error:
        train(rounds=3)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_pipes_in_the_place_of_what_a_resume_can_do_without_are_passed_over() -> None:
    directory = train().folder
    newest = max((directory / "checkpoints").iterdir())
    for file in (directory / ".wandb-run", directory / ".config.yaml.part", newest / "state.json"):
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    assert [row["round"] for row in train(rounds=3).history] == [1, 2, 3]


def test_a_pipe_in_the_place_of_a_checkpoints_model_is_a_corrupt_checkpoint() -> None:
    file = max((train().folder / "checkpoints").iterdir()) / "model.safetensors"
    file.unlink()
    os.mkfifo(file)
    assert train(rounds=3).finished


@pytest.mark.parametrize("line", ['{"round": "x"}', "null", "[1]", '{"round": 1.5}'])
def test_a_history_whose_rounds_are_no_numbers_is_refused_at_resume(line: str) -> None:
    history = train().folder / "history.jsonl"
    history.write_text(line + "\n" + history.read_text())
    with pytest.raises(ConfigError, match=r"history.jsonl line 1 is corrupt"):
        train(rounds=3)


def test_a_pipe_in_the_place_of_a_configuration_is_refused_and_not_waited_for() -> None:
    os.mkfifo("run.yaml")
    with pytest.raises(ConfigError, match=r"^cannot read run\.yaml: it is no file"):
        load_config("run.yaml")


def test_a_run_whose_images_moved_resumes_with_the_same_bits(tmp_path: Path) -> None:
    """And with other settings of where and how they are read."""
    for number in range(24):
        path = tmp_path / "images" / ("test", "train")[number > 3] / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * number, np.uint8)).save(path)
    data = DataConfig(dataset="image_folder", root="images", clients=2, memory="device", augment="crop")
    config = dataclasses.replace(SMALL, data=data, model=ModelConfig(name="2nn"))
    expected = Federation(config, name="uninterrupted", rounds=3).run().folder / "model.safetensors"
    resumed = Federation(config).run().folder / "model.safetensors"
    Path("images").rename("elsewhere")
    moved = dataclasses.replace(data, root="elsewhere", memory="stream", workers=0)
    assert Federation(config, data=moved, rounds=3).run().finished
    assert resumed.exists()
    assert all(torch.equal(tensor, load_file(resumed)[name]) for name, tensor in load_file(expected).items())


# ---- before anything that takes time ----


def test_what_needs_no_data_is_refused_before_they_are_read(tmp_path: Path) -> None:
    output = tmp_path / "runs"
    (output / "mine").mkdir(parents=True)
    (output / "mine" / "history.jsonl").touch()
    nowhere: dict[str, Any] = {"dataset": "image_folder", "root": str(tmp_path / "none")}
    config = Config(output=str(output), name="mine", data=DataConfig(**nowhere))
    with pytest.raises(ConfigError, match="mine holds a run already"):
        Federation(config).run()
    (output / "mine" / "config.yaml").write_text(dump_yaml({**to_dict(config), "seed": 7}))
    with pytest.raises(ConfigError, match="seed: is 0, but .* was started with 7"):
        Federation(config, resume="auto").run()


def test_the_commands_refuse_before_torch_is_imported(tmp_path: Path) -> None:
    """In a process of its own: this one has imported torch."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "history.jsonl").touch()
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    lines = {
        "run digits --name mine": "runs/mine holds a run already",
        "run digits --name=other --name=mine --rounds 3": "runs/mine holds a run already",
        "run mine.yaml": "runs/mine holds a run already",
        "run digit": "unknown recipe",
        "plan none.yaml": "cannot read none.yaml",
        "report none": "none holds no runs",
        "eval none": "none has no model.safetensors",
        "predict none a.png": "none has no model.safetensors",
        "card none": "none has no model.safetensors",
    }
    program = (
        "import sys\nfrom fedddp.cli import main\n"
        f"for line in {[*lines]}:\n"
        "    try:\n        main(line.split())\n"
        "    except SystemExit as stop:\n        assert stop.code == 2, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for printed, message in zip(done.stderr.splitlines(), lines.values(), strict=True):
        assert message in printed
