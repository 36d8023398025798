"""Progress bars on stderr: silent with --quiet or where stderr is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Called by the command line alone."""
    global _quiet
    _quiet = quiet


@contextmanager
def progress_bar(description: str, total: int, unit: str = "it") -> Iterator[Any]:
    """A tqdm bar; `bar.update(n)`. Units of bytes ("B") are scaled."""
    from tqdm import tqdm

    scale = unit == "B"
    disable = True if _quiet else None  # None: only where stderr is a terminal
    with tqdm(total=total, desc=description, unit=unit, unit_scale=scale, disable=disable, leave=False) as bar:
        yield bar
