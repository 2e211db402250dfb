"""Normalisation layers: one kind for another, and batch norm over the ranks of a client group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

Norm = Literal["keep", "batch", "group", "sync", "frozen"]
GroupSum = Callable[[Tensor], Tensor]
"""Differentiable sum of a tensor over the ranks that train one client."""


class BatchNorm(_BatchNorm):
    """Batch norm that also trains on a batch with one value per channel, which torch refuses.

    Such a batch (one example, in a layer of 1 x 1 maps) is normalised with the running statistics
    and leaves them as they are. Clients of any size have one as the last batch of an epoch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, (b, C, ...), channel by channel; same shape and dtype."""
        if not self.training or input.numel() > input.shape[1] or self.running_mean is None:
            return super().forward(input)
        return _with_running_statistics(self, input)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (b, C, ...) will do."""


class SyncedBatchNorm(_BatchNorm):
    """Batch norm over the whole batch of a client, which its ranks share.

    Equal to one `BatchNorm` over the joined batch, also when ranks hold different numbers of
    examples. Parameters and buffers have the names that `nn.BatchNorm2d` gives them. Collective
    over the group in training mode, local in evaluation mode. Takes (b, C, ...) of any float dtype.
    """

    is_padding: bool = False
    """Set to True while this rank's batch is a padding example: it then has weight 0, but takes part."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make the layer with the arguments of `nn.BatchNorm2d`, for one rank until `synchronize`."""
        super().__init__(*args, **kwargs)
        self._group_sum: GroupSum = lambda tensor: tensor

    def synchronize(self, group_sum: GroupSum) -> None:
        """Share batches by the collective `group_sum`."""
        # No bound method of a world itself: deepcopy must not copy process groups.
        self._group_sum = lambda tensor: group_sum(tensor)  # noqa: PLW0108

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, (b, C, ...), channel by channel; same shape and dtype."""
        if not self.training:
            return _with_running_statistics(self, input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        channelwise = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        real = 0.0 if self.is_padding else 1.0
        own = x.new_full((1,), real * x.numel() / x.shape[1])
        total = self._group_sum(torch.cat([x.sum(dims) * real, own]))
        count = total[-1].detach()
        mean = total[:-1] / count
        # The mean comes first, in a sum of its own: the mean of squares minus the squared mean
        # loses the variance to rounding where the mean is large.
        squares = (x - mean.view(channelwise)).square().sum(dims)
        variance = self._group_sum(squares * real) / count
        if self.running_mean is not None and self.running_var is not None:
            mean = torch.where(count > 1, mean, self.running_mean)  # as `BatchNorm` does
            variance = torch.where(count > 1, variance, self.running_var)
            self._track(mean.detach(), variance.detach(), count)
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        result = (x - mean.view(channelwise)) * scale.view(channelwise)
        result = result if self.bias is None else result + self.bias.view(channelwise)
        return result.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_((count > 1).to(torch.int64))
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / max(float(self.num_batches_tracked), 1.0)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / (count - 1).clamp_min(1), momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (b, C, ...) will do."""


class FrozenBatchNorm(_BatchNorm):
    """Batch norm whose statistics, scale and shift are constants, in training too.

    Parameters and buffers have the names that `nn.BatchNorm2d` gives them; the parameters take no gradient.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make the layer with the arguments of `nn.BatchNorm2d`."""
        super().__init__(*args, **kwargs)
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, (b, C, ...), channel by channel; same shape and dtype."""
        return _with_running_statistics(self, input)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (b, C, ...) will do."""


def _with_running_statistics(layer: _BatchNorm, input: Tensor) -> Tensor:
    mean, variance = layer.running_mean, layer.running_var
    batch_statistics = mean is None  # the layer tracks none
    return F.batch_norm(input, mean, variance, layer.weight, layer.bias, batch_statistics, eps=layer.eps)


_KINDS: dict[Norm, tuple[type[nn.Module], ...]] = {
    "keep": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "batch": (_BatchNorm, nn.GroupNorm),
    "group": (_BatchNorm,),
    "sync": (_BatchNorm, nn.GroupNorm),
    "frozen": (_BatchNorm,),
}
"""Layers that each conversion replaces."""


def convert_norm(module: nn.Module, norm: Norm) -> None:
    """Replace the batch and group norms in `module`, in place, keeping weights and statistics.

    Args:
        module: the model; its layer norms and instance norms stay as they are.
        norm: "batch" for batch norm per rank, "sync" for batch norm over the ranks of the client,
            "group" for group norm, which has no statistics; "frozen" for batch norms that do not learn;
            "keep" for the kinds there are. Batch norms that torch refuses a batch of one value become
            `BatchNorm` in any case.
    """
    converted: dict[nn.Module, nn.Module] = {}  # so that a layer used twice stays one layer
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            # A model that was written for DDP synchronises over the whole world; a client has its own ranks.
            wanted = "sync" if norm == "keep" and isinstance(child, nn.SyncBatchNorm) else norm
            if isinstance(child, _KINDS[wanted]):
                if child not in converted:
                    converted[child] = _converted(child, wanted)
                parent._modules[name] = converted[child]


def synchronized(module: nn.Module, group_sum: GroupSum | None) -> nn.Module:
    """Return `module`, whose synced batch norms share batches by `group_sum`; None: with no other rank."""
    for layer in module.modules():
        if group_sum and isinstance(layer, SyncedBatchNorm):
            layer.synchronize(group_sum)
    return module


def _converted(old: nn.Module, norm: Norm) -> nn.Module:
    channels = old.num_channels if isinstance(old, nn.GroupNorm) else old.num_features
    assert isinstance(channels, int)
    options = {
        name: getattr(old, name)
        for name in ("eps", "momentum", "affine", "track_running_stats")
        if hasattr(old, name)
    }
    new: nn.Module
    if norm == "group":
        new = nn.GroupNorm(group_count(channels), channels, eps=options["eps"], affine=options["affine"])
    elif norm == "sync":
        new = SyncedBatchNorm(channels, **options)
    elif norm == "frozen":
        new = FrozenBatchNorm(channels, **options)
    else:
        new = BatchNorm(channels, **options)
    state = old.state_dict()
    floating = next((tensor for tensor in state.values() if tensor.is_floating_point()), None)
    if floating is not None:
        new.to(floating.device, floating.dtype)
    new.load_state_dict(state, strict=False)  # what both kinds have
    for name, parameter in old.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad and norm != "frozen")
    return new.train(old.training)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm of `channels`, in `group_count` groups."""
    return nn.GroupNorm(group_count(channels), channels)


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
