"""How many cases ran, by format: printed at the end of a run."""

from collections import Counter
from collections.abc import Callable

import pytest

_COUNTS: dict[str, Counter[str]] = {}


@pytest.fixture(scope="session")
def counted() -> Callable[[str, Counter[str]], None]:
    """`counted("safetensors", counts)` adds a test's cases to the table."""

    def add(name: str, counts: Counter[str]) -> None:
        _COUNTS.setdefault(name, Counter()).update(counts)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _COUNTS:
        return
    terminalreporter.section("fuzz cases")
    for name, counts in [*_COUNTS.items(), ("total", sum(_COUNTS.values(), Counter[str]()))]:
        line = f"{name:24}{counts.total():8}  accepted {counts['accepted']:6}  refused {counts['refused']:6}"
        terminalreporter.write_line(line)
