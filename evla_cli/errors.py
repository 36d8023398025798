"""The errors a user can act on: one line that says what, where and what to do."""

import difflib
from collections.abc import Iterable


class EvlaError(Exception):
    """Something the user can repair. The command line prints it as one line; exit code 2 (bad usage or input)."""

    exit_code = 2


class CheckFailed(EvlaError):
    """A check that the user asked for found something wrong; exit code 1."""

    exit_code = 1


def suggest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'interval'? Known: interval, phase.` for an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(known)}."
