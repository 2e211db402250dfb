#!/usr/bin/env python
"""Make small wrong changes to the package, one at a time, and see whether the nearest tests fail.

    .venv/bin/python scripts/mutate.py --modules algorithms aggregation/mean --count 40 --seed 0

A mutant is a copy of the package with one change: another operator, comparison, constant, sign or function
(min for max, `add_` for `sub_`), `and` for `or`, `not` left out, or a statement left out. Annotations,
messages of errors and defaults of settings stay as they are: tests/test_docs.py compares the defaults with
the documentation. The tests of `NEAREST` run on each mutant in a temporary folder; those that fail, or take
ten times as long as without a change, have caught it. `--only FILE:LINE` makes all mutants of one line, to
look at a survivor again. Exit code 0: every mutant was caught.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fedddp"
COPIED = (PACKAGE, "tests", "docs", "scripts", "README.md", "CHANGELOG.md", "pyproject.toml")
MODULES = ("algorithms", "aggregation", "simulation", "data", "evaluation", "tasks")
TIMEOUT_S = 60.0
"""Seconds that tests of a mutant may always take, beside ten times those of the unchanged package."""

ONE_WORLD = "not 1-2 and not 2-1 and not 2-2 and not resumes_to and not number_of_groups"
"""Tests that train every algorithm in four worlds: one of these suffices for an equation."""
NEAREST: dict[str, tuple[tuple[str, ...], str]] = {
    "algorithms/asynchronous": (("absorb", "clock", "events", "asynchronous"), ""),
    "algorithms/local": (("algorithms", "client_trainer", "schedule"), ONE_WORLD),
    "algorithms": (("algorithms", "identities"), ONE_WORLD),
    "aggregation/mean": (("mean", "algorithms"), ONE_WORLD),
    "aggregation/robust": (("robust",), ""),
    "aggregation": (("admission", "mean", "robust"), ""),
    "simulation/cohort": (("cohort",), ""),
    "simulation/clock": (("clock", "stragglers"), ""),
    "simulation/attacks": (("robust",), ""),
    "data/partition": (("partition",), "not million"),
    "data/transforms": (("transforms", "partition"), "not million"),
    "data/resizing": (("resizing", "transforms", "predict_tasks"), ""),
    "data/labelling": (("labelling", "ignored_boxes"), ""),
    "data/targets": (("labelling", "ignored_boxes"), ""),
    "data/decode": (("decode", "datasets", "loader"), ""),
    "data/loader": (("loader_edges", "loader"), ""),
    "data/poisson": (("example_privacy",), ""),
    "data": (("datasets", "loader_edges", "loader"), ""),
    "evaluation": (("evaluation",), ""),
    "tasks": (("tasks",), ""),
    "inference/export": (("export",), ""),
    "inference": (("inference", "use"), ""),
    "callbacks": (("callbacks",), ""),
    "commands/init": (("init",), ""),
    "commands/options": (("progress",), ""),
    "commands/predict": (("predict_tasks",), ""),
    "commands/predict_folder": (("predict_tasks",), ""),
    "commands": (("runs", "cli"), ""),
    "privacy/example": (("example_privacy",), ""),
    "training/private_trainer": (("example_privacy",), ""),
    "reporting": (("report", "compare"), ""),
    "privacy": (("privacy_accounts", "private_rounds"), ONE_WORLD),
    "secure": (("secure_primitives", "secure_protocol"), ""),
    "storage/run_record": (("run_record",), ""),
    "tracking/derived": (("metrics",), ""),
    "tracking": (("progress", "tracking"), ""),
    "training/engine": (("engine", "graphs"), ""),
    "training/graph_trainer": (("graphs",), ""),
    "training/best": (("best",), ""),
    "training/profiling": (("profiling",), ""),
    "transport": (("codecs", "transport"), "not million and not every_algorithm"),
}
"""Test files by module, and which of their tests; the longest beginning of a module's name counts."""

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_PAIRS = (
    *(("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("any", "all"), ("floor", "ceil")),
    *(("add_", "sub_"), ("mul_", "div_"), ("sum", "mean"), ("amin", "amax"), ("zeros_like", "ones_like")),
)
FUNCTIONS = {**dict(_PAIRS), **{second: first for first, second in _PAIRS}}

_DROPS_OUT = (
    'return self.dropout > 0 and bool(stream("dropout", seed, number, client).random() < self.dropout)'
)
_TRIAL = "trial = ServerState(torch.ones(3), torch.empty(0), torch.empty(0), 1)"
_TRIAL_STEP = 'self.step(trial, AggregatedUpdate({"update": torch.ones(3)}, 1))'
_LARGEST = "torch.stack(vector.aminmax()).abs().amax().double() * max(abs(weights[name]), 1e-300)"
_FLOAT32 = 'fix = f"{fix}, or aggregation.sums=float32" if limit < 2.0**62 else fix'
_RESHAPED = "pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)"
_CLOSE = "close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)"
_UNSET = "self.ranks, self.pass_seed = ranks, 0"
_SHARDED = "loader, num_processes=shard[1], process_index=shard[0], even_batches=False"
_NO_LIST = "if values is None or callable(values):"
_HINGE = "return 1.0 if tau <= self.b else 1.0 / (self.a * (tau - self.b) + 1)"
_BYTES_OF_ZEROS = "return self.received(ClientUpdate(zeros, 1.0), {}, client=0, number=0)[1]"
_FITS = "-largest_change < int(change.amin()) <= int(change.amax()) < largest_change"  # of integer buffers
EXPLAINED = {
    ("SMALLEST_LOSS = 1e-10", "1e-10  ->  1.5e-10"): "any tiny loss keeps the divisions finite",
    (_TRIAL, "0  ->  1"): "a trial of the server's optimizer steps no buffers",
    (_TRIAL, "1  ->  2"): "nor does it read the population",
    (_TRIAL_STEP, "1  ->  2"): "nor the number of clients",
    (_DROPS_OUT, "self.dropout > 0  ->  (self.dropout >= 0)"): "no draw is below a probability of 0",
    (_LARGEST, "1e-300  ->  1.5e-300"): "infinity times any tiny weight is infinity",
    (_FLOAT32, "limit < 2.0**62  ->  (limit <= 2.0 ** 62)"): "sums hold at most 2^22 or nearly 2^126",
    (_FLOAT32, "2.0  ->  3.0"): "likewise",
    (_FLOAT32, "62  ->  63"): "likewise",
    (_RESHAPED, "1  ->  2"): "numpy infers any negative length; with a column less it raises",
    (_CLOSE, "1  ->  2"): "the nearest of two names is the nearest of one",
    (_UNSET, "0  ->  1"): "a pass sets the seed before it is read",
    (_NO_LIST, "values is None or callable(values)  ->  (values is None and callable(values))"): (
        "an array of either has no length"
    ),
    (_SHARDED, "False  ->  True"): "every rank has its part of every batch: nothing is uneven",
    (_BYTES_OF_ZEROS, "1.0  ->  1.5"): "bytes do not depend on weights",
    ("UNMASKING = 3", "3  ->  4"): "only the order of the points counts",
    (f"not change.numel() or {_FITS}", f"{_FITS}  ->  ({_FITS.replace(' < ', ' <= ', 1)})"): (
        "sums hold twice the bound"
    ),
    (_HINGE, "tau <= self.b  ->  (tau < self.b)"): "at τ = b both branches are 1",
}
"""Mutants that do the same as the package, by line and change, and why; they are left out."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    """Of the file, from the folder of the package."""
    line: int
    text: str
    """The line before the change."""
    before: str
    after: str
    start: int
    end: int
    """Which bytes of the file are replaced by `after`."""

    @property
    def module(self) -> str:
        """Name such as algorithms/fedavg."""
        return self.path.removesuffix(".py")

    @property
    def change(self) -> str:
        """The change in one line."""
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{before}  ->  {after}"

    def __str__(self) -> str:
        return f"{PACKAGE}/{self.path}:{self.line}: {self.change}"


@functools.singledispatch
def changes(node: ast.AST) -> Iterator[str]:
    """Yield what may stand in the place of `node` instead; nothing for most nodes."""
    yield from ()


@changes.register
def _(node: ast.Expr) -> Iterator[str]:
    if not isinstance(node.value, (ast.Constant, ast.Yield, ast.YieldFrom)):  # docstrings stay
        yield "pass"


@changes.register
def _(node: ast.AugAssign) -> Iterator[str]:
    yield "pass"
    if type(node.op) in OPERATORS:
        yield ast.unparse(ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value))


@changes.register
def _(node: ast.BinOp) -> Iterator[str]:
    if type(node.op) in OPERATORS:
        yield _expression(ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right))


@changes.register
def _(node: ast.BoolOp) -> Iterator[str]:
    yield _expression(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))


@changes.register
def _(node: ast.Compare) -> Iterator[str]:
    for index, kind in enumerate(node.ops):
        changed = [*node.ops[:index], COMPARISONS[type(kind)](), *node.ops[index + 1 :]]
        yield _expression(ast.Compare(node.left, changed, node.comparators))


@changes.register
def _(node: ast.UnaryOp) -> Iterator[str]:
    if isinstance(node.op, (ast.USub, ast.Not)):
        yield _expression(node.operand)


@changes.register
def _(node: ast.Constant) -> Iterator[str]:
    if isinstance(node.value, bool):
        yield str(not node.value)
    elif isinstance(node.value, int):
        yield str(node.value + 1)
    elif isinstance(node.value, float):
        yield repr(node.value * 1.5 if node.value else 1.0)


@changes.register
def _(node: ast.Attribute) -> Iterator[str]:
    if node.attr in FUNCTIONS:
        yield _expression(ast.Attribute(node.value, FUNCTIONS[node.attr], ast.Load()))


@changes.register
def _(node: ast.Name) -> Iterator[str]:
    if node.id in FUNCTIONS and isinstance(node.ctx, ast.Load):
        yield FUNCTIONS[node.id]


def _expression(node: ast.expr) -> str:
    return f"({ast.unparse(node)})"


def parts(node: ast.AST) -> Iterable[ast.AST]:
    """Return the parts of `node` that may be changed."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.body  # without decorators, annotations and defaults
    if isinstance(node, ast.AnnAssign):
        setting = node.value is None or isinstance(node.value, (ast.Constant, ast.Call))
        return [] if setting or node.value is None else [node.value]
    if isinstance(node, ast.AugAssign):
        return [node.value]
    checks_only = isinstance(node, ast.keyword) and node.arg == "strict"
    if checks_only or isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
        return []
    return ast.iter_child_nodes(node)


def mutants_in(path: str, source: str) -> Iterator[Mutant]:
    """Yield all mutants of one file, whose `path` begins at the package."""
    encoded, starts = source.encode(), [0]
    for line in encoded.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        nodes.extend(parts(node))
        for after in changes(node):
            assert isinstance(node, (ast.expr, ast.stmt))
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            text = source.splitlines()[node.lineno - 1].strip()
            yield Mutant(path, node.lineno, text, encoded[start:end].decode(), after, start, end)


def mutants_of(modules: Sequence[str]) -> Iterator[Mutant]:
    """Yield all mutants of the files whose path in the package begins with one of `modules`."""
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        path = file.relative_to(ROOT / PACKAGE).as_posix()
        if any(path.removesuffix(".py") == module or path.startswith(f"{module}/") for module in modules):
            for mutant in mutants_in(path, file.read_text()):
                if (mutant.text, mutant.change) not in EXPLAINED:
                    yield mutant


class Copy:
    """A copy of the package and its tests in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        for name in COPIED:
            source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__", "*.egg-info")
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=ignored)
            elif source.exists():
                shutil.copy(source, folder / name)

    def catches(self, mutant: Mutant) -> bool:
        """Return whether the tests nearest to the mutant's module fail."""
        key = max((k for k in NEAREST if f"{mutant.module}/".startswith(f"{k}/")), key=len)
        if key not in self.seconds:
            start = time.monotonic()
            if not self.passes(key, 10 * TIMEOUT_S):
                raise SystemExit(f"error: tests of {key} fail without a change: {' '.join(command(key))}")
            self.seconds[key] = time.monotonic() - start
        file = self.folder / PACKAGE / mutant.path
        source = file.read_bytes()
        file.write_bytes(source[: mutant.start] + mutant.after.encode() + source[mutant.end :])
        try:
            return not self.passes(key, TIMEOUT_S + 10 * self.seconds[key])
        finally:
            file.write_bytes(source)

    def passes(self, key: str, timeout_s: float) -> bool:
        """Return whether the tests of `key` pass, in time."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(
            command(key),
            cwd=self.folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(timeout_s) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its ranks
                process.wait()


def command(key: str) -> list[str]:
    """Return the command that tests a module of `NEAREST`."""
    files, keyword = NEAREST[key]
    chosen = ["-k", keyword] if keyword else []
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    return [*pytest, *(f"tests/test_{name}.py" for name in files)]


def main() -> int:
    """Make the mutants, test them, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--modules", nargs="+", default=list(MODULES), help="such as algorithms or data/loader"
    )
    parser.add_argument("--count", type=int, default=200, help="mutants, chosen at random (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    parser.add_argument("--only", metavar="FILE:LINE", help="all mutants of one line, e.g. tasks/task.py:50")
    arguments = parser.parse_args()
    every = list(mutants_of(arguments.modules))
    if arguments.only:
        path = arguments.only.removeprefix(f"{PACKAGE}/")
        chosen = [mutant for mutant in every if f"{mutant.path}:{mutant.line}" == path]
    else:
        chosen = random.Random(arguments.seed).sample(every, min(arguments.count, len(every)))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(chosen)} of {len(every)} mutants of {', '.join(arguments.modules)}")
    caught: dict[Mutant, bool] = {}
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copy = Copy(Path(folder))
        for mutant in sorted(chosen, key=str):
            caught[mutant] = copy.catches(mutant)
            console.print("caught  " if caught[mutant] else "SURVIVED", str(mutant), markup=False)
    table = Table("module", "mutants", "caught", "survivors: line and change")
    for module in sorted({mutant.module for mutant in caught}):
        own = {m: c for m, c in caught.items() if m.module == module}
        survivors = [f"{m.line}: {m.change}" for m, c in own.items() if not c]
        table.add_row(module, str(len(own)), str(sum(own.values())), "\n".join(survivors).replace("[", r"\["))
    total = sum(caught.values())
    table.add_row("all", str(len(caught)), f"{total} ({total / max(len(caught), 1):.0%})", "", style="bold")
    console.print(table)
    return int(total < len(caught))


if __name__ == "__main__":
    sys.exit(main())
