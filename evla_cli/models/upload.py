"""Weights to the device that computes, while it computes."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Upload:
    """Copies tensors to a device. On CUDA that happens on a stream of its own, from pinned memory.

    One thread calls `put` for all weights of a layer and then `done`; the thread that computes calls `wait` with what
    `done` gave it before it uses them. On other devices a copy is complete when `put` returns.
    """

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def put(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor on the device. It crosses the bus in the dtype that it is stored in."""
        if self._stream is None:
            return tensor.to(self._device, dtype)
        with torch.cuda.stream(self._stream):
            # The allocator of pinned memory keeps the copy's source until the stream has passed it.
            return tensor.pin_memory().to(self._device, non_blocking=True).to(dtype)

    def done(self) -> torch.cuda.Event | None:
        """What `wait` waits for: everything `put` until now."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, event: torch.cuda.Event | None, tensors: Iterable[Tensor]) -> None:
        """Let what is computed from now on see the tensors, without stopping this thread."""
        if event is None:
            return
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(computing)  # freed while work on it is queued, its memory is not given out again
