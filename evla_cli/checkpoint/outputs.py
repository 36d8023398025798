"""Outputs that appear whole or not at all, whatever becomes of the process that writes them.

While the destination `out` is being written, there stand beside it

    .out.lock      held (flock) by the one process that may write `out`
    .out.partial   what is being written; it becomes `out` in one rename
    .out.old       what `out` was, while it is replaced on a file system that cannot exchange two names in one step

A killed process leaves them behind and its lock free. The next one that writes `out` finds them, says so, puts back
what `.out.old` holds if nothing stands in its place, and removes the rest.
"""

import ctypes
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evla_cli.checkpoint.system import c_function
from evla_cli.errors import EvlaError

LOG = logging.getLogger(__name__)

# Any of these marks a directory as a checkpoint that evla wrote, and so one that --overwrite may replace.
MARKERS = ("manifest.json", "prune_plan.yaml")

_unfinished: list[Path] = []  # of this process


@contextmanager
def new_directory(dest: Path, overwrite: bool, source: Path | None = None) -> Iterator[Path]:
    """A directory to write into that becomes `dest` if the block ends well, and vanishes if it does not.

    Errors, before the block begins: another process writes `dest`, it cannot be written or must not be replaced, it
    and `source` are the same or nested.
    """
    if source is not None:
        check_apart(dest, source)
    with _claimed(dest) as target:
        _check_directory(dest, overwrite)
        staging = _beside(target, "partial")
        with _written_aside(staging, dest):
            staging.mkdir()
            yield staging
            _sync_tree(staging)
            if os.path.lexists(target) and not overwrite:
                raise EvlaError(f"{dest} appeared while this command ran; nothing was replaced.")
            _put_in_place(staging, target)


@contextmanager
def new_file(dest: Path, overwrite: bool) -> Iterator[Path]:
    """The same for a file: the block writes to the path that it is given."""
    check_output_file(dest, overwrite)
    with _claimed(dest) as target:
        staging = _beside(target, "partial")
        with _written_aside(staging, dest):
            yield staging
            _sync(staging)
            if os.path.lexists(target) and not overwrite:
                raise EvlaError(f"{dest} appeared while this command ran; nothing was replaced.")
            os.replace(staging, target)
            _sync(target.parent)


def write_file(dest: Path, text: str, overwrite: bool) -> None:
    with new_file(dest, overwrite) as staging, open(staging, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def clear_leftovers(dest: Path) -> None:
    """Put right what a killed process left beside `dest`, which need not be written itself."""
    with _claimed(dest):
        pass


@contextmanager
def made_directory(path: Path) -> Iterator[None]:
    """`path` and its parents exist inside the block; those that were made here go again if it fails."""
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvlaError(f"Cannot make the directory {path}: {error.strerror}.") from error
    try:
        yield
    except BaseException:
        for directory in made:
            with suppress(OSError):  # not empty: an earlier stage's output stands there
                directory.rmdir()
        raise


@contextmanager
def locked(lock: Path, dest: Path) -> Iterator[None]:
    """Only the process that holds the file `lock` writes `dest`. Errors: it is another one."""
    descriptor = _open_locked(lock, dest)
    _unfinished.append(lock)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # while it is held: whoever waits at the old file sees that it is gone
        _unfinished.remove(lock)
        os.close(descriptor)


def check_apart(dest: Path, source: Path) -> None:
    resolved, other = _resolved(dest), _resolved(source)
    if resolved == other or resolved in other.parents or other in resolved.parents:
        raise EvlaError(f"{dest} and {source} are the same or one lies inside the other; choose another output.")


def check_output_file(dest: Path, overwrite: bool) -> None:
    """Refuse an output file before any work is done for it."""
    if dest.is_dir():
        raise EvlaError(f"{dest} is a directory; name a file.")
    _check_parent(dest)
    if os.path.lexists(dest) and not overwrite:
        raise EvlaError(f"{dest} already exists. Pass --overwrite to replace it.")


def check_space(directory: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk has no room for."""
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise EvlaError(
            f"{num_bytes:,} bytes are to be written, the disk of {directory} has {free:,} free; make room or choose "
            "another output."
        )


def remove_unfinished() -> None:
    """Of this process, when it has to end though its main thread is held up and no `finally` clause will run."""
    for path in reversed(_unfinished):
        with suppress(OSError):
            _remove(path)


def _check_directory(dest: Path, overwrite: bool) -> None:
    if not os.path.lexists(dest):
        return
    if not overwrite:
        raise EvlaError(f"{dest} already exists. Pass --overwrite to replace it.")
    empty = dest.is_dir() and not any(dest.iterdir())
    if not empty and not any((dest / marker).is_file() for marker in MARKERS):
        raise EvlaError(f"{dest} is not a directory that evla wrote; delete it yourself if it can go.")


def _check_parent(dest: Path) -> None:
    if not dest.parent.is_dir():
        raise EvlaError(f"{dest.parent} does not exist or is not a directory; create it first.")


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve without an exception for a loop of symlinks


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


@contextmanager
def _claimed(dest: Path) -> Iterator[Path]:
    """`dest` without symlinks, locked, and rid of what a killed process left beside it."""
    _check_parent(dest)
    target = _resolved(dest)
    with locked(_beside(target, "lock"), dest):
        _recover(target)
        yield target


def _open_locked(lock: Path, dest: Path) -> int:
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise EvlaError(f"Cannot write into {lock.parent}: {error.strerror}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file after it was opened here: then another process holds, or will
            # hold, a new file of that name.
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise EvlaError(f"Another process is writing {dest}; wait for it or choose another output.") from error
            raise EvlaError(f"Cannot lock {lock}: {error.strerror}.") from error
        os.close(descriptor)


def _recover(target: Path) -> None:
    old, partial = _beside(target, "old"), _beside(target, "partial")
    try:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
            LOG.warning("Found %s, which a killed run had put aside; it is %s again.", old, target.name)
        for path in (old, partial):
            if os.path.lexists(path):
                _remove(path)
                LOG.warning("Found %s, which a killed run had left; removed it.", path)
    except OSError as error:
        raise EvlaError(f"Cannot clear up {error.filename}, which a killed run left: {error.strerror}.") from error


@contextmanager
def _written_aside(staging: Path, dest: Path) -> Iterator[None]:
    _unfinished.append(staging)
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename or staging)
        what = f"write {dest}" if name.startswith(str(staging)) else f"use {name}"
        raise EvlaError(f"Cannot {what}: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        with suppress(OSError):
            _remove(staging)
        _unfinished.remove(staging)


def _put_in_place(staging: Path, target: Path) -> None:
    """At every instant `target` is what it was or what it is to be; where that cannot be had, `_recover` sees to it."""
    if not os.path.lexists(target):
        os.rename(staging, target)
    elif not _exchange(staging, target):
        old = _beside(target, "old")
        try:
            os.rename(target, old)
            os.rename(staging, target)
        except BaseException:  # an interrupt too
            if os.path.lexists(old) and not os.path.lexists(target):
                os.rename(old, target)
            raise
        _sync(target.parent)
        with suppress(OSError):
            _remove(old)
    _sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places in one step: renameat2(2). False where system or file system cannot."""
    renameat2 = c_function("renameat2")
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
