"""The model of a client as a client group trains it: in DDP where it has several ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedddp.distributed.world import World
from fedddp.rng import drawing_from, global_states

TRIAL_PASSES = 17
"""Most passes that look for parameters without a gradient: one in evaluation mode, others in training."""


def replicate(world: World, module: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Collective over the group. Wrap `module` in DDP if R > 1, and let it build its buckets first.

    DDP reorders its buckets after its first backward pass, and a sum over three ranks or more can
    depend on that order: a resumed run would differ from one that was never stopped.

    Args:
        world: of the group.
        module: the model, on its device.
        shape: of an image, (C, H, W).
    """
    if world.ranks_per_client == 1 or world.group is None:
        return module
    module = module.eval()
    images = torch.zeros(2, *shape, device=world.device)
    replica = world.replicate(module, some_unused=_some_unused(world, module, images))
    for _ in range(2):
        (replica(images).sum() * 0).backward()
    return replica


def _some_unused(world: World, module: nn.Module, images: Tensor) -> bool:
    """Collective over the group. Return whether a parameter can be without a gradient, on any rank.

    A model without dropout that draws in training may skip layers, however seldom; with dropout several
    passes look for it. Training passes draw and update running statistics, so both are restored.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    buffers = [buffer.clone() for buffer in module.buffers()]
    dropout = any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in module.modules())
    with drawing_from("trial", 0):
        for number in range(TRIAL_PASSES):
            module.train(number > 0)
            before = global_states()
            grads = torch.autograd.grad(module(images).sum(), trained, allow_unused=True)
            drew = global_states() != before
            unused = any(grad is None for grad in grads) or (drew and not dropout)
            if unused or (number > 0 and not drew):  # every training pass is alike
                break
    for buffer, value in zip(module.buffers(), buffers, strict=True):
        buffer.data.copy_(value)
    module.eval()
    decision = torch.tensor([int(unused)], device=world.device)
    world.group_max(decision)
    return bool(decision)
