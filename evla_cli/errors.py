"""The errors a user can act on: one line that says what, where and what to do."""

import difflib
from collections.abc import Iterable


class EvlaError(Exception):
    """Something the user can repair. The command line prints it as one line; exit code 2 (bad usage or input)."""

    exit_code = 2


class CheckFailed(EvlaError):
    """A check that the user asked for found something wrong; exit code 1."""

    exit_code = 1


_MAX_LETTERS = 1000


def one_line(error: EvlaError) -> str:
    """What is printed of it. A name out of a damaged file must not fill the screen or be a command to the terminal."""
    text = " ".join(str(error).splitlines())
    if len(text) > _MAX_LETTERS:
        text = f"{text[: _MAX_LETTERS // 2]} ... {text[-_MAX_LETTERS // 2 :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def suggest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'interval'? Known: interval, phase.` for an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(known)}."
