"""The forward pass of a model as a graph, if it is the same in every pass of training."""

from __future__ import annotations

import copy

from torch import fx, nn

from fedddp.rng import global_states


class UnsupportedModelError(ValueError):
    """A model that cannot be traced, and why."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.modules.batchnorm._NormBase) or super().is_leaf_module(
            m, module_qualified_name
        )


def trace(module: nn.Module) -> fx.Graph:
    """Return the forward pass of `module` in training as a graph.

    Raises:
        UnsupportedModelError: it cannot be traced, or a trace would not hold for every pass.
    """
    # In a copy, as what a trace leaves in a module would stay there; it leaves parameters alone.
    module = copy.deepcopy(module, {id(p): p for p in module.parameters()}).train()
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
    if node.op == "get_attr":
        raise UnsupportedModelError(f"it uses {name!r} outside of a layer")
    if node.op not in ("placeholder", "output") and not node.users:
        raise UnsupportedModelError(f"its forward pass does not use the result of {name!r}")
    if node.op == "call_method" and name.endswith("_"):
        raise UnsupportedModelError(f"its forward pass changes a tensor in place, by {name!r}")
    if node.op == "output" and not isinstance(node.args[0], fx.Node):
        raise UnsupportedModelError("its forward pass does not return one tensor")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
