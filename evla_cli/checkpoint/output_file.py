"""A new file, written front to back: hashed on the way, and on the disk when it is closed."""

import errno
import fcntl
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from evla_cli.checkpoint.system import sync_data

_BUFFER_BYTES = 8 * 2**20
_NUM_BUFFERS = 4
_SYNC_BYTES = 256 * 2**20  # written between two requests to the system to put it on the disk
_BLOCK = 4096  # of the disk: what bypasses the page cache is a multiple of it, in place, size and address
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class OutputFile:
    """Write with `write`; after the `with` block, `sha256` is the hash of the whole file.

    What is written is gathered in a few buffers, used in turn. One thread hashes each, another writes it straight to
    the disk (O_DIRECT, where the file system has it): a cached copy of gigabytes that nobody is about to read costs
    more processor time than all the rest, and pushes out of the page cache what is still to be read.
    """

    def __init__(self, path: Path):
        self._descriptor = _create(path)
        self._syncing = _Worker(lambda _: sync_data(self._descriptor), done=lambda _: None)
        self._unsynced = 0
        self._digest = hashlib.sha256()
        self._free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._num_buffers = 0
        self._buffer: mmap.mmap | None = None  # the one that is being filled
        self._filled = 0
        self._writing = _Worker(self._write, done=lambda filled: self._free.put(filled[0]))
        self._hashing = _Worker(self._hash, done=self._writing.put)
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        """Errors: OSError, here or when the block ends, of this or an earlier write."""
        source = np.frombuffer(data, np.uint8)
        self.position += len(source)
        while len(source):
            if self._buffer is None:
                self._buffer = self._free_buffer()
            count = min(len(source), _BUFFER_BYTES - self._filled)
            target = np.frombuffer(self._buffer, np.uint8, count, self._filled)
            np.copyto(target, source[:count])  # lets other threads run, which the assignment of a slice does not
            source = source[count:]
            self._filled += count
            if self._filled == _BUFFER_BYTES:
                self._flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._flush()
            self._hashing.close()
            self._writing.close()
            self._syncing.close()
            if error is None:
                self._raise_error()
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _free_buffer(self) -> mmap.mmap:
        if self._num_buffers < _NUM_BUFFERS:
            self._num_buffers += 1
            return mmap.mmap(-1, _BUFFER_BYTES)  # begins at a page's border
        return self._free.get()

    def _flush(self) -> None:
        self._raise_error()
        if self._buffer is not None:
            self._hashing.put((self._buffer, self._filled))
        self._buffer, self._filled = None, 0

    def _raise_error(self) -> None:
        error = self._writing.error or self._hashing.error or self._syncing.error
        if error is not None:
            raise error

    def _hash(self, filled: tuple[mmap.mmap, int]) -> None:
        buffer, count = filled
        self._digest.update(memoryview(buffer)[:count])

    def _write(self, filled: tuple[mmap.mmap, int]) -> None:
        buffer, count = filled
        whole = count - count % _BLOCK
        self._write_all(memoryview(buffer)[:whole])
        if whole < count:  # the end of the file
            _use_cache(self._descriptor)
            self._write_all(memoryview(buffer)[whole:count])
        # In the background, so that closing the file need not wait for all that the cache holds.
        self._unsynced += count
        if self._unsynced >= _SYNC_BYTES:
            self._syncing.put(None)
            self._unsynced = 0

    def _write_all(self, data: memoryview) -> None:
        while len(data):
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                # A file system may take the flag and refuse the write.
                if error.errno != errno.EINVAL or not _use_cache(self._descriptor):
                    raise


def _create(path: Path) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with suppress(OSError):  # a file system that cannot
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | _DIRECT)
    return descriptor


def _use_cache(descriptor: int) -> bool:
    """Whether that changes anything."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)


class _Worker:
    """One thread that calls a function on everything it is given, in order, until it raises an error.

    `done` is called on everything, error or not.
    """

    def __init__(self, function: Callable[[Any], Any], done: Callable[[Any], Any]):
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._function, self._done = function, done
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, item: Any) -> None:
        self._queue.put((item,))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (given := self._queue.get()) is not None:
            try:
                if self.error is None:
                    self._function(*given)
            except BaseException as error:
                self.error = error
            self._done(*given)
