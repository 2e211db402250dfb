"""A run directory to its trained model and its configuration."""

from __future__ import annotations

import importlib
import inspect
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedddp.config.files import OBJECTS, read_sections
from fedddp.config.loader import build
from fedddp.config.schema import Config
from fedddp.data.datasets import Images
from fedddp.data.targets import Target
from fedddp.inference.model import TrainedModel
from fedddp.section import ConfigError, local_path
from fedddp.storage.checkpoint import load_into
from fedddp.storage.history import check_file, parse_json, read_json
from fedddp.storage.run_record import ALONE, BEST, MODEL, SPLIT, state_of
from fedddp.training.assembly import outputs_check


def load_model(
    run: str | Path,
    module: nn.Module | str | None = None,
    best: bool | str = False,
    client: str | int | None = None,
) -> TrainedModel:
    """Return the final model of a finished run, or that of one of its clients, on the CPU.

    Args:
        run: the run directory.
        module: for a run of your own module: one of the same architecture, whose weights are replaced; or
            the dotted path of what makes it, as for `model.name`.
        best: return the best model by the run's `checkpoint.best` instead, which a run has before its end;
            of several metrics, that by the first, or by the one given here, such as "eval/dice".
        client: a client by its name, of natural clients, or its number: its own model, of a run whose clients
            have some (FedBN, FedPer, Ditto, `baseline=local`). None: the global model.

    Raises:
        ConfigError: there is no such model, its file is corrupt, or it needs `module`.
    """
    model = server_model(run, module, best)
    if client is None:
        check_global_model(run, model.metadata)
        return model
    from fedddp.inference.own_models import of_client

    return of_client(model, local_path(str(run), "run"), client)


def server_model(
    run: str | Path, module: nn.Module | str | None = None, best: bool | str = False
) -> TrainedModel:
    """Return the model of the server; without a global model, what stays at the clients has initial values.

    Arguments and errors as for `load_model`.
    """
    directory = local_path(str(run), "run")
    file = model_file(directory, best)
    weights, metadata = read_weights(file)
    try:
        preprocessing, classes = (parse_json(metadata[name]) for name in ("preprocessing", "classes"))
        shape = (preprocessing["channels"], *preprocessing["size"])
        mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
        resize = preprocessing.get("resize", "crop")  # older models cropped
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} is not a model of fedddp 0.1.0 or newer ({error!r}); train the run again"
        ) from None
    sections = read_sections(str(directory / "config.yaml"))
    objects = sections.pop(OBJECTS, {})
    if module is None and "module" in objects:
        raise ConfigError(_needs_module(directory, str(objects["module"]["class"])))
    config = _described(sections, module)
    like = no_images(tuple(classes), shape, mean, std, config.task.target)
    properties: dict[str, Any] = {"classes": len(classes), "shape": shape, "seed": config.seed}
    properties["check"] = outputs_check(config.task, like)
    if isinstance(module, nn.Module):
        built = config.model.adapt(module, **properties)
    else:
        if module is None:
            _check_maker(config.model.name, directory)
        built = config.model.build(**properties)
    try:
        load_into(built, weights)
    except ValueError as error:
        raise ConfigError(f"{file} does not fit the module: {error}") from None
    limits = sections.get("data", {}).get("value_range")
    value_range = (float(limits[0]), float(limits[1])) if isinstance(limits, list) else None
    return TrainedModel(
        built.eval(), tuple(classes), shape, mean, std, config.task, metadata, value_range, resize
    )


def no_images(
    classes: tuple[str, ...],
    shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    target: Target,
) -> Images:
    """Return no images, of the shape, the classes and the normalisation that a model was trained with."""
    return Images(
        labels=np.empty(0, dtype=np.int64),
        classes=len(classes),
        shape=shape,
        pixels=None,
        source=None,
        ids=None,
        mean=mean,
        std=std,
        class_names=classes,
        target=target,
    )


def _described(sections: Mapping[str, Any], module: nn.Module | str | None) -> Config:
    """Return what `sections` describe of the model, which `module` may replace.

    An algorithm of the program that trained it need not be importable here.

    Raises:
        ConfigError: the user's own module cannot be imported.
    """
    model = {key: value for key, value in sections["model"].items() if key != "weights"}  # those of the run
    if module is not None:
        model.pop("name", None)
    if isinstance(module, str):
        model["name"] = module
    try:
        return build({"model": model, "task": sections["task"], "seed": sections["seed"]})
    except ConfigError as error:
        if not str(error).startswith("model.name: cannot import"):
            raise
        raise ConfigError(
            f"{error}; start in the folder of that module, or pass another path of it as module= (on the "
            "command line: --module my_lab.Net)"
        ) from None


def _needs_module(directory: Path, recorded: str) -> str:
    """Return what to report of a run of the user's own module, whose class is `recorded`."""
    location, _, name = recorded.rpartition(".")
    path, where = recorded, ""
    if location == "__main__":  # another program has another
        path, where = f"PROGRAM.{name}", ", where PROGRAM.py is what trained it"
    return (
        f"{directory} is a run of the module {recorded}; pass one as module=, or its dotted path (on the "
        f"command line: --module {path}{where})"
    )


def _check_maker(name: str, directory: Path) -> None:
    """Refuse the model `name` of a run if what it names is not made to build models.

    Raises:
        ConfigError: it is neither a subclass of nn.Module nor a function outside of the standard library.
    """
    if "." not in name:
        return
    location, _, attribute = name.rpartition(".")
    maker = getattr(importlib.import_module(location), attribute)  # the configuration has checked it
    if inspect.isclass(maker):
        fits = issubclass(maker, nn.Module)
    else:
        package = str(getattr(maker, "__module__", "")).partition(".")[0]
        fits = inspect.isfunction(maker) and package not in sys.stdlib_module_names
    if not fits:
        raise ConfigError(
            f"{directory}: model.name={name} is neither a subclass of nn.Module nor a function of your own; "
            f"if it makes the model, say so with module= (on the command line: --module {name})"
        )


def read_header(file: Path) -> dict[str, str]:
    """Return the header of a .safetensors file.

    Raises:
        ConfigError: it is corrupt, or cannot be read.
    """
    try:
        check_file(file)
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(file, error) from None


def check_global_model(run: str | Path, header: Mapping[str, str]) -> None:
    """Refuse the server's model of a run without a global one: layers, or all, have their initial values.

    Raises:
        ConfigError: it is of such a run.
    """
    if ALONE in header:
        from fedddp.inference.own_models import listed

        directory = local_path(str(run), "run")
        clients = int(read_sections(str(directory / "config.yaml"))["data"]["clients"])
        raise ConfigError(
            f"{run}: with {header[ALONE]} there is no global model, each client has its own; choose one with "
            f"--client (in Python client=): {listed(client_names(directory), clients)}"
        )


def client_names(directory: Path) -> list[str]:
    """Return the names of the clients of a run, by number; empty where they have none, or it is not known."""
    try:
        names = read_json(directory / SPLIT).get("client_names", [])
    except (OSError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a .safetensors file.

    Raises:
        ConfigError: it is corrupt, or cannot be read.
    """
    try:
        check_file(file)
        with safe_open(file, framework="pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return weights, opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(file, error) from None


def _corrupt(file: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{file} is corrupt or cannot be read ({' '.join(str(error).split())}); restore it, or train the run "
        "again"
    )


def model_file(directory: Path, best: bool | str = False) -> Path:
    """Return the file of the final model of the run in `directory`, or of its best, also by a metric.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(best, str):
        return _best_by(directory, best)
    file = directory / (BEST if best else MODEL)
    if not file.is_file():
        raise ConfigError(_missing(directory, best))
    return file


def _best_by(directory: Path, metric: str) -> Path:
    """Return the file of the best model by `metric`.

    Raises:
        ConfigError: there is none.
    """
    others = sorted(directory.glob("best-*.safetensors"))
    files = [file for file in (directory / BEST, *others) if file.is_file()]
    known = {read_header(file).get("metric", ""): file for file in files}
    if metric in known:
        return known[metric]
    if not known:
        raise ConfigError(_missing(directory, best=True))
    raise ConfigError(
        f"{directory} has no best model by {metric}; give one of {', '.join(known)}, or train a run with it "
        "in checkpoint.best"
    )


def _missing(directory: Path, best: bool) -> str:
    """Return why there is no model, and what to do."""
    if not (directory / "config.yaml").is_file():
        return f"{directory} has no {MODEL}; give the directory of a finished run"
    if best:
        return f"{directory} has no {BEST}; leave out best, or train a run with checkpoint.best=eval/accuracy"
    state = state_of(directory)
    if state == "running":
        return f"{directory} has no {MODEL}: the run is still running; wait for its end"
    return f"{directory} has no {MODEL}: the run is {state}; finish it with {resume_command(directory)}"


def resume_command(directory: Path) -> str:
    """Return what resumes the run in `directory`."""
    try:
        own = OBJECTS in read_sections(str(directory / "config.yaml"))
    except ConfigError:
        own = False
    if own:
        return 'resume="auto" in the program that started it'
    words = [str(directory / "config.yaml"), "--output", str(directory.parent), "--name", directory.name]
    return f"`fedddp run {shlex.join(words)} --resume auto`, started as before"


def read_run(run: str | Path, flags: Sequence[str] = ()) -> tuple[Config, Mapping[str, Any]]:
    """Return the configuration of a run with `flags` on top, and what it records of the user's own objects.

    Raises:
        ConfigError: there is no run, or a flag is wrong.
    """
    sections = read_sections(str(local_path(str(run), "run") / "config.yaml"))
    objects = sections.pop(OBJECTS, {})
    sections.pop("model", None)  # for `load_model`: the user's own may not be importable by that path
    return build({**sections, "resume": "auto"}, flags), objects
