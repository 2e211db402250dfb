"""A model's forward and backward pass as two loops over its operations, without a graph of autograd.

A small network costs autograd and memory traffic more than arithmetic. Here the backward pass of a linear
layer takes the step of SGD within its matrix product, so that no gradient is written and read again.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import _engine_run_backward, get_gradient_edge
from torch.fx.node import map_arg
from torch.nn import functional as F

from fedddp.models.flat import FlatModel
from fedddp.models.trace import UnsupportedModelError, first_line, trace
from fedddp.rng import generators_kept, seed_global

threshold_backward = torch.ops.aten.threshold_backward.default

RELU = (F.relu, torch.relu, "relu")
RESHAPES = (torch.flatten, "flatten", "view", "reshape")
OUT_OF_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}
"""The same result is needed where an in-place operation takes a tensor that autograd starts from."""

QUIET = (
    *(nn.Linear, nn.Conv2d, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU),
    *(nn.Flatten, nn.Identity),
)
"""Layers that draw nothing from the global generators; a user's subclass may."""


PIECE = 1 << 20
"""Elements of a vector that a trial compares at a time."""


@dataclass(slots=True)
class Step:
    """The step of plain SGD that the backward pass takes: w ← keep·w − scale·g."""

    scale: float
    """Learning rate, over the number of examples where g is the gradient of a sum over them."""
    keep: float
    """1 − learning rate · weight decay."""


class TracedModel:
    """The passes of a module in training; one forward pass, then its backward pass, and so on."""

    def __init__(self, module: nn.Module) -> None:
        """Trace `module`, whose parameters have gradients to write to (`FlatModel`).

        Raises:
            UnsupportedModelError: it cannot be traced, or a trace would not hold for every pass.
        """
        self.operations: list[Operation] = []
        places: dict[fx.Node, int] = {}
        trained: set[fx.Node] = set()
        """Nodes whose results depend on a parameter that trains."""
        for node in trace(module).nodes:
            places[node] = len(places)
            if node.op == "output":
                self._result = places[node.args[0]]
            elif node.op != "placeholder":
                operation = _operation(node, module, trained)
                operation.inputs = [places[source] for source in node.all_input_nodes]
                operation.input, operation.output = operation.inputs[0], places[node]
                if operation.trains or any(source in trained for source in node.all_input_nodes):
                    trained.add(node)
                self.operations.append(operation)
        self.draws = any(isinstance(op, _Other) and not op.quiet for op in self.operations)
        """Whether an operation may draw from the global generators, as dropout does."""
        self._values: list[Any] = [None] * len(places)
        """The images and the results of operations, from a forward pass to its backward pass."""
        kept = {place for operation in self.operations for place in operation.kept()} | {self._result}
        last_use = {place: operation for operation in self.operations for place in operation.inputs}
        for place, operation in last_use.items():
            if place not in kept:
                operation.frees.append(place)

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs for `images` (b, C, H, W)."""
        values = self._values
        values[0] = images
        for operation in self.operations:
            operation.forward(values)
            for place in operation.frees:
                values[place] = None
        return values[self._result]  # type: ignore[no-any-return]

    def backward(self, gradient: Tensor, step: Step | None) -> None:
        """Go back from the outputs' `gradient`.

        Args:
            gradient: of the loss by the outputs of the last `forward`, in their shape.
            step: what the parameters take at once; None: their gradients are overwritten, not added to.
        """
        values = self._values
        gradients: list[Any] = [None] * len(values)
        gradients[self._result] = gradient
        for operation in reversed(self.operations):
            if gradients[operation.output] is not None:
                operation.backward(values, gradients, step)
            values[operation.output] = gradients[operation.output] = None


class Operation(ABC):
    """A node of the graph: how its result follows from its inputs, and back."""

    inputs: Sequence[int]
    """Places of what it takes, among the values of a pass."""
    input: int
    """The first of them."""
    output: int
    """The place of its result."""
    trains = False
    """Whether it has parameters that train."""

    def __init__(self) -> None:
        self.frees: list[int] = []
        """Places of what no later operation takes, and no backward pass."""

    def kept(self) -> Sequence[int]:
        """Return the places of what `backward` takes."""
        return ()

    @abstractmethod
    def forward(self, values: list[Any]) -> None:
        """Put the result in its place."""

    @abstractmethod
    def backward(self, values: list[Any], gradients: list[Any], step: Step | None) -> None:
        """Add to the gradients of the inputs, where needed; step the parameters, or write their gradients."""


def _add(gradients: list[Any], place: int, gradient: Tensor) -> None:
    before = gradients[place]
    gradients[place] = gradient if before is None else before + gradient


class _Linear(Operation):
    """A linear layer; its step is taken in the product that makes its gradient."""

    def __init__(self, layer: nn.Linear, needed: bool) -> None:
        """`needed`: whether the gradient of its input is."""
        super().__init__()
        self.layer, self.needed = layer, needed
        self.weight, self.bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        self.trains_weight = layer.weight.requires_grad
        self.trains_bias = layer.bias is not None and layer.bias.requires_grad
        self.trains = self.trains_weight or self.trains_bias
        self.ones = torch.empty(0)
        """As many as the rows of the last batch."""

    def kept(self) -> Sequence[int]:
        return (self.input,)

    def forward(self, values: list[Any]) -> None:
        values[self.output] = F.linear(values[self.input], self.weight, self.bias)

    def backward(self, values: list[Any], gradients: list[Any], step: Step | None) -> None:
        x, d = values[self.input], gradients[self.output]
        if x.dim() != 2:
            x, d = x.flatten(0, -2), d.flatten(0, -2)
        if self.needed:  # before the weight changes
            _add(gradients, self.input, d.mm(self.weight).view_as(values[self.input]))
        if self.trains_weight and step is not None:
            self.weight.addmm_(d.t(), x, beta=step.keep, alpha=-step.scale)
        elif self.trains_weight:
            torch.mm(d.t(), x, out=self.layer.weight.grad)
        if self.bias is not None and self.trains_bias:
            self._backward_of_bias(self.bias, d, step)

    def _backward_of_bias(self, bias: Tensor, d: Tensor, step: Step | None) -> None:
        if step is None:
            _update(self.layer.bias, d.sum(0), None)
            return
        if self.ones.shape[0] != d.shape[0]:
            self.ones = d.new_ones(d.shape[0])
        bias.addmv_(d.t(), self.ones, beta=step.keep, alpha=-step.scale)


class _Relu(Operation):
    def kept(self) -> Sequence[int]:
        return (self.output,)

    def forward(self, values: list[Any]) -> None:
        values[self.output] = torch.relu(values[self.input])

    def backward(self, values: list[Any], gradients: list[Any], step: Step | None) -> None:
        _add(gradients, self.input, threshold_backward(gradients[self.output], values[self.output], 0))


class _Reshape(Operation):
    """A view, or a copy, of the same values in another shape."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, values: list[Any]) -> None:
        self.shape = values[self.input].shape
        values[self.output] = self.call(*[values[place] for place in self.inputs])

    def backward(self, values: list[Any], gradients: list[Any], step: Step | None) -> None:
        _add(gradients, self.input, gradients[self.output].reshape(self.shape))


class _Other(Operation):
    """Any other layer or function: autograd goes back through it alone."""

    def __init__(self, call: Callable[..., Any], layer: nn.Module | None, needed: list[bool]) -> None:
        """`needed`: whether the gradient of each input is."""
        super().__init__()
        self.call, self.needed = call, needed
        self.parameters = [] if layer is None else [p for p in layer.parameters() if p.requires_grad]
        self.trains = bool(self.parameters)
        self.in_place = getattr(layer, "inplace", False)
        known = type(layer).__module__.startswith(("torch.nn.", "fedddp."))
        self.quiet = isinstance(layer, QUIET) and known

    def forward(self, values: list[Any]) -> None:
        inputs, self.leaves = [values[place] for place in self.inputs], {}
        for number, place in enumerate(self.inputs):
            value = inputs[number]
            if self.needed[number] and isinstance(value, Tensor) and value.is_floating_point():
                inputs[number] = self.leaves[place] = value.detach().requires_grad_()
        with torch.set_grad_enabled(bool(self.leaves or self.parameters)):
            if self.in_place:
                inputs = [value.clone() for value in inputs]
            result = self.call(*inputs)
        if isinstance(result, tuple | list) and any(isinstance(part, Tensor) for part in result):
            raise UnsupportedModelError("its forward pass splits a tensor into several")
        if isinstance(result, Tensor) and result.requires_grad:
            self.edge: Any = get_gradient_edge(result)  # not the result, which need not stay in memory
            result = result.detach()
        values[self.output] = result

    def backward(self, values: list[Any], gradients: list[Any], step: Step | None) -> None:
        wanted = (*self.leaves.values(), *self.parameters)
        # What `torch.autograd.grad` calls; with a gradient it imports sympy first, which takes 0.8 s.
        found = _engine_run_backward(
            (self.edge,), (gradients[self.output],), False, False, wanted, False, accumulate_grad=False
        )
        for place, gradient in zip(self.leaves, found, strict=False):
            _add(gradients, place, gradient)
        for parameter, gradient in zip(self.parameters, found[len(self.leaves) :], strict=True):
            _update(parameter, gradient, step)
        self.edge, self.leaves = None, {}


def _update(parameter: nn.Parameter, gradient: Tensor, step: Step | None) -> None:
    """Step a parameter, or write its gradient."""
    if step is None:
        assert parameter.grad is not None
        parameter.grad.copy_(gradient)
        return
    if step.keep != 1:
        parameter.mul_(step.keep)
    parameter.add_(gradient, alpha=-step.scale)


def _operation(node: fx.Node, module: nn.Module, trained: set[fx.Node]) -> Operation:
    """Return what runs `node`; of its inputs, gradients are needed of those that are `trained`."""
    needed = [source in trained for source in node.all_input_nodes]
    layer: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    call = _call(node, layer)
    if type(layer) is nn.Linear:
        return _Linear(layer, needed[0])
    if type(layer) is nn.ReLU or node.target in RELU:
        return _Relu()
    if type(layer) in (nn.Flatten, nn.Identity) or node.target in RESHAPES:
        return _Reshape(call)
    return _Other(call, layer, needed)


def _call(node: fx.Node, layer: nn.Module | None) -> Callable[..., Any]:
    """Return what computes `node` from its inputs."""
    if layer is not None and len(node.args) == 1 and not node.kwargs:
        return layer.forward  # `trace` refuses hooks, which a call would run
    target: Any = node.target if layer is None else layer
    target = OUT_OF_PLACE.get(target, target)

    def call(*inputs: Any) -> Any:
        given = dict(zip(node.all_input_nodes, inputs, strict=True))
        arguments: Any = map_arg(node.args, given.__getitem__)
        keywords: Any = map_arg(node.kwargs, given.__getitem__)
        if node.op == "call_method":
            return getattr(arguments[0], target)(*arguments[1:], **keywords)
        return target(*arguments, **keywords)

    return call


def try_traced(flat: FlatModel, shape: tuple[int, int, int]) -> TracedModel:
    """Return passes of a model that do what its own do; its gradients end at zero, all else as it was.

    Args:
        flat: the model, on the CPU.
        shape: of an image, (C, H, W).

    Raises:
        UnsupportedModelError: they do not, and why.
    """
    module, training = flat.module, flat.module.training
    traced = TracedModel(module)
    buffers = flat.buffers.clone(), flat.integer_buffers.clone()
    with generators_kept(), torch.no_grad():
        try:
            for count in (3, 2):
                images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(count))
                _compare(flat, traced, images, buffers)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(f"its traced passes fail ({first_line(error)})") from error
        finally:
            flat.load(flat.params, *buffers)
            flat.grad.zero_()
            module.train(training)
    return traced


def _compare(flat: FlatModel, traced: TracedModel, images: Tensor, buffers: tuple[Tensor, Tensor]) -> None:
    """Compare outputs, gradients and buffers after a pass of either kind from `buffers`."""
    flat.load(flat.params, *buffers)
    flat.grad.zero_()
    seed_global(0)
    with torch.enable_grad():
        expected = flat.module.train()(images)
        gradient = torch.linspace(-1, 1, expected.numel()).view_as(expected)
        (expected * gradient).sum().backward()
    flat.read_buffers()
    results = [expected.detach(), flat.grad.clone(), flat.buffers.clone()]
    flat.load(flat.params, *buffers)
    seed_global(0)
    found = traced.forward(images)
    traced.backward(gradient, None)
    flat.read_buffers()
    if not all(map(alike, [found, flat.grad, flat.buffers], results)):
        raise UnsupportedModelError("its traced passes compute something else")


def alike(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> bool:
    """Return whether two ways to compute the same came to values that are close.

    `tolerance` is relative to a value; a tenth of it to the largest one.
    """
    scale = max(float(expected.abs().max()), 1e-6) if expected.numel() else 0.0
    # In pieces: what a comparison takes in between would be as large as the model.
    pieces = zip(*(torch.split(v.flatten(), PIECE) for v in (found, expected)), strict=True)
    return all(torch.allclose(one, two, rtol=tolerance, atol=0.1 * tolerance * scale) for one, two in pieces)
