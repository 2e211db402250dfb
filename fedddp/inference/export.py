"""A trained model to a file that needs no fedddp: torch.export, ONNX, or weights alone."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from fedddp.data.loader import Normalizer
from fedddp.data.resizing import RESIZE
from fedddp.inference.model import TrainedModel
from fedddp.rng import stream
from fedddp.section import ConfigError
from fedddp.storage.checkpoint import save_model, share, write_text
from fedddp.storage.run_record import CLIENT

Format = Literal["pt2", "onnx", "safetensors"]
Preprocessing = Literal["inside", "beside"]

TOLERANCE = 1e-4
"""Largest difference of an output between a file and the module, for outputs up to 1; of larger ones the same
share of the largest."""

BATCHES = (1, 2, 3, 8, 17)
"""Batch sizes that are compared."""

INPUT, OUTPUT, METADATA = "images", "logits", "metadata.json"
"""Names in a file. A module that returns a dictionary has its keys as names of outputs."""

SHAPES = {"class": "(n, classes)", "multilabel": "(n, labels)", "mask": "(n, classes, height, width)"}
"""Of the logits, by what the task predicts."""

Outputs = dict[str, Tensor]

KEPT = ("task", "fedddp", "config_digest", "round", "metric", "value", CLIENT)
"""Texts of the model's own header that an exported file keeps."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and compared."""

    path: Path
    format: Format
    preprocessing: Preprocessing
    difference: float
    """The largest difference of an output, over `BATCHES`; 0 for weights that are the same bits."""
    beside: Path | None
    """The JSON file with the preprocessing, where it is beside; that of weights is in their header."""
    outputs: str = OUTPUT
    """The names of the file's outputs."""

    @property
    def compared(self) -> str:
        """The comparison, in words."""
        if self.format == "safetensors":
            return "the same bits as the module's"
        batches, names = ", ".join(map(str, BATCHES)), self.outputs
        within = f"{names} within {self.difference:.2g} of" if self.difference else f"the same {names} as"
        return f"{within} the module's, for batches of {batches}"


class WithPreprocessing(nn.Module):
    """A module that takes uint8 images and normalises them."""

    factor: Tensor
    offset: Tensor

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.module = module
        means, deviations = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
        self.register_buffer("factor", (1 / (255 * deviations)).float())
        self.register_buffer("offset", (-means / deviations).float())

    def forward(self, images: Tensor) -> Any:
        """Return the module's outputs for uint8 `images` (n, C, H, W)."""
        return self.module(images.to(torch.float32) * self.factor + self.offset)


def export(
    model: TrainedModel, path: Path, format: str | None = None, preprocessing: str = "inside"
) -> Exported:
    """Write `model` to `path` and compare the file with the module; see `TrainedModel.export`.

    Raises:
        ConfigError: the format is unknown, a library is missing, the module cannot be exported, or the file's
            logits differ by more than `TOLERANCE`; then there is no file.
        OSError: the file cannot be written.
    """
    chosen = _chosen(format or path.suffix.removeprefix("."), get_args(Format), "format")
    where = _chosen(preprocessing, get_args(Preprocessing), "preprocessing")
    if chosen == "safetensors":
        where = "beside"
    module = copy.deepcopy(model.module).cpu().eval().requires_grad_(False)
    if where == "inside":
        module = WithPreprocessing(module, model.mean, model.std).eval()
    samples = _samples(model, where)
    names = [*_outputs(module, samples[1])]
    metadata = _metadata(model, chosen, where, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        aside = Path(folder) / f"model.{chosen}"
        difference = _WRITERS[chosen](module, samples, aside, metadata)
        allowed = TOLERANCE * _magnitude(module, samples)
        if not difference <= allowed:
            raise ConfigError(
                f"format={chosen}: an output of the file differs from the module's by {difference:.3g}, "
                f"which is more than {allowed:.3g}; {path} was not written"
            )
        share(aside)
        aside.replace(path)
    beside = path.with_name(f"{path.name}.json") if where == "beside" and chosen != "safetensors" else None
    if beside is not None:
        plain = {name: _plain(text) for name, text in metadata.items()}
        write_text(beside, json.dumps(plain, indent=1) + "\n")
    return Exported(path, chosen, where, difference, beside, ", ".join(names))


@torch.no_grad()
def _outputs(module: nn.Module, images: Tensor) -> Outputs:
    """Return the outputs of a module by name.

    Raises:
        ConfigError: they are neither a tensor nor a dictionary of tensors.
    """
    found = module(images)
    named = dict(found) if isinstance(found, Mapping) else {OUTPUT: found}
    if not all(isinstance(value, Tensor) for value in named.values()):
        kind = type(found).__name__
        raise ConfigError(f"the module returns {kind}; only a tensor or a dictionary of them can be exported")
    return named


def _chosen(value: str, known: tuple[Any, ...], key: str) -> Any:
    if value not in known:
        raise ConfigError(f"{key} must be one of {', '.join(known)}, got {value!r}")
    return value


def _metadata(model: TrainedModel, format: str, preprocessing: str, outputs: Sequence[str]) -> dict[str, str]:
    """Return what a user of the file must know; texts, most of them JSON."""
    channels, height, width = model.shape
    shape = f"(n, {channels}, {height}, {width})"
    taken = f"uint8 {shape}, 0..255" if preprocessing == "inside" else f"float32 {shape}, normalised"
    names = (
        {"format": "pt"}
        if format == "safetensors"
        else {"input": f"{INPUT}: {taken}", "output": _described(model, outputs)}
    )
    sizes = {
        "size": [height, width],
        "resize": RESIZE[model.resize] if height == width else "none",
        "channels": channels,
        "mean": model.mean,
        "std": model.std,
    }
    return {
        "classes": json.dumps(model.classes),
        "preprocessing": json.dumps(sizes),
        "mean": json.dumps(model.mean),
        "std": json.dumps(model.std),
        **{name: model.metadata[name] for name in KEPT if name in model.metadata},
        "torch": torch.__version__,
        **names,
    }


def _described(model: TrainedModel, outputs: Sequence[str]) -> str:
    """Return the names of the outputs; of logits of more than classes with their shape, of masks."""
    target = model.task.target
    if list(outputs) != [OUTPUT]:
        return ", ".join(outputs)
    return OUTPUT if target == "class" else f"{OUTPUT}: float32 {SHAPES.get(target, '')}".rstrip()


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _samples(model: TrainedModel, preprocessing: str) -> list[Tensor]:
    """Return batches of images as the file takes them: noise, black and white."""
    rng, batches = stream("export"), []
    for size in BATCHES:
        pixels = torch.from_numpy(rng.integers(0, 256, (size, *model.shape)).astype("uint8"))
        pixels[0] = 255 * (size % 2)
        normalize = Normalizer(model.mean, model.std, torch.device("cpu"))
        batches.append(pixels if preprocessing == "inside" else normalize(pixels))
    return batches


@torch.no_grad()
def _magnitude(module: nn.Module, samples: list[Tensor]) -> float:
    """Return the largest absolute value of an output; at least 1."""
    values = (value.abs().max() for images in samples for value in _outputs(module, images).values())
    return max(1.0, *map(float, values))


@torch.no_grad()
def _difference(module: nn.Module, samples: list[Tensor], run: Callable[[Tensor], Outputs]) -> float:
    """Return the largest difference of an output between `module` and the file that `run` runs."""
    largest = []
    for images in samples:
        wanted, found = _outputs(module, images), run(images)
        largest += [(found[name] - value).abs().max() for name, value in wanted.items()]
    return float(torch.stack(largest).max())


# ---- the formats ----


def _program(module: nn.Module, samples: list[Tensor]) -> torch.export.ExportedProgram:
    """Return the graph of `module` for any batch size.

    Raises:
        ConfigError: torch.export cannot trace it.
    """
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            program = torch.export.export(module, (samples[1],), dynamic_shapes=({0: batch},))
    except Exception as error:
        name = type(module.module if isinstance(module, WithPreprocessing) else module).__name__
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(
            f"torch.export cannot export {name} for any batch size ({type(error).__name__}: {reason}); take "
            "branches on values out of its forward, or use format=safetensors"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with paths of this machine
    return program


def _write_pt2(module: nn.Module, samples: list[Tensor], path: Path, metadata: dict[str, str]) -> float:
    with _quiet():
        torch.export.save(_program(module, samples), path, extra_files={METADATA: json.dumps(metadata)})
        program = torch.export.load(path).module()
        return _difference(module, samples, lambda images: _outputs(program, images))


def _write_onnx(module: nn.Module, samples: list[Tensor], path: Path, metadata: dict[str, str]) -> float:
    onnx, runtime = _needed("onnx"), _needed("onnxruntime")
    _needed("onnxscript")
    names = [*_outputs(module, samples[1])]
    with _quiet():
        program = _program(module, samples)
        try:
            written: Any = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=names, verbose=False
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigError(f"format=onnx: torch.onnx cannot export the module ({reason})") from error
        onnx.save(_labelled(written.model_proto, metadata), path)
        onnx.checker.check_model(path)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Outputs:
        arrays = session.run(names, {INPUT: images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return _difference(module, samples, run)


def _labelled(proto: Any, metadata: dict[str, str]) -> Any:
    """Put `metadata` into a model of ONNX, name its batch, and drop names and lines of this program."""
    for name, text in metadata.items():
        proto.metadata_props.add(key=name, value=text)
    symbol = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if symbol in dim.dim_param:
                dim.dim_param = dim.dim_param.replace(symbol, "batch")
    for node in proto.graph.node:
        del node.metadata_props[:]
    return proto


def _write_safetensors(module: nn.Module, _: list[Tensor], path: Path, metadata: dict[str, str]) -> float:
    save_model(module, path, metadata)
    state = module.state_dict()
    same = all(torch.equal(t, state[n]) for n, t in safetensors.torch.load_file(path).items())
    return 0.0 if same else float("inf")


_WRITERS: dict[str, Callable[[nn.Module, list[Tensor], Path, dict[str, str]], float]] = {
    "pt2": _write_pt2,
    "onnx": _write_onnx,
    "safetensors": _write_safetensors,
}


def _needed(name: str) -> Any:
    """Import a library of the extra `export`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f'format=onnx needs {name}; pip install "fedddp[export]"') from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters log and warn of: the file is compared with the module."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
