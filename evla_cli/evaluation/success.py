"""Success rates with intervals, each candidate paired with the first one, and which differences are real.

Episodes from the same start state under other noise are no independent measurements: a start state is what counts.
Formulas and sources: docs/closed-loop.md.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from evla_cli.evaluation.report import table

Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %
Interval = tuple[float, float]
Outcomes = Sequence[Sequence[bool]]  # by start state: whether each noise solved it


def wilson_interval(successes: float, episodes: float) -> Interval:
    """95 % confidence interval of a success rate (Wilson 1927)."""
    rate, spread = successes / episodes, Z95 * Z95 / episodes
    centre = (rate + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(rate * (1 - rate) / episodes + spread / episodes / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def success_interval(outcomes: Outcomes) -> Interval:
    """Wilson's with the effective number of episodes: theirs divided by the design effect.

    With one episode a start state it is Wilson's.
    """
    effect = design_effect(outcomes)
    return wilson_interval(sum(map(sum, outcomes)) / effect, sum(map(len, outcomes)) / effect)


def design_effect(outcomes: Outcomes) -> float:
    """The variance of the rate over that of as many independent episodes.

    From 1 (noise decides everything) to the number of episodes a start state (the start state does). Where all episodes
    end the same way, or there is one start state, they do not tell, and the larger one is taken.
    """
    sizes = list(map(len, outcomes))
    states, episodes = len(sizes), sum(sizes)
    if episodes == states:
        return 1.0
    most = sum(size * size for size in sizes) / episodes
    rate = sum(map(sum, outcomes)) / episodes
    if states == 1 or rate in (0, 1):
        return most
    squares = sum(deviation * deviation for deviation in _deviations(outcomes))
    clustered = states / (states - 1) * squares / episodes**2
    return min(max(clustered / (rate * (1 - rate) / (episodes - 1)), 1.0), most)


def _deviations(outcomes: Outcomes) -> list[float]:
    """By start state: its successes, less those that the mean rate would give."""
    rate = sum(map(sum, outcomes)) / sum(map(len, outcomes))
    return [sum(state) - len(state) * rate for state in outcomes]


@dataclass(frozen=True)
class Paired:
    """A candidate and the reference in the same episodes."""

    candidate: Outcomes
    reference: Outcomes

    @property
    def gained(self) -> int:
        """Episodes that the candidate alone solves."""
        return sum(mine and not other for mine, other in self._pairs())

    @property
    def lost(self) -> int:
        """Episodes that the reference alone solves."""
        return sum(other and not mine for mine, other in self._pairs())

    @property
    def difference(self) -> float:
        """Success rate of the candidate minus that of the reference."""
        return (self.gained - self.lost) / len(self._pairs())

    def p_value(self) -> float:
        """Exact sign-flip test over start states, two-sided; with one episode a start state, McNemar's exact test.

        If the two candidates were alike, what one start state gains it might as well have lost. Counts how many of all
        ways to turn the start states round part the two at least as far as they were found.
        """
        gains = [sum(mine) - sum(other) for mine, other in zip(self.candidate, self.reference, strict=True)]
        likely = np.ones(1)  # of sums over those start states that gain rather than lose
        for size, count in Counter(abs(gain) for gain in gains if gain).items():
            ways = np.zeros(size * count + 1)
            ways[::size] = [math.comb(count, chosen) / 2**count for chosen in range(count + 1)]
            likely = np.convolve(likely, ways)
        farthest = (len(likely) - 1 + abs(sum(gains))) // 2
        return min(1.0, 2 * math.fsum(likely[farthest:]))

    def interval(self) -> Interval:
        """95 % interval of `difference` by squaring and adding Wilson's (Newcombe 1998, Stat. Med. 17:2635, method 10),
        with variances and correlation over start states.

        It has a width where no episode differs, which a bootstrap has not.
        """
        mine, other = _rate(self.candidate), _rate(self.reference)
        (low, high), (other_low, other_high) = success_interval(self.candidate), success_interval(self.reference)
        phi = self._phi()
        below = _distance(mine - low, other_high - other, phi)
        above = _distance(high - mine, other - other_low, phi)
        return max(-1.0, self.difference - below), min(1.0, self.difference + above)

    def _pairs(self) -> list[tuple[bool, bool]]:
        states = zip(self.candidate, self.reference, strict=True)
        return [pair for mine, other in states for pair in zip(mine, other, strict=True)]

    def _phi(self) -> float:
        """Correlation of the two rates, a positive one corrected for continuity.

        Newcombe's correction is half an episode; episodes that say the same count as one.
        """
        mine, other = _deviations(self.candidate), _deviations(self.reference)
        squares = math.sqrt(sum(a * a for a in mine) * sum(b * b for b in other))
        if squares == 0:
            return 0.0
        product = sum(a * b for a, b in zip(mine, other, strict=True))
        if product > 0:
            product = max(product - design_effect(self.candidate) * design_effect(self.reference) / 2, 0.0)
        return product / squares


def _rate(outcomes: Outcomes) -> float:
    return sum(map(sum, outcomes)) / sum(map(len, outcomes))


def _distance(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


Successes = Mapping[str, Outcomes]  # by task


def summarize(results: Mapping[str, Successes], control: str | None = None) -> list[dict[str, Any]]:
    """One record a candidate; the first is what the others are compared with.

    Args:
        control: the candidate that is the first one with other noise; None: no difference is judged.
    """
    first = next(iter(results))

    def compared(name: str, chosen: Callable[[Successes], Outcomes]) -> dict[str, Any] | None:
        if name == first:
            return None
        facts = against(chosen(results[name]), chosen(results[first]))
        if control is None or name == control:
            return facts | {"real": None}
        return facts | {"real": is_real(facts, against(chosen(results[control]), chosen(results[first])))}

    return [
        {
            "name": name,
            "all": success_rate(_pooled(tasks)),
            "against_first": compared(name, _pooled),
            "tasks": {
                task: success_rate(values) | {"against_first": compared(name, itemgetter(task))}
                for task, values in tasks.items()
            },
        }
        for name, tasks in results.items()
    ]


def _pooled(tasks: Successes) -> Outcomes:
    return [state for states in tasks.values() for state in states]


def success_rate(outcomes: Outcomes) -> dict[str, Any]:
    successes, episodes = sum(map(sum, outcomes)), sum(map(len, outcomes))
    interval = list(success_interval(outcomes))
    counts = {"successes": successes, "episodes": episodes, "start_states": len(outcomes)}
    return counts | {"rate": successes / episodes, "interval": interval}


def against(outcomes: Outcomes, reference: Outcomes) -> dict[str, Any]:
    pair = Paired(outcomes, reference)
    facts = {"difference": pair.difference, "interval": list(pair.interval()), "p_value": pair.p_value()}
    return facts | {"gained": pair.gained, "lost": pair.lost}


def is_real(difference: Mapping[str, Any], control: Mapping[str, Any]) -> bool:
    """Whether the interval excludes 0, and the difference is larger than `reach` of the control row; both are what
    `against` returned."""
    low, high = difference["interval"]
    return (low > 0 or high < 0) and abs(difference["difference"]) > reach(control)


def reach(control: Mapping[str, Any]) -> float:
    """How far from 0 the farther end of its interval is: what other noise alone may do."""
    return max(map(abs, control["interval"]))


def verdict(real: bool | None) -> str:
    return "" if real is None else "yes" if real else "no"


def success_table(rows: Sequence[Mapping[str, Any]], control: str | None = None) -> str:
    """What `summarize` returned: all tasks together, then each task."""
    first = rows[0]
    header = ["", "solved", "success %"]
    if len(rows) > 1:
        header += [f"points against {first['name']}", "gained", "lost", "p"] + ["real"] * (control is not None)
    cells = [[row["name"], *_rate_cells(row["all"]), *_paired_cells(row["against_first"])] for row in rows]
    pooled = table(header, [row[: len(header)] for row in cells])
    tasks = list(first["tasks"])
    by_task = table(
        ["success %", *tasks], [[row["name"], *(_task_cell(row["tasks"][task]) for task in tasks)] for row in rows]
    )
    return f"{pooled}\n\n{by_task}\n\n{_legend(rows, control)}"


def _rate_cells(rate: Mapping[str, Any]) -> list[str]:
    low, high = (f"{100 * end:.1f}" for end in rate["interval"])
    return [f"{rate['successes']}/{rate['episodes']}", f"{100 * rate['rate']:.1f} [{low}, {high}]"]


def _task_cell(rate: Mapping[str, Any]) -> str:
    against = rate["against_first"]
    return _rate_cells(rate)[1] + ("*" if against is not None and against["real"] else "")


def _paired_cells(against: Mapping[str, Any] | None) -> list[str]:
    if against is None:
        return [""] * 5
    low, high = (f"{100 * end:+.1f}" for end in against["interval"])
    points = f"{100 * against['difference']:+.1f} [{low}, {high}]"
    counts = [str(against["gained"]), str(against["lost"])]
    return [points, *counts, f"{against['p_value']:.2g}", verdict(against["real"])]


def _legend(rows: Sequence[Mapping[str, Any]], control: str | None) -> str:
    repeated = rows[0]["all"]["start_states"] < rows[0]["all"]["episodes"]
    sentences = ["95 % intervals in brackets: Wilson; of differences, paired by episode, Newcombe."]
    if repeated:
        sentences.append(f"Both over {rows[0]['all']['start_states']} start states.")
    sentences.append(f"p: exact {'sign-flip test over start states' if repeated else 'McNemar test'}.")
    if len(rows) > 1:
        sentences.append(f"\n{judging(rows, control)}")
    return " ".join(sentences).replace(" \n", "\n")


def judging(rows: Sequence[Mapping[str, Any]], control: str | None) -> str:
    """How a reader can tell which differences are real."""
    if control is None:
        return "No difference is called real: there is no control row to tell what other noise alone does."
    (chance,) = (row["against_first"] for row in rows if row["name"] == control)
    return (
        f"real: the interval excludes 0, and the difference is larger than {100 * reach(chance):.1f} points, the "
        f"farther end of the interval of '{control}', which is chance alone. *: the same within a task."
    )
