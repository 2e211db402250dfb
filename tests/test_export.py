"""Exported files give the same logits in processes without fedddp, by onnxruntime and torch.export."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import fedddp
from fedddp import ConfigError, Federation, TrackingConfig, load_config, load_model
from fedddp.cli import main
from fedddp.inference import TrainedModel
from fedddp.inference.export import Exported
from fedddp.models.norms import BatchNorm
from fedddp.models.registry import ModelConfig
from fedddp.tasks import Classification

Images = NDArray[np.uint8]

PACKAGE = Path(fedddp.__file__).parent

READ_PT2 = """
import sys
sys.modules["fedddp"] = None  # an import of it fails
import json, numpy, torch
def read(file):
    extra = {"metadata.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    return lambda images: program(torch.from_numpy(images)).numpy(), json.loads(extra["metadata.json"])
"""

READ_ONNX = """
import sys
sys.modules["fedddp"] = sys.modules["torch"] = None
import json, numpy, onnxruntime
def read(file):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (input,), (output,) = session.get_inputs(), session.get_outputs()
    dimension = json.dumps([input.shape[0], output.shape[0], input.type])
    metadata = {**session.get_modelmeta().custom_metadata_map, "dimension": dimension}
    return lambda images: session.run(["logits"], {"images": images})[0], metadata
"""

FINISH = """
for file in sys.argv[1:]:
    run, metadata = read(file)
    batches = dict(numpy.load(f"{file}.in.npz"))
    numpy.savez(f"{file}.out.npz", **{size: run(images) for size, images in batches.items()})
    with open(f"{file}.metadata", "w") as written:
        json.dump(metadata, written)
"""


class Read(NamedTuple):
    """What a process without fedddp reads of a file."""

    logits: dict[str, NDArray[Any]]
    """By the name of the batch."""
    metadata: dict[str, str]


def read_elsewhere(files: dict[Path, dict[str, Any]]) -> list[Read]:
    """Return what one process without fedddp reads of files of one format, each with its batches."""
    for file, batches in files.items():
        np.savez(f"{file}.in.npz", **batches)
    pt2 = next(iter(files)).suffix == ".pt2"
    words = [sys.executable, "-c", (READ_PT2 if pt2 else READ_ONNX) + FINISH, *map(str, files)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [
        Read(dict(np.load(f"{file}.out.npz")), json.loads(Path(f"{file}.metadata").read_text()))
        for file in files
    ]


def random_images(shape: tuple[int, int, int]) -> dict[str, Images]:
    """Return batches of several sizes, one image among them."""
    rng = np.random.default_rng(3)
    sizes = {f"b{size}": rng.integers(0, 256, (size, *shape)).astype(np.uint8) for size in (1, 4, 13)}
    return {**sizes, "white": np.full((2, *shape), 255, dtype=np.uint8)}


@torch.no_grad()
def expected_logits(model: TrainedModel, images: Images) -> NDArray[Any]:
    """Return the logits of every image alone, normalised by the definition of mean and deviation."""
    module = model.module.double().eval()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (model.mean, model.std))
    logits = [module(((torch.from_numpy(i).double() / 255 - mean) / std)[None])[0] for i in images]
    module.float()
    return torch.stack(logits).numpy()


def trained(name: str, norm: Any, shape: tuple[int, int, int]) -> TrainedModel:
    """Return a network with statistics and scales that are not those of the start."""
    module = ModelConfig(name=name, norm=norm).build(classes=5, shape=shape, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    channels = shape[0]
    mean, std = (0.2, 0.5, 0.7)[:channels], (0.1, 0.2, 0.3)[:channels]
    return TrainedModel(module.eval(), ("a", "b", "ç", "d d", "e"), shape, mean, std, Classification())


NETWORKS: dict[str, Callable[[], TrainedModel]] = {
    "lenet": lambda: trained("lenet", "keep", (1, 8, 8)),
    "batch norm": lambda: trained("resnet8-gn", "batch", (3, 16, 12)),
    "synced batch norm": lambda: trained("resnet8-gn", "sync", (3, 8, 8)),
    "group norm": lambda: trained("resnet8-gn", "keep", (3, 16, 16)),
    "torchvision": lambda: trained("squeezenet1_1", "keep", (3, 32, 32)),
}


SLOW = {("synced batch norm", "onnx")}
"""Pairs that are left out: the graph is that of batch norm."""

PAIRS = [(name, format) for name in NETWORKS for format in ("pt2", "onnx") if (name, format) not in SLOW]


class Compared(NamedTuple):
    """An exported file, and what was read of it."""

    model: TrainedModel
    done: Exported
    images: dict[str, Images]
    read: Read


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compared]:
    """Every network in every format, and one with its preprocessing beside."""
    folder, found = tmp_path_factory.mktemp("exported files"), {}
    for format in ("pt2", "onnx"):
        names = [name for name, other in PAIRS if other == format]
        models = {name: NETWORKS[name]() for name in names}
        exported = {name: model.export(folder / f"{name}.{format}") for name, model in models.items()}
        models["beside"] = NETWORKS["lenet"]()
        exported["beside"] = models["beside"].export(
            folder / "new" / f"model.{format}", preprocessing="beside"
        )
        images = {name: random_images(model.shape) for name, model in models.items()}
        taken: dict[str, Any] = {**images, "beside": {n: normalised(b) for n, b in images["beside"].items()}}
        reads = read_elsewhere({exported[name].path: taken[name] for name in models})
        for name, read in zip(models, reads, strict=True):
            found[name, format] = Compared(models[name], exported[name], images[name], read)
    return found


def normalised(images: Images) -> NDArray[np.float32]:
    """Return grey images as the network of the digits takes them, by the numbers beside the file."""
    return ((images / 255 - 0.2) / 0.1).astype(np.float32)


@pytest.mark.parametrize(("network", "format"), [*PAIRS, ("beside", "pt2"), ("beside", "onnx")])
def test_a_file_gives_the_same_logits_for_any_batch_without_fedddp(
    network: str, format: str, compared: dict[tuple[str, str], Compared]
) -> None:
    model, done, images, read = compared[network, format]
    for name, batch in images.items():
        expected = expected_logits(model, batch)
        assert expected.std() > 1e-3
        np.testing.assert_allclose(read.logits[name], expected, atol=1e-4, rtol=0, err_msg=name)
    assert done.difference <= 1e-4
    assert json.loads(read.metadata["classes"]) == list(model.classes)
    assert json.loads(read.metadata["mean"]) == pytest.approx(model.mean)
    assert json.loads(read.metadata["std"]) == pytest.approx(model.std)
    kind = "float32" if network == "beside" else "uint8"
    assert read.metadata["input"].startswith(f"images: {kind} (n, {model.shape[0]}, ")
    if format == "onnx":
        number = "tensor(float)" if network == "beside" else "tensor(uint8)"
        assert json.loads(read.metadata["dimension"]) == ["batch", "batch", number]
    assert str(PACKAGE).encode() not in done.path.read_bytes(), "a path of this machine"
    assert not [path for path in done.path.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_preprocessing_beside_is_in_a_file_of_its_own(
    format: str, compared: dict[tuple[str, str], Compared]
) -> None:
    model, done, *_ = compared["beside", format]
    assert done.beside == done.path.with_name(f"model.{format}.json")
    beside = json.loads(done.beside.read_text())
    assert (beside["classes"], beside["mean"], beside["std"]) == (list(model.classes), [0.2], [0.1])
    assert beside["preprocessing"]["size"] == [8, 8]
    assert compared["lenet", format].done.beside is None


def test_a_safetensors_file_has_the_weights_and_the_preprocessing_in_its_header() -> None:
    model = NETWORKS["batch norm"]()
    done = model.export("weights.safetensors")
    assert (done.format, done.difference, done.beside) == ("safetensors", 0, None)
    state, written = model.module.state_dict(), load_file("weights.safetensors")
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], written[name]) for name in state)
    with safe_open("weights.safetensors", framework="pt") as opened:
        header = opened.metadata()
    assert json.loads(header["preprocessing"])["size"] == [16, 12]
    assert json.loads(header["mean"]) == [0.2, 0.5, 0.7]
    assert json.loads(header["classes"])[2] == "ç"


# ---- what cannot be exported ----


def own(module: nn.Module) -> TrainedModel:
    return TrainedModel(module.eval(), ("a", "b"), (1, 2, 2), (0.5,), (0.5,), Classification())


class Disagreeing(nn.Module):
    """Gives other logits in a file than in Python."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(4, 2), error

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits + self.error if torch.compiler.is_exporting() else logits


class Branching(nn.Module):
    """Looks at the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits if logits.sum() > 0 else -logits


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_file_whose_logits_differ_is_not_left_there(format: str) -> None:
    for before in (None, b"an earlier file"):
        file = Path(f"model.{format}")
        if before:
            file.write_bytes(before)
        with pytest.raises(ConfigError, match=r"differs from the module's by 0\.000[23].* more than 0\.0001"):
            own(Disagreeing(3e-4)).export(file)
        assert (file.read_bytes() if file.exists() else None) == before
        assert len(list(Path().iterdir())) == (1 if before else 0)


def test_a_small_difference_is_reported() -> None:
    assert own(Disagreeing(3e-5)).export("close.pt2").difference == pytest.approx(3e-5, rel=0.1)


def test_a_model_of_no_numbers_is_not_exported() -> None:
    module = Disagreeing(0)
    with torch.no_grad():
        module.layer.weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match=r"differs from the module's by nan"):
        own(module).export("model.pt2")


def test_a_module_that_looks_at_values_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="torch.export cannot export Branching for any batch size") as error:
        own(Branching()).export("model.pt2")
    assert "\n" not in str(error.value)
    assert "use format=safetensors" in str(error.value)
    assert own(Branching()).export("model.safetensors").difference == 0


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ConfigError) as error:
                NETWORKS["lenet"]().export("model.onnx")
            assert str(error.value) == f'format=onnx needs {name}; pip install "fedddp[export]"'
    assert not Path("model.onnx").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "model.bin"}, "format must be one of pt2, onnx, safetensors, got 'bin'"),
        ({"path": "m", "format": "tflite"}, "got 'tflite'"),
        (
            {"path": "m.pt2", "preprocessing": "outside"},
            "one of inside, beside, got 'outside'",
        ),
    ],
)
def test_unknown_formats_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NETWORKS["lenet"]().export(**options)


def test_an_export_leaves_the_model_as_it_is() -> None:
    model = NETWORKS["batch norm"]()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    for format in ("pt2", "safetensors"):
        model.export(f"model.{format}")
    after = model.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(isinstance(layer, BatchNorm) for layer in model.module.modules())


# ---- from a run ----


def test_the_command_exports_the_final_model_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--rounds", "2", "--data.examples", "300", "--name", "run", "--checkpoint.best", "eval/loss"]
    tracking = TrackingConfig(trackers=[], progress=False)
    result = Federation(load_config("digits", flags), tracking=tracking).run()
    capsys.readouterr()
    export(str(result.folder), "--format", "onnx")
    file = result.folder / "exported.onnx"
    assert capsys.readouterr().out.startswith(f"{file}: takes uint8 images; logits within ")
    images = random_images((1, 8, 8))
    (read,) = read_elsewhere({file: images})
    model = load_model(result.folder)
    for name, batch in images.items():
        np.testing.assert_allclose(read.logits[name], expected_logits(model, batch), atol=1e-4, rtol=0)
    assert json.loads(read.metadata["classes"]) == [str(digit) for digit in range(10)]
    assert read.metadata["task"] == "Classification"
    export(str(result.folder), "--output", "a b/best.safetensors", "--best")
    assert capsys.readouterr().out == "a b/best.safetensors: weights alone; the same bits as the module's\n"
    best, written = load_file(result.folder / "best.safetensors"), load_file("a b/best.safetensors")
    assert all(torch.equal(best[name], written[name]) for name in best)
    with safe_open("a b/best.safetensors", framework="pt") as opened:
        assert opened.metadata()["metric"] == "eval/loss"


def export(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", *words])
    assert not stop.value.code
