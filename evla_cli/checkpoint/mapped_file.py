"""Tensors that are views of a memory-mapped file: nothing is read before it is used, nothing is copied."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from evla_cli.checkpoint.tensors import LazyTensor
from evla_cli.errors import EvlaError

ALIGNMENT = 64  # bytes at which files written here start their data, as torch.save does: kernels like borders
_MAX_ELEMENTS = 2**63 // 8  # beyond it torch's own arithmetic of sizes and strides overflows, for empty tensors too


class MappedFile:
    """One file, mapped privately (copy on write) on first use."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = file.seek(0, 2)
        except OSError as error:
            raise EvlaError(f"Cannot read {path}: {error.strerror}.") from error
        self._map: mmap.mmap | None = None
        self.on_use: Callable[[MappedFile, int], None] | None = None  # told of the byte at which a tensor begins

    def tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int, limit: int) -> LazyTensor:
        """The row-major tensor at byte `offset`, which must end before byte `limit`."""
        if prod(length or 1 for length in shape) > _MAX_ELEMENTS:
            raise EvlaError(f"{self.path.name} is corrupt: {name} has a shape that no tensor can have.")
        num_bytes = prod(shape) * dtype.itemsize
        if offset < 0 or offset + num_bytes > min(limit, self.size):
            raise EvlaError(
                f"{self.path.name} is truncated or corrupt: {name} ({num_bytes} bytes) runs past the end of its data."
            )
        return LazyTensor(dtype, shape, partial(self._view, dtype, shape, offset), self)

    def unmap(self, begin: int, size: int) -> None:
        """The mapping lets go of these pages, which are read from the file again if they are used again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, min(size, self.size - begin))

    def _view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
        count = prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if self._map is None:
            with open(self.path, "rb") as file:
                if file.seek(0, 2) != self.size:
                    raise EvlaError(f"{self.path} changed while it was being read; run the command again.")
                # Private and writable rather than read-only: torch warns about buffers that it could not write to.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if self.on_use is not None:
            self.on_use(self, offset)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)
