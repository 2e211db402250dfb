"""Normalisation layers: one kind for another, and batch norm over the ranks of a client group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

Norm = Literal["keep", "batch", "group", "sync"]
GroupSum = Callable[[Tensor], Tensor]
"""Differentiable sum of a tensor over the ranks that train one client."""


class SyncedBatchNorm(_BatchNorm):
    """Batch norm whose statistics are those of the whole batch over the ranks of the client group.

    Equal to one batch norm over the joined batch, also when ranks hold different numbers of
    examples. Parameters and buffers have the names that `nn.BatchNorm2d` gives them. Collective
    over the group in training mode, local in evaluation mode. Takes (b, C, ...) of any float dtype.
    """

    idle: bool = False
    """True while this rank holds no real example (see `set_idle`): its input then weighs nothing."""

    def __init__(
        self,
        channels: int,
        group_sum: GroupSum | None = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        """Make the layer; without `group_sum` it is a batch norm that takes a batch of one value."""
        super().__init__(channels, eps, momentum, affine, track_running_stats)
        # A function, not the bound method of a world: deepcopy must not copy process groups.
        self._group_sum: GroupSum = lambda tensor: group_sum(tensor) if group_sum else tensor

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, (b, C, ...), channel by channel; same shape and dtype."""
        if not self.training:
            return F.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=self.running_mean is None,
                eps=self.eps,
            )
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        per_channel = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        real = 0.0 if self.idle else 1.0
        count = x.new_full((1,), real * x.numel() / x.shape[1])
        total = self._group_sum(torch.cat([x.sum(dims) * real, count]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        # The mean comes first, in a sum of its own: the mean of squares minus the squared mean
        # loses the variance to rounding where the mean is large.
        centred = x - mean.view(per_channel)
        variance = self._group_sum(centred.square().sum(dims) * real) / count
        self._track(mean.detach(), variance.detach(), count)
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        result = centred * scale.view(per_channel)
        if self.bias is not None:
            result = result + self.bias.view(per_channel)
        return result.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum or 1.0 / float(self.num_batches_tracked)
        if self.momentum is not None:
            momentum = self.momentum
        unbiased = variance * count / (count - 1).clamp_min(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (b, C, ...) will do."""


def set_idle(module: nn.Module, idle: bool) -> None:
    """Say whether this rank's batch is a stand-in, which synchronised batch norms must not count."""
    for layer in module.modules():
        if isinstance(layer, SyncedBatchNorm):
            layer.idle = idle


def convert_norm(module: nn.Module, norm: Norm, group_sum: GroupSum | None = None) -> nn.Module:
    """Replace the batch and group norms of `module` in place, keeping weights and statistics.

    Args:
        module: the model; its layer norms and instance norms stay as they are.
        norm: "batch" for batch norm per rank, "sync" for batch norm over the ranks of the client
            group, "group" for group norm (which has no statistics to keep), "keep" for no change.
        group_sum: for "sync"; None where a client trains on one rank.

    Returns:
        `module`, or its replacement where it is itself a norm layer.
    """
    if norm == "keep":
        return module
    converted: dict[nn.Module, nn.Module] = {}  # so that a layer used twice stays one layer
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm | nn.GroupNorm):
                if child not in converted:
                    converted[child] = _converted(child, norm, group_sum)
                parent._modules[name] = converted[child]
    if isinstance(module, _BatchNorm | nn.GroupNorm):
        return _converted(module, norm, group_sum)
    return module


def _converted(
    old: _BatchNorm | nn.GroupNorm, norm: Norm, group_sum: GroupSum | None
) -> nn.Module:
    channels = old.num_features if isinstance(old, _BatchNorm) else old.num_channels
    affine, momentum = old.affine, getattr(old, "momentum", 0.1)
    track = getattr(old, "track_running_stats", True)
    new: nn.Module
    if norm == "group":
        if isinstance(old, nn.GroupNorm):
            return old
        new = nn.GroupNorm(group_count(channels), channels, old.eps, affine)
    elif norm == "sync":
        new = SyncedBatchNorm(
            channels,
            group_sum,
            eps=old.eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track,
        )
    elif isinstance(old, _BatchNorm) and not isinstance(old, SyncedBatchNorm):
        return old
    else:
        new = nn.BatchNorm2d(channels, old.eps, momentum, affine, track)
    new.load_state_dict(old.state_dict(), strict=False)  # what both kinds have
    for name, parameter in old.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return new.to(next(iter(old.state_dict().values()), torch.empty(0)).device).train(old.training)


def group_count(channels: int) -> int:
    """Return how many groups group norm makes of `channels`: at most 32, each of 8 or more.

    Groups of one or two channels would wipe out 1 x 1 maps, which small images end in.
    """
    return max(
        groups
        for groups in range(1, 33)
        if channels % groups == 0 and (groups == 1 or channels // groups >= 8)
    )


def norm_parameters(module: nn.Module) -> set[str]:
    """Return the names of the parameters that belong to normalisation layers of any kind."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return {
        name
        for name, _ in module.named_parameters()
        if isinstance(module.get_submodule(name.rpartition(".")[0]), kinds)
    }
