"""The forward pass of a model as a graph, if copies of it can run side by side (`models.stacked`)."""

from __future__ import annotations

import copy
import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedddp.rng import global_states

FUNCTIONS = {
    *(torch.flatten, torch.relu, torch.add, operator.add, operator.getitem, getattr),
    *(F.relu, F.max_pool2d),
}
METHODS = {"flatten", "relu", "view", "reshape", "size"}
"""What a forward pass may call besides layers: what is exact in any place of a batch (see `stacked.WHOLE`).
Each result is checked for its number of rows."""


class UnsupportedModelError(ValueError):
    """A model whose copies cannot run side by side, and why."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.modules.batchnorm._NormBase) or super().is_leaf_module(
            m, module_qualified_name
        )


def trace(module: nn.Module) -> fx.Graph:
    """Return the forward pass of `module` in training as a graph.

    Raises:
        UnsupportedModelError: it cannot be traced, a trace would not hold for every pass, or it has an
            operation that may couple examples or round by position.
    """
    module = copy.deepcopy(module).train()  # what a trace leaves in a module would stay there
    if any(_is_changed(layer) for layer in module.modules()):
        raise UnsupportedModelError("a layer has hooks, or a forward of its own")
    before, draws = _plain_attributes(module), global_states()
    try:
        graph = _Tracer().trace(module)
    except Exception as error:
        raise UnsupportedModelError(f"its forward pass cannot be traced ({first_line(error)})") from error
    if global_states() != draws or _plain_attributes(module) != before:
        raise UnsupportedModelError("its forward pass draws at random, or counts, outside of layers")
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise UnsupportedModelError("its forward pass takes more than the images")
    for node in graph.nodes:
        _check_node(node)
    called = {
        name for layer in _called(graph) for name, _ in module.get_submodule(layer).named_buffers(layer)
    }
    if any(name not in called for name, _ in module.named_buffers()):
        raise UnsupportedModelError("it has buffers outside of the layers that it calls")
    uses = [id(p) for name in _called(graph) for p in module.get_submodule(name).parameters()]
    if len(uses) != len(set(uses)):
        raise UnsupportedModelError("two calls of layers share a parameter")
    if any(p.requires_grad and id(p) not in uses for p in module.parameters()):
        raise UnsupportedModelError("its forward pass does not use all parameters")
    return graph


def _is_changed(layer: nn.Module) -> bool:
    """Return whether a call of `layer` does more than the forward method of its class."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in vars(layer)


def _called(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def _plain_attributes(module: nn.Module) -> list[dict[str, object]]:
    plain = (bool, int, float, str)
    return [{k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in module.modules()]


def _check_node(node: fx.Node) -> None:
    name = getattr(node.target, "__name__", str(node.target))
    if node.op == "call_module" and (node.kwargs or len(node.args) != 1 or not node.users):
        raise UnsupportedModelError(
            f"its forward pass calls {name!r} with keywords, or does not use the result"
        )
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


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, shortened."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
