"""Hash files in the background, a little ahead of who uses them: one read from disk serves the hash and the work."""

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

_CHUNK_BYTES = 2**20  # what the processor's cache holds between reading and hashing
# How far the hash runs ahead of the work. Far enough that the disk never waits for a layer to be computed, near enough
# that what was read is still in the page cache when the work comes to it.
_AHEAD_BYTES = 2 * 2**30


class ReadAheadHash:
    """SHA-256 of files, read front to back, one after the other, by a thread of its own.

    The thread stays a bounded number of bytes ahead of the work, whose progress `advance` tells. `read_bytes` is how
    far it is.
    """

    def __init__(self, files: Sequence[Path], ahead_bytes: int = _AHEAD_BYTES):
        self._files, self._ahead_bytes = files, ahead_bytes
        self._total_bytes = sum(path.stat().st_size for path in files)
        self._progress = 0.0
        self.read_bytes = 0
        self._hurry = threading.Event()
        self._digests: dict[Path, str] = {}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="evla-read-ahead", daemon=True)
        self._thread.start()

    def advance(self, fraction: float) -> None:
        """So much more of the work is done, as a fraction of all of it."""
        self._progress += fraction

    def digests(self) -> dict[Path, str]:
        """The hash of every file. Waits for the thread, which stops waiting for anybody. Errors: OSError."""
        self._hurry.set()
        while self._thread.is_alive():
            self._thread.join(0.2)  # a plain join would not let an interrupt through
        if self._error is not None:
            raise self._error
        return self._digests

    def _allowed_bytes(self) -> float:
        return self._progress * self._total_bytes + self._ahead_bytes

    def _run(self) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        try:
            for path in self._files:
                digest = hashlib.sha256()
                with open(path, "rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    while count := file.readinto(buffer):
                        digest.update(buffer[:count])
                        self.read_bytes += count
                        while self.read_bytes > self._allowed_bytes() and not self._hurry.wait(0.02):
                            pass
                self._digests[path] = digest.hexdigest()
        except OSError as error:
            self._error = error
