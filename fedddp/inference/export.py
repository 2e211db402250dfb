"""A trained model to a file that needs no fedddp: torch.export, ONNX, or weights alone."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from fedddp.data.loader import Normalizer
from fedddp.data.transforms import RESIZE
from fedddp.inference.model import TrainedModel
from fedddp.rng import stream
from fedddp.section import ConfigError
from fedddp.storage.checkpoint import save_model, share, write_text

Format = Literal["pt2", "onnx", "safetensors"]
Preprocessing = Literal["inside", "beside"]

TOLERANCE = 1e-4
"""Largest difference of a logit between a file and the module."""

BATCHES = (1, 2, 3, 8, 17)
"""Batch sizes that are compared."""

INPUT, OUTPUT, METADATA = "images", "logits", "metadata.json"

KEPT = ("task", "fedddp", "config_digest", "round", "metric", "value")
"""Texts of the model's own header that an exported file keeps."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and compared."""

    path: Path
    format: Format
    preprocessing: Preprocessing
    difference: float
    """The largest difference of a logit, over `BATCHES`; 0 for weights that are the same bits."""
    beside: Path | None
    """The JSON file with the preprocessing, where it is beside; that of weights is in their header."""

    @property
    def compared(self) -> str:
        """The comparison, in words."""
        if self.format == "safetensors":
            return "the same bits as the module's"
        batches = ", ".join(map(str, BATCHES))
        within = f"logits within {self.difference:.2g} of" if self.difference else "the same logits as"
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

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of uint8 `images` (n, C, H, W)."""
        logits: Tensor = self.module(images.to(torch.float32) * self.factor + self.offset)
        return logits


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
    metadata = _metadata(model, chosen, where)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        aside = Path(folder) / f"model.{chosen}"
        difference = _WRITERS[chosen](module, _samples(model, where), aside, metadata)
        if not difference <= TOLERANCE:
            raise ConfigError(
                f"format={chosen}: a logit of the file differs from the module's by {difference:.3g}, "
                f"which is more than {TOLERANCE:g}; {path} was not written"
            )
        share(aside)
        aside.replace(path)
    beside = path.with_name(f"{path.name}.json") if where == "beside" and chosen != "safetensors" else None
    if beside is not None:
        plain = {name: _plain(text) for name, text in metadata.items()}
        write_text(beside, json.dumps(plain, indent=1) + "\n")
    return Exported(path, chosen, where, difference, beside)


def _chosen(value: str, known: tuple[Any, ...], key: str) -> Any:
    if value not in known:
        raise ConfigError(f"{key} must be one of {', '.join(known)}, got {value!r}")
    return value


def _metadata(model: TrainedModel, format: str, preprocessing: str) -> dict[str, str]:
    """Return what a user of the file must know; texts, most of them JSON."""
    channels, height, width = model.shape
    shape = f"(n, {channels}, {height}, {width})"
    taken = f"uint8 {shape}, 0..255" if preprocessing == "inside" else f"float32 {shape}, normalised"
    names = {"format": "pt"} if format == "safetensors" else {"input": f"{INPUT}: {taken}", "output": OUTPUT}
    sizes = {
        "size": [height, width],
        "resize": RESIZE if height == width else "none",
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
def _difference(module: nn.Module, samples: list[Tensor], run: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference of a logit between `module` and the file that `run` runs."""
    return float(torch.stack([(run(images) - module(images)).abs().max() for images in samples]).max())


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
        return _difference(module, samples, torch.export.load(path).module())


def _write_onnx(module: nn.Module, samples: list[Tensor], path: Path, metadata: dict[str, str]) -> float:
    onnx, runtime = _needed("onnx"), _needed("onnxruntime")
    _needed("onnxscript")
    with _quiet():
        program = _program(module, samples)
        try:
            written: Any = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigError(f"format=onnx: torch.onnx cannot export the module ({reason})") from error
        onnx.save(_labelled(written.model_proto, metadata), path)
        onnx.checker.check_model(path)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return _difference(
        module, samples, lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
    )


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
