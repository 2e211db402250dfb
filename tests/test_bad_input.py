"""Bad input gets one line with the key, its value, the rule and the fix; nothing on disk is lost."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fedddp.cli import main

FEW = "--data.clients 2 --cohort.size 1"
TRIAL = "--data.examples 200 --tracking.trackers [] --tracking.progress false --rounds 2"


def users_labels_out_of_range(root: str, train: bool) -> Dataset[object]:
    return TensorDataset(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) - 3)


def users_model_of_other_outputs() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def prepare(folder: Path) -> None:
    """Put the broken things that the commands below name into `folder`."""
    (folder / "broken.yaml").write_text("data: [unclosed\n")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "section.yaml").write_text("local: 3\n")
    (folder / "text.yaml").write_text("model: {freeze: layer1}\n")
    (folder / "prox.yaml").write_text("algorithm: {name: FedProx, mu: 0.5}\n")
    (folder / "nameless.yaml").write_text("algorithm: {mu: 0.5}\n")
    (folder / "typo.yaml").write_text("local: {learning_rate: 0.1}\n")
    (folder / "before.yaml").write_text("track: {with: []}\n")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    (folder / "file").write_text("not a folder")
    (folder / "empty").mkdir()
    (folder / "two-datas.yaml").write_text("compare: {a: {}, b: {data: {clients: 5}}}\n")
    (folder / "no-runs.yaml").write_text("compare: {}\n")
    (folder / "null-runs.yaml").write_text("compare:\n")
    (folder / "list-of-runs.yaml").write_text("compare: [FedAvg, FedProx]\n")
    (folder / "outside.yaml").write_text("compare: {..: {}}\n")
    (folder / "deeper.yaml").write_text("compare: {a: {}, a/b: {}}\n")
    (folder / "aliases.yaml").write_text(
        "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9) if n else 'x'}]" for n in range(12))
    )
    (folder / "deep.yaml").write_text("data: " + "[" * 400 + "]" * 400)
    (folder / "twice.yaml").write_text("local: {lr: 1}\nrounds: 3\nlocal: {epochs: 2}\n")
    os.mkfifo(folder / "pipe.yaml")
    (folder / "one-word.yaml").write_text("compare: {a: FedAvg}\n")
    (folder / "never-trained").mkdir()
    (folder / "never-trained" / "config.yaml").write_text("seed: 0\n")
    (folder / "torn").mkdir()
    (folder / "torn" / "config.yaml").write_text("seed: [\n")
    (folder / "weights.safetensors").write_bytes(b"garbage")
    for label in ("cat", "dog"):
        for part in ("train", "val"):
            (folder / "images" / part / label).mkdir(parents=True)
            for number in range(3):
                pixels = np.zeros((8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / label / f"{number}.png")
    (folder / "images" / "train" / "cat" / "1.png").write_bytes(b"not a picture")


# command, exit code, and words of the line: the key or file, the value, the rule or fix
TABLE: list[tuple[str, int, tuple[str, ...]]] = [
    ("", 2, ()),
    ("compare", 2, ("give recipes", "compare-paradigms")),
    ("compare digitz", 2, ("unknown recipe 'digitz'", "Did you mean 'digits'")),
    ("compare empty", 2, ("empty holds no runs", "folder of them")),
    ("compare never-trained", 1, ("never-trained is no run directory", "history.jsonl")),
    ("compare torn", 1, ("torn/config.yaml is corrupt",)),
    ("compare torn --rounds 3", 2, ("--rounds is for runs that are trained", "leave it out")),
    ("compare two-datas.yaml", 2, ("compare.b.data is set for one run", "set data at the top")),
    ("compare one-word.yaml", 2, ("compare must hold a name and sections", "FedProx")),
    ("compare no-runs.yaml", 2, ("compare must hold a name and sections", "FedProx")),
    ("compare null-runs.yaml", 2, ("compare must hold a name and sections", "FedProx")),
    ("compare list-of-runs.yaml", 2, ("compare must hold a name and sections", "FedProx")),
    ("run no-runs.yaml", 2, ("describes several runs", "fedddp compare no-runs.yaml")),
    ("compare outside.yaml", 2, ("name must be letters, digits", "'..'", "output")),
    ("compare deeper.yaml", 2, ("name must be letters, digits", "'a/b'", "output")),
    ("compare digits --name ..", 2, ("name must be letters, digits", "'..'")),
    ("compare digits --output ~nosuchuser/x", 2, ("output=~nosuchuser/x", "write the folder out")),
    ("compare aliases.yaml", 2, ("aliases.yaml is not valid YAML", "100,000 values")),
    ("compare pipe.yaml", 2, ("cannot read pipe.yaml", "it is no file")),
    ("compare digits digits", 2, ("there is a run digits already", "another name")),
    ("compare digits --accuracy 95", 2, ("--accuracy must be in (0, 1]", "95")),
    (
        "compare digits digits-scaffold --local.momentum 0.9",
        2,
        ("digits-scaffold: algorithm=SCAFFOLD", "local.momentum=0.9"),
    ),
    ("run compare-paradigms", 2, ("describes several runs", "fedddp compare compare-paradigms")),
    ("walk digits", 2, ("unknown command 'walk'", "run")),
    ("run", 2, ("recipe or a .yaml file", "fedddp recipes")),
    ("run digitz", 2, ("unknown recipe 'digitz'", "digits")),
    ("run none.yaml", 2, ("none.yaml", "No such file")),
    ("run broken.yaml", 2, ("broken.yaml", "not valid YAML")),
    ("run binary.yaml", 2, ("binary.yaml", "not valid YAML")),
    ("run list.yaml", 2, ("list.yaml", "sections such as")),
    ("run typo.yaml", 2, ("'local.learning_rate'", "local has epochs, steps, batch_size")),
    ("run section.yaml", 2, ("local has settings of its own, got 3", "local.epochs, local.steps")),
    ("run text.yaml", 2, ("model.freeze must be a list, as in [a, b], got layer1",)),
    ("run nameless.yaml", 2, ("'algorithm.mu'", "FedProx", "not of FedAvg")),
    ("run prox.yaml --algorithm FedAvg --algorithm.mu 1", 2, ("'algorithm.mu'", "FedProx", "not of FedAvg")),
    ("run digits --lr 3", 2, ("'lr'", "Did you mean 'local.lr'?")),
    ("run digits --model resnet18", 2, ("model has settings of its own, got resnet18", "model.name")),
    ("run digits --data.partition.alpha x", 2, ("data.partition.alpha must be a number, got x",)),
    ("run digits --local.steps few", 2, ("local.steps must be a whole number or null, got few",)),
    ("run digits --data.download maybe", 2, ("data.download must be true or false, got maybe",)),
    (
        "run digits --tracking.trackers wandb",
        2,
        ("tracking.trackers must be a list, as in [a, b], got wandb",),
    ),
    ("run digits --track.with []", 2, ("track.with is now tracking.trackers",)),
    ("run before.yaml", 2, ("track is now tracking",)),
    ("run digits --rounds", 2, ("--rounds has no value",)),
    ("run digits rounds=3", 2, ("'rounds=3'", "--section.key value")),
    ("run digits --algorithm fedprox", 2, ("unknown name 'fedprox'", "Did you mean 'FedProx'?")),
    (
        "run digits --algorithm pathlib.Path",
        2,
        ("'pathlib.Path' is not a subclass of fedddp.algorithms.algorithm.Algorithm",),
    ),
    ("run digits --round 3", 2, ("'round'", "Did you mean 'rounds'")),
    ("run digits --local.epoch 3", 2, ("local.epoch", "Did you mean 'local.epochs'")),
    ("run digits --rounds three", 2, ("rounds must be a whole number, got three",)),
    ("run digits --rounds 0", 2, ("rounds must be >= 1, got 0",)),
    ("run digits --seed -1", 2, ("seed must be >= 0, got -1",)),
    ("run digits --local.lr 0", 2, ("local.lr must be > 0", "got 0")),
    ("run digits --local.lr nan", 2, ("local.lr", "nan")),
    ("run digits --local.batch_size 0", 2, ("local.batch_size must be >= 1, got 0",)),
    ("run digits --local.optimizer lion", 2, ("local.optimizer must be sgd, adam or adamw, got lion",)),
    ("run digits --cohort.size 21", 2, ("cohort.size=21", "data.clients=20", "lower cohort.size")),
    ("run digits --evaluation.clients 3", 2, ("evaluation.clients=3", "data.holdout", "set data.holdout")),
    ("run digits --algorithm FedProxx", 2, ("algorithm", "'FedProxx'", "Did you mean 'FedProx'?")),
    ("run digits --algorithm no_lab.fl.Mine", 2, ("algorithm: cannot import 'no_lab.fl.Mine'", "No module")),
    ("run digits --algorithm FedProx --algorithm.mu -1", 2, ("algorithm.mu must be >= 0", "got -1")),
    ("run digits --data.partition.alpha 0", 2, ("data.partition.alpha", "got 0")),
    ("run digits --data.clients 2000 --cohort.size 10", 2, ("data.clients=2000", "training examples")),
    ("run digits --data.dataset digitz", 2, ("data.dataset", "digitz")),
    ("run digits --data.dataset mnist --data.root nowhere", 2, ("nowhere", "data.download")),
    ("run digits --data.dataset image_folder --data.root nowhere", 2, ("nowhere",)),
    (
        "run digits --data.dataset image_folder --data.root images --data.clients 2 --cohort.size 1",
        2,
        ("1.png",),
    ),
    (f"run digits --data.dataset {__name__}.users_labels_out_of_range", 2, ("label", "-3")),
    ("run digits --model.name resnet9999", 2, ("model.name", "resnet9999")),
    ("run digits --model.name alexnet", 2, ("alexnet", "data.image_size")),
    (f"run digits --model.name {__name__}.users_model_of_other_outputs", 2, ("10 classes", "(2, 3)")),
    ("run digits --model.weights weights.pt", 2, ("weights.pt", "safetensors")),
    ("run digits --model.weights weights.safetensors", 2, ("weights.safetensors", "cannot be read")),
    ("run digits --model.freeze [conv9]", 2, ("model.freeze", "conv9", "conv1")),
    ("run digits --topology.ranks_per_client 2", 2, ("topology.ranks_per_client=2", "1", "--nproc-per-node")),
    ("run digits --topology.coordinator dedicated", 2, ("topology.coordinator=dedicated", "2 ranks")),
    ("run digits --topology.device cuda", 2, ("topology.device=cuda", "no GPU")),
    ("run digits --tracking.trackers [wandbb]", 2, ("tracking.trackers", "wandbb")),
    ("run digits --output file", 2, ("file", "--output")),
    ("run aliases.yaml", 2, ("aliases.yaml is not valid YAML", "100,000 values", "50 levels")),
    ("run deep.yaml", 2, ("deep.yaml is not valid YAML",)),
    ("run twice.yaml", 2, ("twice.yaml", "local stands twice (lines 1 and 3)", "join them")),
    ("run pipe.yaml", 2, ("cannot read pipe.yaml", "it is no file")),
    ("run digits --name ..", 2, ("name must be letters, digits", "'..'", "output")),
    ("run digits --name=../x", 2, ("name must be letters, digits", "'../x'", "output")),
    ("run digits --output ~nosuchuser/x", 2, ("output=~nosuchuser/x", "write the folder out")),
    (
        "run digits --data.dataset mnist --data.root ~nosuchuser/x",
        2,
        ("data.root=~nosuchuser/x", "write the folder out"),
    ),
    ("run digits --topology.timeout_s 1e300", 2, ("topology.timeout_s must be", "got")),
    ("run digits --data.image_size 99999999", 2, ("data.image_size must be in [1, 16384]", "99999999")),
    ("run digits --local.batch_size 1" + "0" * 30, 2, ("local.batch_size must be <= 2147483647",)),
    ("run digits --local.steps 9999999999", 2, ("local.steps must be <= 2147483647", "9999999999")),
    ("run digits --algorithm ..a", 2, ("algorithm: cannot import '..a'",)),
    ("run digits --model.name ..x", 2, ("model.name", "'..x'")),
    ("run digits --model.name torch.nn.Linear", 2, ("model.name", "torch.nn.Linear")),
    ("run digits --name a/b", 2, ("name", "a/b", "output")),
    ("run digits --checkpoint.every 0", 2, ("checkpoint.every must be >= 1, got 0",)),
    (f"run digits {TRIAL} --local.lr 1e30", 1, ("client", "local.lr")),
    ("runs nowhere", 2, ("nowhere", "--output")),
    ("partition digits --data.clients 0", 2, ("data.clients must be >= 1, got 0",)),
    ("plan digits --topology.ranks_per_client 3", 2, ("topology.ranks_per_client=3",)),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "code", "words"), TABLE, ids=[row[0] or "(nothing)" for row in TABLE])
def test_one_line_names_the_key_the_value_the_rule_and_the_fix(
    command: str, code: int, words: tuple[str, ...], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    err = capfd.readouterr().err
    assert stop.value.code == code, err
    if words:
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in err
        for word in words:
            assert word in lines[0], (word, lines[0])
    assert (folder / "file").read_text() == "not a folder"


def test_a_taken_name_and_changed_settings_do_not_change_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(f"run digits {TRIAL} --name one {arguments}"))
        return stop.value.code, capfd.readouterr().err

    assert not run("")[0]
    history = (tmp_path / "runs" / "one" / "history.jsonl").read_bytes()
    for arguments, words in (
        ("", ("runs/one", "--name", "--resume auto")),
        ("--resume auto --local.lr 0.3", ("local.lr", "0.3", "--name")),
        ("--resume auto --algorithm FedProx", ("algorithm", "FedProx")),
    ):
        code, err = run(arguments)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert all(word in err for word in words), err
        assert (tmp_path / "runs" / "one" / "history.jsonl").read_bytes() == history


def test_a_full_disk_is_reported_and_the_checkpoint_before_it_stays(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if os.system("mkdir small && mount -t tmpfs -o size=9m tmpfs small 2>/dev/null") != 0:
        pytest.skip("cannot mount a small file system here")
    try:
        with pytest.raises(SystemExit) as stop:
            main(
                shlex.split(
                    f"run digits {TRIAL} --rounds 9 --checkpoint.every 1 --checkpoint.keep 9 --output small"
                )
            )
        err = capfd.readouterr().err
        assert stop.value.code == 1
        assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
        assert "No space left" in err
        assert "Traceback" not in err
        assert list((tmp_path / "small").glob("*/checkpoints/round-*/state.json"))
    finally:
        os.system("umount small")
