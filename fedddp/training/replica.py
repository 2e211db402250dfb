"""The model of a client as a client group trains it: in DDP where it has several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedddp.data.loader import Batch
from fedddp.distributed.world import World
from fedddp.models.flat import tensors_kept
from fedddp.rng import drawing_from, global_states
from fedddp.tasks import Task

TRIAL_PASSES = 17
"""Most passes that look for parameters without a gradient: one in evaluation mode, others in training."""


def in_float32(outputs: Any) -> Any:
    """Return `outputs` of a module, tensors in dicts, lists and tuples, with floating ones as float32."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, Mapping):
        return {name: in_float32(value) for name, value in outputs.items()}
    return tuple(map(in_float32, outputs)) if isinstance(outputs, list | tuple) else outputs


def replicate(world: World, module: nn.Module, task: Task, batch: Batch) -> nn.Module:
    """Collective over the group. Wrap `module` in DDP if R > 1, and let it build its buckets first.

    DDP reorders its buckets after its first backward pass, and a sum over three ranks or more can
    depend on that order: a resumed run would differ from one that was never stopped.

    Args:
        world: of the group.
        module: the model, on its device.
        task: what calls the model.
        batch: of blank images, to try it with.
    """
    if world.ranks_per_client == 1 or world.group is None:
        return module
    module = module.eval()
    replica = world.replicate(module, some_unused=_some_unused(world, module, task, batch))
    for _ in range(2):
        (_sum(task.forward(replica, batch)) * 0).backward()  # type: ignore[no-untyped-call]
    return replica


def _sum(outputs: Any) -> Tensor:
    """Return the sum of all tensors in `outputs` that have a gradient."""
    if isinstance(outputs, Tensor):
        return outputs.sum() if outputs.requires_grad else torch.zeros((), device=outputs.device)
    values = list(outputs.values() if isinstance(outputs, Mapping) else outputs)
    return torch.stack([_sum(value) for value in values]).sum()


def _some_unused(world: World, module: nn.Module, task: Task, batch: Batch) -> bool:
    """Collective over the group. Return whether a parameter can be without a gradient, on any rank.

    A model without dropout that draws in training may skip layers, however seldom; with dropout several
    passes look for it. Training passes draw and update running statistics, so both are restored.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    dropout = any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in module.modules())
    with drawing_from("trial", 0), tensors_kept(module.buffers()):
        for number in range(TRIAL_PASSES):
            module.train(number > 0)
            before = global_states()
            grads = torch.autograd.grad(_sum(task.forward(module, batch)), trained, allow_unused=True)
            drew = global_states() != before
            unused = any(grad is None for grad in grads) or (drew and not dropout)
            if unused or (number > 0 and not drew):  # every training pass is alike
                break
    module.eval()
    decision = torch.tensor([int(unused)], device=world.device)
    world.group_max(decision)
    return bool(decision)
