"""A new file, written front to back: hashed on the way, and on the disk when it is closed."""

import hashlib
import os
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

_CHUNK_BYTES = 8 * 2**20
_QUEUED_CHUNKS = 8
_SYNC_BYTES = 256 * 2**20  # written between two requests to the system to put it on the disk


class OutputFile:
    """Write with `write`; after the `with` block, `sha256` is the hash of the whole file.

    The caller makes the bytes, one thread hashes them, another pushes what was written to the disk, so that closing
    need not wait for all of it.
    """

    def __init__(self, path: Path):
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._digest = hashlib.sha256()
        self._hashing = _Worker(self._digest.update, _QUEUED_CHUNKS)
        self._syncing = _Worker(lambda _: os.fdatasync(self._file.fileno()), 1)
        self._unsynced = 0
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            self._hashing.put(chunk)
            while len(chunk):
                chunk = chunk[self._file.write(chunk) :]
        self.position += len(view)
        self._unsynced += len(view)
        if self._unsynced >= _SYNC_BYTES:
            self._syncing.put(None)
            self._unsynced = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._hashing.close()
            self._syncing.close()
            if error is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


class _Worker:
    """One thread that calls a function on everything it is given, in order; its error is raised by the next call."""

    def __init__(self, function: Any, capacity: int):
        self._queue: queue.Queue[Any] = queue.Queue(capacity)
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, item: Any) -> None:
        self._queue.put((item,))
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._function(*item)
            except BaseException as error:
                self._error = error
