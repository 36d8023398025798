"""The newest versions that evla was tested with, and one warning where a newer one is found."""

import functools
import logging
import multiprocessing
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version

LOG = logging.getLogger(__name__)

# Moved by hand when `make test` and `make test-versions` pass with a newer one; constraints/newest.txt and
# constraints.txt say the same. The oldest are the lower bounds in setup.cfg.
NEWEST_TESTED = {"python": "3.13", "numpy": "2.4.6", "torch": "2.13.0", "transformers": "5.24.0"}


@functools.cache
def warn_of_untested_versions() -> None:
    """Once in a program, for all of them; its worker processes say nothing."""
    if multiprocessing.parent_process() is not None:
        return
    installed = {name: version(name) for name in NEWEST_TESTED if name != "python"}
    note = untested({"python": ".".join(platform.python_version_tuple()[:2])} | installed)
    if note:
        LOG.warning(note)


def untested(installed: Mapping[str, str]) -> str:
    """The warning's one line, empty where nothing is newer than what was tested."""
    newer = [
        f"{name} {installed[name]} is newer than {tested}"
        for name, tested in NEWEST_TESTED.items()
        if _numbers(installed[name]) > _numbers(tested)
    ]
    if not newer:
        return ""
    return (
        f"Warning: {', '.join(newer)}, the newest that evla was tested with; if anything goes wrong, install "
        "what was tested."
    )


def _numbers(text: str) -> list[int]:
    """Of the release alone: 2.13.0+cpu and 2.13.0.dev1 count as 2.13.0."""
    release = re.match(r"[0-9.]*", text)
    return [int(number) for number in release[0].split(".") if number] if release else []
