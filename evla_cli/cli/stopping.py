"""SIGINT and SIGTERM: one line, exit code 130 or 143, nothing unfinished left behind, within a second or two."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from evla_cli.checkpoint.outputs import remove_unfinished

GRACE_SECONDS = 1.0
_LINES = {
    signal.SIGINT: "Interrupted; nothing unfinished was left behind.",
    signal.SIGTERM: "Terminated; nothing unfinished was left behind.",
}


class Stopped(BaseException):
    """A signal asked the command to end. Goes through every `finally`."""

    def __init__(self, number: int):
        self.exit_code = 128 + number
        super().__init__(_LINES[signal.Signals(number)])


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside the block the signals raise `Stopped`.

    Python raises it between two of its own instructions: not while a library multiplies large matrices or the system
    writes out a file, and code that swallows exceptions would swallow it too. So a thread waits for the signal as
    well, and where the block has not ended a second later it removes what is unfinished and ends the process.
    """
    ended = threading.Event()
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    before = {number: signal.signal(number, _stop) for number in _LINES}
    before_sender = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    threading.Thread(target=_end_process, args=(receiver, ended), daemon=True).start()
    try:
        yield
    except Stopped:
        before.clear()  # the signals stay ignored: the process is about to end
        raise
    finally:
        ended.set()
        signal.set_wakeup_fd(before_sender)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(sender)


def _stop(number: int, _frame: Any) -> None:
    for each in _LINES:  # a second signal must not cut short what the first one started
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def _end_process(receiver: int, ended: threading.Event) -> None:
    with open(receiver, "rb", buffering=0) as signals:
        while received := signals.read(1):
            if received[0] in _LINES and not ended.wait(GRACE_SECONDS):
                remove_unfinished()
                stopped = Stopped(received[0])
                os.write(2, f"{stopped}\n".encode())
                os._exit(stopped.exit_code)
