"""Several copies of a model that run side by side, each on its own part of one batch.

Autograd and Python cost a small network more than its arithmetic does. Here one graph serves all copies:
layers that treat each value by itself run once over the whole batch, layers with parameters once per copy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedddp.models.flat import FlatModel
from fedddp.models.trace import UnsupportedModelError, first_line, trace
from fedddp.rng import generators_kept, seed_global

ROWS = 16
"""Each copy's part begins at a multiple of so many rows, that is of 64 bytes: matrix products can round
differently where memory is aligned in another way, so a copy's result would depend on the others."""

WHOLE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Identity, nn.Flatten, nn.ZeroPad2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
"""Layers without parameters whose results do not depend on where in a batch an example stands.

Others, such as GELU, round differently at the end of a tensor than in its middle."""

QUIET = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU)
"""Layers that run once per copy and do not draw from the global generators; a user's subclass may."""


@dataclass(frozen=True)
class Step:
    """The step of plain SGD that the backward pass takes: w ← (1 − lr·weight_decay)·w − lr·g."""

    lr: float
    weight_decay: float

    @property
    def keep(self) -> float:
        """1 − lr·weight_decay."""
        return 1.0 - self.lr * self.weight_decay

    def take(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Step `parameters` by their `gradients`, in place."""
        if self.weight_decay:
            torch._foreach_mul_(parameters, self.keep)
        torch._foreach_add_(parameters, gradients, alpha=-self.lr)


class StackedModel:
    """K modules of the same architecture as one function of a batch; see the module's docstring.

    In backward the weights of linear and convolution layers either take a `Step` at once, which spares
    writing and reading their gradients, or get their gradients overwritten (not accumulated).
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Trace the first of `modules`.

        Raises:
            UnsupportedModelError: the forward pass cannot be traced, or has an operation that may couple
                examples or round by position.
        """
        self.modules = list(modules)
        graph = trace(self.modules[0])
        self.layers = {
            str(node.target): [module.get_submodule(node.target) for module in self.modules]
            for node in graph.nodes
            if node.op == "call_module"
        }
        self.draws = any(
            type(layers[0]) not in WHOLE and not _is_quiet(layers[0]) and not _is_fused(layers[0])
            for layers in self.layers.values()
        )
        """Whether a layer may draw from torch's generator, such as dropout."""
        self._interpreter = _Interpreter(self, fx.GraphModule(self.modules[0], graph))
        self.fused = {name: _Fused(layers) for name, layers in self.layers.items() if _is_fused(layers[0])}
        """Layers whose steps or gradients the backward pass itself writes, by name."""

        fused_ids = {id(p) for name in self.fused for m in self.layers[name] for p in m.parameters()}
        self._others = [
            [p for p in module.parameters() if p.requires_grad and id(p) not in fused_ids]
            for module in self.modules
        ]

    def __call__(self, images: Tensor, parts: Sequence[Part], step: Step | None) -> Tensor:
        """Return the outputs (rows, ...), zero on the rows of no part.

        Args:
            images: the batches of all copies; (rows, C, H, W).
            parts: which copies run, and on which rows.
            step: what backward does to the weights of fused layers; None: it writes their gradients.
        """
        if others := [p.grad for part in parts for p in self._others[part.copy] if p.grad is not None]:
            torch._foreach_zero_(others)
        self._interpreter.parts, self._interpreter.step, self._interpreter.rows = parts, step, len(images)
        return self._interpreter.run(images)  # type: ignore[no-any-return]

    def finish(self, parts: Sequence[Part], step: Step | None) -> None:
        """Take the step of all other layers' parameters, for which autograd has made gradients."""
        others = [p for part in parts for p in self._others[part.copy]]
        if step is None or not others:
            return
        step.take([p.data for p in others], [p.grad for p in others if p.grad is not None])


@dataclass
class Part:
    """The rows of a batch that one copy works on."""

    copy: int
    start: int
    """Of its rows, a multiple of `ROWS`."""
    count: int
    rows: int
    """Up to the start of the next part, >= count."""
    generator: Tensor
    """State of torch's CPU generator for layers that draw; (n,) uint8, replaced when they do."""


def rows_per_copy(batch_size: int) -> int:
    """Return the rows from one part's start to the next one's."""
    return math.ceil(batch_size / ROWS) * ROWS


def _is_quiet(layer: nn.Module) -> bool:
    return isinstance(layer, QUIET) and type(layer).__module__.startswith(("torch.nn.", "fedddp."))


def _is_fused(layer: nn.Module) -> bool:
    """Return whether backward of `layer` writes the steps or the gradients of its parameters itself."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def try_side_by_side(module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Check, in copies of `module`, that two of them side by side do what each does alone.

    Args:
        module: the model, on the CPU.
        shape: of an image, (C, H, W).

    Raises:
        UnsupportedModelError: they do not, and why.
    """
    with generators_kept():
        seed_global(0)
        images = torch.rand(2 * ROWS, *shape)
        alone, *pair = (FlatModel(copy.deepcopy(module).train()) for _ in range(3))
        stacked = StackedModel([flat.module for flat in pair])
        found: list[Tensor] = []
        expected: list[Tensor] = []
        try:
            parts = []
            for number, (start, count) in enumerate(((0, 3), (ROWS, 5))):
                seed_global(start)
                parts.append(Part(number, start, count, ROWS, torch.default_generator.get_state()))
                outputs = alone.module(images[start : start + count])
                alone.grad.zero_()
                _weighted_sum(outputs).backward()  # type: ignore[no-untyped-call]
                expected += [outputs.detach(), alone.grad.clone()]
            results = stacked(images, parts, None)
            pieces = [results[part.start : part.start + part.count] for part in parts]
            torch.stack([_weighted_sum(piece) for piece in pieces]).sum().backward()  # type: ignore[no-untyped-call]
            for piece, flat in zip(pieces, pair, strict=True):
                found += [piece.detach(), flat.grad]
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(f"two copies side by side fail ({first_line(error)})") from error
        for one, two in zip(found, expected, strict=True):
            if one.shape != two.shape or not torch.allclose(one, two, rtol=1e-3, atol=1e-4 * _scale(two)):
                raise UnsupportedModelError("two copies side by side compute something else")


def _weighted_sum(outputs: Tensor) -> Tensor:
    """Return a loss to which every output adds differently."""
    return (outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).sum()


def _scale(tensor: Tensor) -> float:
    """Return the largest magnitude of `tensor`, at least 1e-6."""
    return max(float(tensor.detach().abs().max()), 1e-6)


class _Interpreter(fx.Interpreter):
    """Runs the traced forward pass for all copies."""

    parts: Sequence[Part]
    step: Step | None
    rows: int

    def __init__(self, model: StackedModel, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.model = model
        self.token = torch.zeros((), requires_grad=True)
        """Lets autograd go back through a layer whose input, the images, has no gradient."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer once over the batch, or once per copy; `trace` allows one argument only."""
        (x,), layers = args, self.model.layers[str(target)]
        if type(layers[0]) in WHOLE or (isinstance(layers[0], nn.Dropout) and not layers[0].p):
            return layers[0](x)
        if fused := self.model.fused.get(str(target)):
            return fused.function.apply(x, self.token, fused, self.parts, self.step)
        return self._each(layers, x)

    def run_node(self, n: fx.Node) -> Any:
        """Refuse an operation that joins the examples of a batch."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and len(result) != self.rows:
            raise UnsupportedModelError(f"the result of {n.name!r} has other rows than the batch")
        return result

    def _each(self, layers: list[nn.Module], x: Tensor) -> Tensor:
        pieces: list[Tensor] = []
        for part in self.parts:
            layer, own = layers[part.copy], x[part.start : part.start + part.count]
            if _is_quiet(layer):
                output = layer(own)
            else:
                torch.default_generator.set_state(part.generator)
                output = layer(own)
                part.generator = torch.default_generator.get_state()
            pieces.append(output)
            if part.rows > part.count:
                pieces.append(output.new_zeros(part.rows - part.count, *output.shape[1:]))
        return torch.cat(pieces)


class _Fused:
    """A linear or convolution layer of all copies, with its tensors at hand."""

    def __init__(self, layers: list[Any]) -> None:
        self.layer = first = layers[0]
        self.weights = [layer.weight.detach() for layer in layers]
        self.biases = None if first.bias is None else [layer.bias.detach() for layer in layers]
        self.trains = first.weight.requires_grad
        self.trains_bias = first.bias is not None and first.bias.requires_grad
        self.weight_grads = [layer.weight.grad for layer in layers]
        self.bias_grads = None if first.bias is None else [layer.bias.grad for layer in layers]
        self.function = _Linear if type(first) is nn.Linear else _Convolution

    def step_biases(self, parts: Sequence[Part], gradients: list[Tensor], step: Step | None) -> None:
        """Step the biases of the parts' copies by their gradients, or keep the gradients."""
        assert self.biases is not None
        assert self.bias_grads is not None
        if step is None:
            torch._foreach_copy_([self.bias_grads[part.copy] for part in parts], gradients)
            return
        step.take([self.biases[part.copy] for part in parts], gradients)


def _pieces(tensor: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Return the views of `tensor` (rows, ...) that are the parts' rows."""
    count, rows = parts[0].count, parts[0].rows
    if len(parts) * rows == len(tensor) and all(part.count == count for part in parts):
        return list(tensor.view(len(parts), rows, *tensor.shape[1:])[:, :count].unbind(0))
    return [tensor[part.start : part.start + part.count] for part in parts]


class _Linear(torch.autograd.Function):
    """Linear layers, one per part; see `StackedModel`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, fused: _Fused, parts: Any, step: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.given = fused, parts, step
        out = x.new_zeros(*x.shape[:-1], fused.layer.out_features)
        outs = [piece.flatten(0, -2) for piece in _pieces(out, parts)]
        ins = [piece.flatten(0, -2) for piece in _pieces(x, parts)]
        for part, a, y in zip(parts, ins, outs, strict=True):
            if fused.biases is None:
                torch.mm(a, fused.weights[part.copy].t(), out=y)
            else:
                torch.addmm(fused.biases[part.copy], a, fused.weights[part.copy].t(), out=y)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (fused, parts, step) = ctx.saved_tensors, ctx.given
        flat = [piece.flatten(0, -2) for piece in _pieces(grads[0].contiguous(), parts)]
        dx = None
        if ctx.needs_input_grad[0]:
            # Contiguous, so that flattened pieces are views of it: channels-last ones would be copies.
            dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        if dx is not None:  # before the weights change
            for part, d, out in zip(parts, flat, _pieces(dx, parts), strict=True):
                torch.mm(d, fused.weights[part.copy], out=out.flatten(0, -2))
        if fused.trains:
            for part, d, a in zip(parts, flat, _pieces(x, parts), strict=True):
                if step is None:
                    torch.mm(d.t(), a.flatten(0, -2), out=fused.weight_grads[part.copy])
                else:
                    weight = fused.weights[part.copy]
                    weight.addmm_(d.t(), a.flatten(0, -2), beta=step.keep, alpha=-step.lr)
        if fused.trains_bias:
            fused.step_biases(parts, [d.sum(0) for d in flat], step)
        return dx, None, None, None, None


class _Convolution(torch.autograd.Function):
    """Convolution layers, one per part; see `StackedModel`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, fused: _Fused, parts: Any, step: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.given = fused, parts, step
        out = x.new_empty(0)
        for part, piece in zip(parts, _pieces(x, parts), strict=True):
            bias = None if fused.biases is None else fused.biases[part.copy]
            y = fused.layer._conv_forward(piece, fused.weights[part.copy], bias)
            if not out.numel():
                out = x.new_zeros(len(x), *y.shape[1:]).contiguous(memory_format=_format(y))
            out[part.start : part.start + part.count] = y
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (fused, parts, step) = ctx.saved_tensors, ctx.given
        layer, dx, bias_gradients = fused.layer, None, []
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x)
        mask = [dx is not None, fused.trains, fused.trains_bias]
        for part, d, piece in zip(parts, _pieces(grads[0], parts), _pieces(x, parts), strict=True):
            weight, bias_sizes = fused.weights[part.copy], None if layer.bias is None else layer.bias.shape
            d_piece, d_weight, d_bias = torch.ops.aten.convolution_backward(
                *(d, piece, weight, bias_sizes, layer.stride, layer.padding, layer.dilation),
                *(False, [0, 0], layer.groups, mask),
            )
            if dx is not None:
                dx[part.start : part.start + part.count] = d_piece
            if fused.trains and step is None:
                fused.weight_grads[part.copy].copy_(d_weight)
            elif fused.trains:
                step.take([weight], [d_weight])
            bias_gradients.append(d_bias)
        if fused.trains_bias:
            fused.step_biases(parts, bias_gradients, step)
        return dx, None, None, None, None


def _format(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
