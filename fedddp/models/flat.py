"""A model's state as flat vectors: parameters, gradients and buffers are one tensor each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


class FlatModel:
    """A module whose trainable parameters, gradients and buffers are views into flat vectors.

    Frozen parameters stay in the module. Tied parameters are stored once. Persistent buffers of another
    dtype than their vector's are copied: `load` writes them, `read_buffers` reads them back. Complex and
    non-persistent buffers are constants: `load` resets them, so that no client sees another's.

    Attributes:
        module: the module itself; it trains, and works under DDP, as before.
        params: trainable parameters, shape (P,), their common dtype.
        grad: their gradients, shape (P,); zero it instead of setting gradients to None. Empty once dropped.
        buffers: floating-point buffers such as running statistics, shape (B,), float32 (float64 in a
            float64 model); those of the vector's dtype are views.
        integer_buffers: integer and bool buffers such as `num_batches_tracked`, int64, shape (I,); int64
            ones are views.
        slices: where each parameter lies in `params`, by name in `module.named_parameters()`.
    """

    def __init__(self, module: nn.Module) -> None:
        """Re-home the state of `module` (already on its device and in its memory format).

        Raises:
            ValueError: nothing to train, or trainable parameters of different dtypes or devices.
        """
        self.module = module
        self._trained = named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("the model has no trainable parameter; unfreeze some (model.freeze)")
        kinds = {(p.dtype, p.device) for p in named.values()}
        if len(kinds) > 1:
            raise ValueError(f"trainable parameters must share one dtype and device, got {kinds}")
        self.slices = _slices(named.values(), named)
        self.params = _rehome(list(named.values()))
        self.grad = torch.zeros_like(self.params)
        for (name, parameter), view in zip(
            named.items(), _views(self.grad, list(named.values())), strict=True
        ):
            assert self.slices[name].stop <= self.params.numel()
            parameter.grad = view
        self._persistent = saved = module.state_dict(keep_vars=True).keys()
        for buffer in module.buffers():
            if 0 in buffer.stride():  # its elements share memory, which cannot be written
                buffer.data = buffer.detach().clone(memory_format=torch.contiguous_format)
        buffers = {name: b for name, b in module.named_buffers() if name in saved and not b.is_complex()}
        self._floats = {name: b for name, b in buffers.items() if b.is_floating_point()}
        integers = [b for b in buffers.values() if not b.is_floating_point()]
        self._copied: list[tuple[Tensor, Tensor, Tensor]] = []
        floating = torch.float64 if self.params.dtype == torch.float64 else torch.float32
        self.buffers = self._rehome_buffers(list(self._floats.values()), floating)
        self.integer_buffers = self._rehome_buffers(integers, torch.int64)
        self._constants = {
            name: (buffer, buffer.detach().clone())
            for name, buffer in module.named_buffers()
            if name not in buffers
        }

    def _rehome_buffers(self, buffers: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Return a vector of `buffers`: views of it where they have its dtype, else to be copied."""
        stand_ins = [b if b.dtype == dtype else b.to(dtype) for b in buffers]
        flat = _rehome(stand_ins, self.params.device, dtype)
        pairs = zip(buffers, stand_ins, strict=True)
        self._copied += [(b, view, b.detach().clone()) for b, view in pairs if b.dtype != dtype]
        return flat

    def load(self, params: Tensor, buffers: Tensor, integer_buffers: Tensor) -> None:
        """Copy a model's state into the module, and reset its constant buffers."""
        self.params.copy_(params)
        self.load_buffers(buffers, integer_buffers)
        for buffer, constant in self._constants.values():
            buffer.copy_(constant)

    def load_buffers(self, buffers: Tensor, integer_buffers: Tensor) -> None:
        """Copy buffers (B,) and integer buffers (I,) into the module."""
        self.buffers.copy_(buffers)
        self.integer_buffers.copy_(integer_buffers)
        for buffer, view, initial in self._copied:
            # A constant such as a float64 table keeps the digits that its vector does not hold.
            buffer.copy_(torch.where(view == initial.to(view.dtype), initial, view.to(buffer.dtype)))

    def read_buffers(self) -> None:
        """Update the vectors from the buffers that are not views, after the module has changed them."""
        for buffer, view, _ in self._copied:
            view.copy_(buffer)

    def check_constants(self) -> None:
        """Refuse a model whose training changes a buffer of a type that is not exchanged.

        Raises:
            ValueError: the buffer, and its type.
        """
        for name, (buffer, constant) in self._constants.items():
            if name in self._persistent and not torch.equal(buffer, constant):
                raise ValueError(
                    f"the model's buffer {name!r}, of type {buffer.dtype}, changes in training, but only "
                    "floating-point, integer and bool buffers are exchanged between clients; register it "
                    "as one of these, or with persistent=False"
                )

    def named(self, params: Tensor, buffers: Tensor) -> dict[str, Tensor]:
        """Return `params` (P,) and `buffers` (B,) cut up under the module's names, for `functional_call`."""
        views = _views(params, list(self._trained.values()))
        floats = _views(buffers, list(self._floats.values()))
        views += [v.to(b.dtype) for v, b in zip(floats, self._floats.values(), strict=True)]
        return dict(zip([*self._trained, *self._floats], views, strict=True))

    def drop_gradients(self) -> None:
        """Let go of the gradients, where training takes its steps without them; `grad` is empty then."""
        self.grad = self.grad.new_empty(0)
        for parameter in self._trained.values():
            parameter.grad = None

    def rows(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return a batch of `values` of every trainable parameter, each (b, ...), as vectors (b, P)."""
        pieces = [
            (values[name] if parameter.is_contiguous() else values[name].movedim(2, -1)).flatten(1)
            for name, parameter in self._trained.items()
        ]
        return torch.cat(pieces, dim=1)

    def mask(self, names: Iterable[str]) -> Tensor:
        """Return which elements of `params` belong to the parameters `names`; (P,) bool."""
        chosen = torch.zeros_like(self.params, dtype=torch.bool)
        for name in names:
            chosen[self.slices[name]] = True
        return chosen


def _slices(tensors: Iterable[Tensor], names: Iterable[str]) -> dict[str, slice]:
    slices, offset = {}, 0
    for name, tensor in zip(names, tensors, strict=True):
        slices[name] = slice(offset, offset + tensor.numel())
        offset += tensor.numel()
    return slices


def _rehome(
    tensors: list[Tensor], device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Copy `tensors` into one new vector and turn them into views of it; returns the vector."""
    if not tensors:
        return torch.empty(0, dtype=dtype, device=device)
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    for tensor, view in zip(tensors, _views(flat, tensors), strict=True):
        view.copy_(tensor.detach())
        tensor.data = view
    return flat


def _views(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Cut `flat` into views shaped, and laid out in memory, like `tensors`."""
    views, offset = [], 0
    for tensor in tensors:
        piece = flat[offset : offset + tensor.numel()]
        # With their strides: those of a weight (n, 1, h, w) are all that differs between the two layouts, and
        # kernels go by them, so that maps behind a first layer of one channel have the layout of the others.
        dense = tensor.is_contiguous() or (
            tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        )
        views.append(piece.as_strided(tensor.shape, tensor.stride()) if dense else piece.view(tensor.shape))
        offset += tensor.numel()
    return views


@contextlib.contextmanager
def tensors_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put the values of `tensors` back after the block."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in before:
            tensor.data.copy_(value)


def norm(vector: Tensor) -> Tensor:
    """Return the Euclidean norm of `vector` as a float64 scalar, in which no finite float32 vector overflows.

    The one place that will know about shards.
    """
    length: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return length
