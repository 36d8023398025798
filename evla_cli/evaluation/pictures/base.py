"""What a report is made of: pictures with their numbers, and what is missing for the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """`words`: every column is to the left, even one of numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """
    Attributes:
        name: of the files NAME.png and NAME.json.
        caption: what is seen, how it was measured, and from what.
        alt: for who cannot see it: what it shows, in a sentence or two.
        numbers: all that is drawn, as NAME.json holds it.
        draw: makes the figure (matplotlib's) from them.
    """

    name: str
    title: str
    caption: Sequence[str]
    alt: str
    numbers: dict[str, Any]
    tables: Sequence[Table]
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Missing:
    """A picture that could not be drawn, why, and the commands after which it can."""

    name: str
    title: str
    why: str
    commands: Sequence[str]


Section = Picture | Missing


def where(environment: dict[str, Any]) -> str:
    """What something was timed on, as `evla bench` describes it."""
    return f"{environment['device']} ({environment['device_name']}, {environment['threads']} threads)"


def number(value: float, digits: int = 4) -> str:
    """In so many significant digits, without an exponent."""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):,.10f}".rstrip("0").rstrip(".") if "e" in text or abs(value) >= 1000 else text
