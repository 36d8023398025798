"""Hash files in the background, a little ahead of who uses them, and clear up behind.

One read from the disk serves the hash and the work, which finds in the page cache what was just read. What was not
there before is dropped again once it was used. So a checkpoint of any size takes a bounded part of the page cache and
leaves what other programs have in it; and the system hands out the same pages again, which can be ten times as fast as
clearing new ones.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evla_cli.checkpoint.files import Stamp, file_stamp
from evla_cli.checkpoint.page_cache import ColdRegions
from evla_cli.checkpoint.system import expect_sequential_reads, physical_bytes
from evla_cli.errors import EvlaError

if TYPE_CHECKING:
    from evla_cli.checkpoint.mapped_file import MappedFile

_CHUNK_BYTES = 2**20  # what the processor's cache holds between reading and hashing
_NUM_RECENT = 32  # tensors that the work may still need: those of the layer that is computed and of the next
# How far the hash runs ahead of the oldest of those tensors: far enough that the disk need not wait for a layer to be
# computed, or at the start for libraries to be imported; near enough that what was read is still in the page cache when
# the work comes to it.
_AHEAD_BYTES = 9 * 2**28
_START_BYTES = min(4 * 2**30, (physical_bytes() or 6 * 2**30) // 6)


class ReadAheadHash:
    """SHA-256 of files, read front to back, one after the other, by a thread of its own.

    The thread stays a bounded number of bytes ahead of the work, which is where `follow`ed files were used last.
    `read_bytes` is how far it is.

    Args:
        known: hashes of some of the files, which are read ahead all the same.
    """

    def __init__(
        self,
        files: Sequence[Path],
        ahead_bytes: int = _AHEAD_BYTES,
        start_bytes: int = _START_BYTES,
        known: dict[Path, str] | None = None,
    ):
        self._files = files
        sizes = [path.stat().st_size for path in files]
        self._starts = dict(zip(files, accumulate(sizes, initial=0), strict=False))
        self._ahead_bytes, self._allowed = ahead_bytes, start_bytes
        self._lock = threading.Lock()
        self._used: deque[int] = deque(maxlen=_NUM_RECENT)  # bytes, of all files together, at which the work was
        self._cold: dict[Path, ColdRegions] = {}
        self._followed: list[MappedFile] = []
        self._drop_behind = True
        self.read_bytes = 0
        self._hurry = threading.Event()
        self._stopped = False
        self._digests = {path: digest for path, digest in (known or {}).items() if path in self._starts}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="evla-read-ahead", daemon=True)
        self._thread.start()

    def follow(self, files: Iterable[MappedFile], drop_behind: bool = True) -> None:
        """The work is where these files are asked for tensors; what lies behind it is dropped from the page cache.

        Args:
            drop_behind: False where the work will use it again: then `drop` it afterwards.
        """
        self._drop_behind = drop_behind
        self._followed = [file for file in files if file.path in self._starts]
        for file in self._followed:
            file.on_use = self._use

    def drop(self) -> None:
        """Everything that was followed leaves the page cache, but what was in it before."""
        for file in self._followed:
            if file.path in self._cold:
                self._cold[file.path].drop_all(file)

    def stop(self) -> None:
        """Read no further: nobody waits for the hashes."""
        self._stopped = True
        self._hurry.set()
        self._thread.join()

    def digests(self) -> dict[Path, str]:
        """The hash of every file. Waits for the thread, which stops waiting for anybody. Errors: OSError."""
        self._hurry.set()
        while self._thread.is_alive():
            self._thread.join(0.2)  # a plain join would not let an interrupt through
        if self._error is not None:
            raise self._error
        return self._digests

    def _use(self, file: MappedFile, offset: int) -> None:
        start = self._starts[file.path]
        with self._lock:
            self._used.append(start + offset)
            # The work's order is the files', more or less: a part that lies elsewhere must not look like progress.
            done = min(self._used)
            self._allowed = max(self._allowed, done + self._ahead_bytes)
            if self._drop_behind and file.path in self._cold:
                self._cold[file.path].drop_before(min(done, self.read_bytes) - start, file)

    def _run(self) -> None:
        try:
            for path in self._files:
                with open(path, "rb", buffering=0) as file:
                    self._cold[path] = ColdRegions(path)
                    digest = self._hash(file, self._cold[path], None if path in self._digests else hashlib.sha256())
                self._digests.setdefault(path, digest)
        except OSError as error:
            self._error = error

    def _hash(self, file: FileIO, cold: ColdRegions, digest: Any) -> str:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        expect_sequential_reads(file.fileno())
        position = 0
        while not self._stopped and (count := file.readinto(buffer)):
            if digest is not None:
                digest.update(buffer[:count])
            position += count
            self.read_bytes += count
            # What is in memory already takes no more of it; there is no reason to wait.
            while self.read_bytes > self._allowed and cold.covers(position) and not self._hurry.wait(0.02):
                pass
        return "" if digest is None else digest.hexdigest()


_early: list[tuple[dict[Path, Stamp], ReadAheadHash]] = []  # at most one


def start_early(source: Path) -> None:
    """Begin with what will be the weights of a checkpoint, before the libraries are imported that can open it."""
    _early.clear()
    with suppress(OSError, EvlaError):  # whatever is wrong with it, opening it will tell
        files = [source] if source.is_file() else sorted((source / "checkpoints").glob("*.pt"))
        files = files or sorted(source.glob("model-*-of-*.safetensors"))  # not those of an adapter, or another layout
        files = files or list(source.glob("model.safetensors"))
        if files:
            _early.append(({path: file_stamp(path) for path in files}, ReadAheadHash(files)))


def started_early(stamps: dict[Path, Stamp]) -> ReadAheadHash | None:
    """What was begun with these files, if they were then what they are now. Each is given out once."""
    begun = [ahead for early, ahead in _early if early == stamps]
    _early.clear()
    return begun[0] if begun else None
