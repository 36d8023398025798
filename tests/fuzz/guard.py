"""Fuzz cases under limits: each gets a little time and memory, in a forked child that may die without the tests.

A case is a function of a seeded `Random`; what it calls of evla goes through `attempt`, which lets nothing pass but a
result or a proper EvlaError. What a case asserts beyond that (against a reference) is outside the limits.
"""

import os
import pickle
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from evla_cli.errors import EvlaError, one_line

CPU_SECONDS = 5  # of one case; the usual one takes milliseconds
BLOCKED_SECONDS = 120  # of real time: a case that waits for something (a pipe, a lock)
CASE_BYTES = 256 * 2**20  # by which a case may grow the process
PROCESS_BYTES = 4 * 2**30  # of address space on top of what the process has: beyond it an allocation fails
MAX_FAILURES = 5

REFUSED = object()
Case = Callable[[Random], bool]  # True if the input was accepted


class LimitExceeded(BaseException):
    """Not an Exception: code under test that catches those must not hide it."""


def attempt(function: Callable[[], Any]) -> Any:
    """What `function` returns, or REFUSED if it raised an EvlaError. Anything else that it raises passes through."""
    with _limited():
        try:
            return function()
        except EvlaError as error:
            _check_error(error)
            return REFUSED


def run_cases(name: str, num_cases: int, case: Case) -> Counter[str]:
    """Cases 0 to `num_cases` - 1 in a child, each with a `Random` of its own. Fails with what went wrong, by number."""

    def body(note: Callable[[str], None]) -> _Outcome:
        outcome = _Outcome(Counter(), [])
        for number in range(num_cases):
            note(f"{name} {number}")
            outcome.add(lambda number=number: case(Random(f"{name} {number}")), f"case {number} of {name}")
        return outcome

    return _checked(in_child(body), num_cases)


def run_examples(name: str, num_cases: int, strategy: SearchStrategy[Any], case: Callable[[Any], bool]) -> Counter[str]:
    """The first `num_cases` examples that hypothesis draws from `strategy`, always the same, in a child."""

    def body(note: Callable[[str], None]) -> _Outcome:
        outcome = _Outcome(Counter(), [])

        @settings(
            max_examples=num_cases,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(strategy)
        def examine(example: Any) -> None:
            note(f"{name}: {example!r:.1000}")
            outcome.add(lambda: case(example), f"{name} with {example!r:.2000}")

        examine()
        return outcome

    return _checked(in_child(body), num_cases)


@dataclass
class _Outcome:
    counts: Counter[str]
    failures: list[str]

    def add(self, case: Callable[[], bool], what: str) -> None:
        if len(self.failures) < MAX_FAILURES:
            try:
                self.counts["accepted" if case() else "refused"] += 1
            except BaseException:
                self.failures.append(f"{what}:\n{traceback.format_exc()}")


def _checked(outcome: _Outcome, num_cases: int) -> Counter[str]:
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.counts.total() == num_cases
    return outcome.counts


def in_child(body: Callable[[Callable[[str], None]], Any]) -> Any:
    """`body(note)` in a forked process; `note` says which case runs, so that one that kills the process is named."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        try:
            torch.set_num_threads(1)  # the parent's OpenMP threads are not here
            size = _status("VmSize") + PROCESS_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with os.fdopen(write_end, "wb") as pipe:

                def note(text: str) -> None:
                    pickle.dump(text, pipe)
                    pipe.flush()

                pickle.dump((body(note),), pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write_end)
    last: Any = "nothing"
    with os.fdopen(read_end, "rb") as pipe:
        try:
            while not isinstance(last, tuple):
                last = pickle.load(pipe)
        except EOFError:
            _, status = os.waitpid(child, 0)
            raise AssertionError(f"The process died with status {status} at: {last}") from None
    os.waitpid(child, 0)
    return last[0]


@contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, _frame: FrameType | None) -> None:
        raise LimitExceeded(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    used = resource.getrusage(resource.RUSAGE_SELF)
    # A call into C that never comes back to Python is beyond the timers: the kernel ends the process.
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 4 * CPU_SECONDS, -1))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark goes down to what is resident
    resident = _status("VmRSS")
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, BLOCKED_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    grown = _status("VmHWM") - resident
    if grown > CASE_BYTES:
        raise LimitExceeded(f"{grown / 2**20:.0f} MiB of memory")


def _check_error(error: EvlaError) -> None:
    message = one_line(error)
    assert 0 < len(message) < 2000, f"a message of {len(message)} letters: {message[:200]}"
    assert message.isprintable(), f"a message that is not one line of text: {message!r}"
    chain: BaseException | None = error
    while chain is not None:
        assert not isinstance(chain, MemoryError), f"ran out of memory on the way to: {message}"
        chain = chain.__cause__ or chain.__context__


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
