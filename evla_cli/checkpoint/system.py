"""What only some systems can do, and what is done on the others: the result is the same, it only takes longer."""

import ctypes
import errno
import os
from typing import Any

_ZEROS = bytes(2**20)
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)  # by the system or the file system


def c_function(name: str) -> Any | None:
    """A function of the C library, whose errors `ctypes.get_errno` tells; None where there is none of that name."""
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name, None)
    except (OSError, TypeError):  # no library to look into
        return None


def expect_sequential_reads(descriptor: int) -> None:
    """Let the system read further ahead. No effect on macOS."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def drop_from_page_cache(descriptor: int, begin: int, size: int) -> None:
    """Let the system have the memory in which it keeps this part of a file. No effect on macOS."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)


def sync_data(descriptor: int) -> None:
    """Put a file's data on the disk, and on macOS what is known about it as well."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def reserve(descriptor: int, begin: int, size: int) -> None:
    """Take room on the disk for a part of a file in which nothing stands yet; where it cannot be asked for, by writing
    zeros. Errors: OSError, such as a full disk."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, begin, size)
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    end = begin + size
    while begin < end:
        begin += os.pwrite(descriptor, _ZEROS[: end - begin], begin)


def physical_bytes() -> int | None:
    """The machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
