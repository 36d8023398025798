"""evla in processes of its own, to be killed, stopped and starved.

They are forked from one process that has imported everything (see conftest.py), so that what they do begins at once.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_FORKED = multiprocessing.get_context("forkserver")
TIMEOUT = 120  # seconds; only a hang takes as long


class Evla:
    """One command, started. `before` runs in its process first."""

    def __init__(self, directory: Path, *arguments: Any, before: Callable[[], Any] | None = None):
        self._log = directory.with_name(f"{directory.name}.stderr")
        command = [str(argument) for argument in arguments]
        self.process: BaseProcess = _FORKED.Process(target=_run, args=(command, directory, self._log, before))
        self.started = time.monotonic()
        self.process.start()

    def wait(self) -> int:
        """The exit code; of a killed process, minus the signal's number."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, "evla hangs"
        return self.process.exitcode

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, number)

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    @property
    def stderr(self) -> str:
        return self._log.read_text()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def _run(command: list[str], directory: Path, log: Path, before: Callable[[], Any] | None) -> None:
    os.chdir(directory)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if sys.version_info < (3, 14):  # what it forks in turn comes from the same server
        forkserver._forkserver.ensure_running = lambda: None
    if before is not None:
        before()
    from evla_cli.cli.main import cli

    cli(command)


# What can be done `before`; each is a value that can be sent to another process.


class Halt:
    """The process stops where a tensor's file is mapped and nothing of it was used, until the test lets it go on.

    Args:
        once: it reads on until a file of this pattern is there, below its directory.
    """

    def __init__(self, once: str = "."):
        self._once = once
        self._test, self._process = _FORKED.Pipe()

    def __call__(self) -> None:
        lock, halted = threading.Lock(), False

        def halt() -> None:
            nonlocal halted
            with lock:  # files are read ahead by other threads
                if not halted and (self._once == "." or any(Path.cwd().glob(self._once))):
                    halted = True
                    self._process.send_bytes(b"halted")
                    self._process.recv_bytes()

        on_read(lambda: None, halt)

    def reached(self, evla: Evla) -> None:
        """Returns once the process has halted."""
        ready = wait([self._test, evla.process.sentinel], TIMEOUT)
        assert self._test in ready, f"ended or hangs before it halted: {evla.stderr}"
        self._test.recv_bytes()

    def go_on(self) -> None:
        self._test.send_bytes(b"go on")

    def __getstate__(self) -> dict[str, Any]:
        return {"_once": self._once, "_process": self._process}


class DieAtStep:
    """The process kills itself right before the step with that number that changes a directory."""

    EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock", "ctypes.dlsym")

    def __init__(self, step: int):
        self.step = step

    def __call__(self) -> None:
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in self.EVENTS or (writing and not str(arguments[0]).startswith("/dev")):
            if self.step == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.step -= 1


class FileLimit:
    """No file may grow beyond so many bytes."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, self.num_bytes))


def without_privileges() -> None:
    """Root is then bound by a file's permissions as everybody is."""
    if os.geteuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0


def without_exchange() -> None:
    """As on a file system that cannot let two names change places."""
    from evla_cli.checkpoint import outputs

    outputs._exchange = lambda first, second: False


def stuck_in_a_library() -> None:
    """The first tensor that is read takes minutes in a function that knows nothing of Python."""
    from hashlib import pbkdf2_hmac

    on_read(lambda: pbkdf2_hmac("sha512", b"", b"", 2**30))


def deaf() -> None:
    """The first tensor that is read takes for ever, and exceptions are swallowed."""

    def sleep() -> None:
        while True:
            with suppress(BaseException):
                time.sleep(1)

    on_read(sleep)


def on_read(before: Callable[[], Any], after: Callable[[], Any] = lambda: None) -> None:
    from evla_cli.checkpoint.mapped_file import MappedFile

    view = MappedFile._view
    MappedFile._view = lambda *arguments: (before(), view(*arguments), after())[1]
