"""Named tensors that are read only when they are needed: the currency between readers, pruning and writers."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from evla_cli.errors import EvlaError


@dataclass(frozen=True)
class LazyTensor:
    """What a tensor is and how to get it. `load` may return a view of a mapped file: do not write to it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def map(self, shape: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> "LazyTensor":
        """The same dtype after `function`, which must give `shape`."""
        return LazyTensor(self.dtype, shape, lambda: function(self.load()))

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return LazyTensor(dtype, self.shape, lambda: self.load().to(dtype))


LazyTensors = dict[str, LazyTensor]


def load_finite(name: str, lazy: LazyTensor) -> Tensor:
    """The tensor itself, refused if it holds a NaN or an infinity: a robot must not act on one."""
    tensor = lazy.load()
    if tensor.shape != lazy.shape or tensor.dtype != lazy.dtype:
        raise AssertionError(f"{name} loads as {tensor.dtype} {tuple(tensor.shape)}, announced as {lazy}")
    if tensor.dtype.is_floating_point and not all(
        bool(part.isfinite().all()) for part in tensor.flatten().split(2**24)
    ):
        raise EvlaError(f"{name} holds NaN or infinite values: the checkpoint is damaged or its training diverged.")
    return tensor


def total_bytes(tensors: LazyTensors) -> int:
    return sum(tensor.num_bytes for tensor in tensors.values())


def total_elements(tensors: LazyTensors) -> int:
    return sum(tensor.num_elements for tensor in tensors.values())
