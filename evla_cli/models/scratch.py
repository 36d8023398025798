"""Tensors in an unnamed file: memory that the system can write out when it needs the room, and read back.

Those of another device come to stand in it as tensors of the CPU; `move` brings them back for the time of their use.
"""

import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evla_cli.checkpoint.system import reserve
from evla_cli.errors import EvlaError

_REGION_BYTES = 256 * 2**20
_ALIGNMENT = 64


class Scratch:
    """Holds what is given to it in memory up to a budget, the rest in a file in the directory for temporary files.

    The file has no name, so nothing stays behind however the process ends. Its room on the disk is taken before it is
    used: a full disk is an error here and not a crash later.
    """

    def __init__(self, memory_budget: int):
        self._left = memory_budget
        self._file: Any = None
        self._region: mmap.mmap | None = None
        self._used = 0

    def hold(self, value: Any) -> Any:
        """`value` (nested tuples, lists and dicts) with its tensors where there is room for them, equal ones once."""
        tensors = {id(tensor): tensor for tensor in _tensors(value)}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size <= self._left:
            self._left -= size
            return value
        self._left = 0  # later ones are no smaller, as a rule: one boundary between memory and file
        return _replace(value, {key: self._in_file(tensor) for key, tensor in tensors.items()})

    def _in_file(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor
        begin = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if self._region is None or begin + tensor.nbytes > len(self._region):
            self._region, begin = self._new_region(max(_REGION_BYTES, tensor.nbytes)), 0
        self._used = begin + tensor.nbytes
        held = torch.frombuffer(self._region, dtype=tensor.dtype, count=tensor.numel(), offset=begin)
        return held.view(tensor.shape).copy_(tensor)

    def _new_region(self, size: int) -> mmap.mmap:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the mapped tensors
            size = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            begin = os.fstat(self._file.fileno()).st_size
            reserve(self._file.fileno(), begin, size)
            return mmap.mmap(self._file.fileno(), size, offset=begin)
        except OSError as error:
            raise EvlaError(
                f"No room for hidden states in {tempfile.gettempdir()} ({error.strerror}): set TMPDIR to a directory "
                "on a larger disk, raise --memory-budget, or use fewer samples."
            ) from error


def move(value: Any, device: torch.device | str) -> Any:
    """`value` (nested tuples, lists and dicts) with its tensors on `device`; those that are there stay as they are."""
    return _replace(value, {id(tensor): tensor.to(device) for tensor in _tensors(value)})


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (tuple, list)) else []


def _replace(value: Any, tensors: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return tensors[id(value)]
    if isinstance(value, Mapping):
        return {key: _replace(part, tensors) for key, part in value.items()}
    return type(value)(_replace(part, tensors) for part in value) if isinstance(value, (tuple, list)) else value
