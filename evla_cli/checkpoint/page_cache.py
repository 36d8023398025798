"""Which parts of a file the system holds in its page cache, and how to let go of those that it did not hold before."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from evla_cli.checkpoint.system import c_function, drop_from_page_cache

if TYPE_CHECKING:
    from evla_cli.checkpoint.mapped_file import MappedFile

_REGION_BYTES = 2**24  # dropped at once, unless one of its pages was in the page cache before


class ColdRegions:
    """The parts of a file of which nothing is in the page cache now."""

    def __init__(self, path: Path):
        self._path = path
        self._cold = _absent(path)
        self._next = 0  # region

    def covers(self, position: int) -> bool:
        """Whether the byte at `position` lies in one of them."""
        region = position // _REGION_BYTES
        return region < len(self._cold) and self._cold[region]

    def drop_all(self, file: MappedFile) -> None:
        self.drop_before(len(self._cold) * _REGION_BYTES, file)

    def drop_before(self, end: int, file: MappedFile) -> None:
        """Those before byte `end` leave the page cache; they are read again if they are used again."""
        first, self._next = self._next, max(self._next, end // _REGION_BYTES)
        regions = [region for region in range(first, self._next) if self._cold[region]]
        if not regions:
            return
        with suppress(OSError), open(self._path, "rb") as descriptor:
            for region in regions:
                begin = region * _REGION_BYTES
                file.unmap(begin, _REGION_BYTES)
                drop_from_page_cache(descriptor.fileno(), begin, _REGION_BYTES)


def _absent(path: Path) -> list[bool]:
    """By region, whether none of its pages is in the page cache; nowhere where the system does not tell."""
    mincore = c_function("mincore")
    size = path.stat().st_size
    per_region = _REGION_BYTES // mmap.PAGESIZE
    begins = range(0, -(-size // mmap.PAGESIZE), per_region)
    if mincore is None or size == 0:
        return [False] * len(begins)
    pages = bytearray(-(-size // mmap.PAGESIZE))  # one a page; not 0: in memory
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapping:
        anchor, answer = (ctypes.c_char.from_buffer(memory) for memory in (mapping, pages))
        failed = mincore(ctypes.byref(anchor), ctypes.c_size_t(size), ctypes.byref(answer))
        del anchor, answer  # or neither could be closed
    if failed:
        return [False] * len(begins)
    return [not any(pages[begin : begin + per_region]) for begin in begins]
