"""SIGINT and SIGTERM: one line, exit code 130 or 143, nothing unfinished left behind, within a second or two."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from evla_cli.checkpoint.outputs import remove_unfinished

GRACE_SECONDS = 1.0
_ENDS = {  # signal -> exit code and line
    signal.SIGINT: (130, "Interrupted; nothing unfinished was left behind."),
    signal.SIGTERM: (143, "Terminated; nothing unfinished was left behind."),
    signal.SIGBUS: (2, "Error: A file that was being read was cut short, or its disk failed; nothing was left behind."),
}
_STOPS = (signal.SIGINT, signal.SIGTERM)


class _Stopped(BaseException):
    """A signal asked the command to end. Goes through every `finally`."""

    def __init__(self, number: int):
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside the block SIGINT and SIGTERM raise an exception, and then end the process.

    Python raises it between two of its own instructions: not while a library multiplies large matrices or the system
    writes out a file, and code that swallows exceptions would swallow it too. So a thread waits for the signal as
    well, and where the process has not ended a second later it removes what is unfinished and ends it.

    It does so at once after SIGBUS, which the system sends when a mapped file is read beyond its end: somebody has cut
    it short, and the instruction that read it can never be completed.
    """
    ended, said = threading.Event(), threading.Event()
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    before = {number: signal.signal(number, _stop) for number in _STOPS}
    before[signal.SIGBUS] = signal.signal(signal.SIGBUS, lambda *_: None)
    before_sender = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(receiver, ended, said), daemon=True).start()
    stopped = False
    try:
        yield
    except _Stopped as stop:
        # The thread keeps watch: before it ends, Python waits for other threads. The signals stay ignored.
        stopped = True
        sys.exit(_say(stop.number, said))
    finally:
        if not stopped:
            ended.set()
            signal.set_wakeup_fd(before_sender)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(sender)


def _stop(number: int, _frame: Any) -> None:
    for each in _STOPS:  # a second signal must not cut short what the first one started
        signal.signal(each, signal.SIG_IGN)
    raise _Stopped(number)


def _watch(receiver: int, ended: threading.Event, said: threading.Event) -> None:
    with open(receiver, "rb", buffering=0) as signals:
        while received := signals.read(1):
            number = received[0]
            if number == signal.SIGBUS or (number in _STOPS and not ended.wait(GRACE_SECONDS)):
                remove_unfinished()
                os._exit(_say(number, said))


def _say(number: int, said: threading.Event) -> int:
    code, line = _ENDS[signal.Signals(number)]
    if not said.is_set():
        said.set()
        os.write(2, f"{line}\n".encode())
    return code
