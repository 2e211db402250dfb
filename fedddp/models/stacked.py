"""Several copies of a model that run side by side, each on its own part of one batch.

Autograd and Python cost a small network more than its arithmetic does. Here one graph serves all copies:
layers that treat each value by itself run once over the whole batch, layers with parameters once per copy.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedddp.rng import global_states

ROWS = 16
"""Each copy's part begins at a multiple of so many rows, that is of 64 bytes: matrix products can round
differently where memory is aligned in another way, so a copy's result would depend on the others."""

WHOLE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Identity, nn.Flatten, nn.ZeroPad2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
"""Layers without parameters whose results do not depend on where in a batch an example stands.

Others, such as GELU, round differently at the end of a tensor than in its middle."""

FUNCTIONS = {
    *(torch.flatten, torch.relu, torch.add, operator.add, operator.getitem, getattr),
    *(F.relu, F.max_pool2d),
}
METHODS = {"flatten", "relu", "view", "reshape", "size"}
"""What else a forward pass may call, for the same reason; each result is checked for its number of rows."""

QUIET = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU)
"""Layers that run once per copy and do not draw from the global generators."""


class UnsupportedModelError(ValueError):
    """A model whose copies cannot run side by side, and why."""


@dataclass(frozen=True)
class Step:
    """The step of plain SGD that the backward pass takes: w ← (1 − lr·weight_decay)·w − lr·g."""

    lr: float
    weight_decay: float

    @property
    def keep(self) -> float:
        """1 − lr·weight_decay."""
        return 1.0 - self.lr * self.weight_decay


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
        graph = _trace(self.modules[0])
        self.layers = {
            str(node.target): [module.get_submodule(node.target) for module in self.modules]
            for node in graph.nodes
            if node.op == "call_module"
        }
        self.draws = any(
            not isinstance(layers[0], (*WHOLE, *QUIET)) and not _is_fused(layers[0])
            for layers in self.layers.values()
        )
        """Whether a layer may draw from torch's generator, such as dropout."""
        self._interpreter = _Interpreter(self, fx.GraphModule(self.modules[0], graph))
        self._token = torch.zeros((), requires_grad=True)
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
        self._interpreter.token = self._token
        return self._interpreter.run(images)  # type: ignore[no-any-return]

    def finish(self, parts: Sequence[Part], step: Step | None) -> None:
        """Take the step of all other layers' parameters, for which autograd has made gradients."""
        others = [p for part in parts for p in self._others[part.copy]]
        if step is None or not others:
            return
        data, grads = [p.data for p in others], [p.grad for p in others if p.grad is not None]
        if step.weight_decay:
            torch._foreach_mul_(data, step.keep)
        torch._foreach_add_(data, grads, alpha=-step.lr)


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


def _is_fused(layer: nn.Module) -> bool:
    """Return whether backward of `layer` writes the steps or the gradients of its parameters itself."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return False
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.modules.batchnorm._NormBase) or super().is_leaf_module(
            m, module_qualified_name
        )


def _trace(module: nn.Module) -> fx.Graph:
    """Return the forward pass of `module` in training as a graph.

    Raises:
        UnsupportedModelError: it cannot be traced, a trace would not hold for every pass, or it has an
            operation that may couple examples or round by position.
    """
    module.train()
    before, draws = _plain_attributes(module), global_states()
    try:
        graph = _Tracer().trace(module)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UnsupportedModelError(f"its forward pass cannot be traced ({reason})") from error
    if global_states() != draws or _plain_attributes(module) != before:
        raise UnsupportedModelError("its forward pass draws at random, or counts, outside of layers")
    for node in graph.nodes:
        _check_node(node)
    uses = [id(p) for name in _called(graph) for p in module.get_submodule(name).parameters()]
    if len(uses) != len(set(uses)):
        raise UnsupportedModelError("two calls of layers share a parameter")
    if any(p.requires_grad and id(p) not in uses for p in module.parameters()):
        raise UnsupportedModelError("its forward pass does not use all parameters")
    return graph


def _called(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def _plain_attributes(module: nn.Module) -> list[dict[str, object]]:
    plain = (bool, int, float, str)
    return [{k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in module.modules()]


def _check_node(node: fx.Node) -> None:
    name = getattr(node.target, "__name__", str(node.target))
    if node.op == "get_attr":
        raise UnsupportedModelError(f"it uses {name!r} outside of a layer")
    if (node.op == "call_function" and node.target not in FUNCTIONS) or (
        node.op == "call_method" and node.target not in METHODS
    ):
        raise UnsupportedModelError(f"its forward pass calls {name!r}")
    if name == "add" and not all(isinstance(argument, fx.Node) for argument in node.args[:2]):
        raise UnsupportedModelError("its forward pass adds a constant")
    if name == "getattr" and node.args[1] != "shape":
        raise UnsupportedModelError(f"its forward pass uses {node.args[1]!r} of a tensor")
    if name == "getitem":
        source = node.args[0]
        shape = isinstance(source, fx.Node) and source.target in (getattr, "size")
        if not shape:
            raise UnsupportedModelError("its forward pass indexes a tensor")


class _Interpreter(fx.Interpreter):
    """Runs the traced forward pass for all copies."""

    parts: Sequence[Part]
    step: Step | None
    token: Tensor
    rows: int

    def __init__(self, model: StackedModel, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.model = model

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer once over the batch, or once per copy."""
        target = str(target)
        layers = self.model.layers[target]
        if type(layers[0]) in WHOLE or (isinstance(layers[0], nn.Dropout) and not layers[0].p):
            return layers[0](*args, **kwargs)
        if fused := self.model.fused.get(target):
            return fused.function.apply(args[0], self.token, fused, self.parts, self.step)
        return self._each(layers, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Refuse an operation that joins the examples of a batch."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and len(result) != self.rows:
            raise UnsupportedModelError(f"the result of {n.name!r} has other rows than the batch")
        return result

    def _each(self, layers: list[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        pieces: list[Tensor] = []
        for part in self.parts:
            layer, own = layers[part.copy], slice(part.start, part.start + part.count)
            inputs = [a[own] if isinstance(a, Tensor) else a for a in args]
            if isinstance(layer, QUIET):
                output = layer(*inputs, **kwargs)
            else:
                torch.default_generator.set_state(part.generator)
                output = layer(*inputs, **kwargs)
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
        biases = [self.biases[part.copy] for part in parts]
        if step.weight_decay:
            torch._foreach_mul_(biases, step.keep)
        torch._foreach_add_(biases, gradients, alpha=-step.lr)


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
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
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
                if step.weight_decay:
                    weight.mul_(step.keep)
                weight.add_(d_weight, alpha=-step.lr)
            bias_gradients.append(d_bias)
        if fused.trains_bias:
            fused.step_biases(parts, bias_gradients, step)
        return dx, None, None, None, None


def _format(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
