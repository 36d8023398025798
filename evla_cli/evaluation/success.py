"""Success rates with intervals, each candidate paired with the first one: the same episodes, won or lost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evla_cli.evaluation.report import table

Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %
Interval = tuple[float, float]


def wilson_interval(successes: int, episodes: int) -> Interval:
    """95 % confidence interval of a success rate (Wilson 1927)."""
    rate, spread = successes / episodes, Z95 * Z95 / episodes
    centre = (rate + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(rate * (1 - rate) / episodes + spread / episodes / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Paired:
    """A candidate and the reference in the same episodes.

    Attributes:
        both, neither: episodes that both solve, that neither does.
        gained: that the candidate alone solves.
        lost: that the reference alone solves.
    """

    both: int
    gained: int
    lost: int
    neither: int

    @classmethod
    def of(cls, candidate: Sequence[bool], reference: Sequence[bool]) -> "Paired":
        pairs = list(zip(candidate, reference, strict=True))
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def episodes(self) -> int:
        return self.both + self.gained + self.lost + self.neither

    @property
    def difference(self) -> float:
        """Success rate of the candidate minus that of the reference."""
        return (self.gained - self.lost) / self.episodes

    def p_value(self) -> float:
        """Exact McNemar test, two-sided: how likely so uneven a split of the differing episodes is by chance."""
        differing = self.gained + self.lost
        tail = sum(math.comb(differing, k) for k in range(min(self.gained, self.lost) + 1))
        return min(1.0, 2 * tail / 2**differing)

    def interval(self) -> Interval:
        """95 % interval of `difference` by squaring and adding Wilson's (Newcombe 1998, Stat. Med. 17:2635, method 10).

        It has a width where no episode differs, which a bootstrap has not.
        """
        n = self.episodes
        mine, other = self.both + self.gained, self.both + self.lost
        (low, high), (other_low, other_high) = wilson_interval(mine, n), wilson_interval(other, n)
        phi = self._phi()
        below = _distance(mine / n - low, other_high - other / n, phi)
        above = _distance(high - mine / n, other / n - other_low, phi)
        return max(-1.0, self.difference - below), min(1.0, self.difference + above)

    def _phi(self) -> float:
        """Correlation of the two, a positive one corrected for continuity."""
        mine, other, n = self.both + self.gained, self.both + self.lost, self.episodes
        margins = mine * (n - mine) * other * (n - other)
        if margins == 0:
            return 0.0
        product = self.both * self.neither - self.gained * self.lost
        return (max(product - n / 2, 0.0) if product > 0 else product) / math.sqrt(margins)


def _distance(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


Successes = Mapping[str, Sequence[bool]]  # task -> one value an episode


def summarize(results: Mapping[str, Successes]) -> list[dict[str, Any]]:
    """One record a candidate; the first is what the others are compared with."""
    first = next(iter(results.values()))
    return [
        {
            "name": name,
            "all": success_rate(_pooled(tasks)),
            "against_first": None if tasks is first else against(_pooled(tasks), _pooled(first)),
            "tasks": {
                task: success_rate(values) | {"against_first": None if tasks is first else against(values, first[task])}
                for task, values in tasks.items()
            },
        }
        for name, tasks in results.items()
    ]


def _pooled(tasks: Successes) -> list[bool]:
    return [value for values in tasks.values() for value in values]


def success_rate(values: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(values), len(values))
    rate = sum(values) / len(values)
    return {"successes": sum(values), "episodes": len(values), "rate": rate, "interval": [low, high]}


def against(values: Sequence[bool], reference: Sequence[bool]) -> dict[str, Any]:
    pair = Paired.of(values, reference)
    facts = {"difference": pair.difference, "interval": list(pair.interval()), "p_value": pair.p_value()}
    return facts | {"gained": pair.gained, "lost": pair.lost}


def success_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `summarize` returned: all tasks together, then each task."""
    first = rows[0]
    header = ["", "solved", "success %"]
    if len(rows) > 1:
        header += [f"points against {first['name']}", "gained", "lost", "p"]
    cells = [[row["name"], *_rate_cells(row["all"]), *_paired_cells(row["against_first"])] for row in rows]
    pooled = table(header, [row[: len(header)] for row in cells])
    tasks = list(first["tasks"])
    by_task = table(
        ["success %", *tasks], [[row["name"], *(_rate_cells(row["tasks"][task])[1] for task in tasks)] for row in rows]
    )
    return (
        f"{pooled}\n\n{by_task}\n\n95 % intervals in brackets: Wilson; of differences, paired by episode, Newcombe. "
        "p: exact McNemar test."
    )


def _rate_cells(rate: Mapping[str, Any]) -> list[str]:
    low, high = (f"{100 * end:.1f}" for end in rate["interval"])
    return [f"{rate['successes']}/{rate['episodes']}", f"{100 * rate['rate']:.1f} [{low}, {high}]"]


def _paired_cells(against: Mapping[str, Any] | None) -> list[str]:
    if against is None:
        return [""] * 4
    low, high = (f"{100 * end:+.1f}" for end in against["interval"])
    points = f"{100 * against['difference']:+.1f} [{low}, {high}]"
    return [points, str(against["gained"]), str(against["lost"]), f"{against['p_value']:.2g}"]
