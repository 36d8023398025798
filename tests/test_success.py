"""Intervals and tests of success rates against scipy, published examples and brute force."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from evla_cli.evaluation.success import (
    Outcomes,
    Paired,
    against,
    design_effect,
    is_real,
    success_interval,
    success_table,
    summarize,
    wilson_interval,
)


def once(both: int, gained: int, lost: int, neither: int) -> Paired:
    """So many start states of each kind, with one episode each."""
    kinds = [(True, True)] * both + [(True, False)] * gained + [(False, True)] * lost + [(False, False)] * neither
    return Paired([[mine] for mine, _ in kinds], [[other] for _, other in kinds])


def each_alone(*outcomes: bool) -> Outcomes:
    return [[outcome] for outcome in outcomes]


@pytest.mark.parametrize(("successes", "episodes"), [(0, 1), (0, 120), (1, 1), (50, 50), (380, 400), (3, 90), (7, 20)])
def test_wilson_is_scipys(successes, episodes):
    found = binomtest(successes, episodes).proportion_ci(method="wilson")
    assert wilson_interval(successes, episodes) == pytest.approx((found.low, found.high), abs=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 1), (1, 1), (2, 9), (9, 2), (22, 0), (40, 44)])
def test_mcnemar_is_scipys_binomial_test(gained, lost):
    found = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert once(5, gained, lost, 3).p_value() == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize(
    ("pair", "interval"),
    [
        (once(36, 12, 2, 0), (0.0569, 0.3404)),  # Newcombe 1998, Stat. Med. 17:2635
        (once(1, 1, 7, 12), (-0.507, -0.026)),  # Fagerland, Lydersen and Laake 2017, Bentur's data
    ],
)
def test_paired_interval_of_the_literature(pair, interval):
    assert pair.interval() == pytest.approx(interval, abs=6e-4)


def test_paired_interval_covers_the_truth_in_95_of_100_tables():
    """All tables of 12 episodes, weighted by how likely each is."""
    n, p_both, p_gained, p_lost = 12, 0.6, 0.2, 0.1
    covered = 0.0
    for both in range(n + 1):
        for gained in range(n + 1 - both):
            for lost in range(n + 1 - both - gained):
                neither = n - both - gained - lost
                likely = binom.pmf(both, n, p_both)
                likely *= binom.pmf(gained, n - both, p_gained / (1 - p_both))
                likely *= binom.pmf(lost, n - both - gained, p_lost / (1 - p_both - p_gained))
                low, high = once(both, gained, lost, neither).interval()
                covered += likely * (low <= p_gained - p_lost <= high)
    assert 0.94 < covered < 0.99


def test_the_other_way_round_everything_is_mirrored():
    mine = each_alone(True, True, False, False, True, True)
    other = each_alone(True, False, True, False, False, True)
    pair, mirror = Paired(mine, other), Paired(other, mine)
    assert (pair.gained, pair.lost) == (mirror.lost, mirror.gained) == (2, 1)
    assert pair.difference == -mirror.difference == pytest.approx(1 / 6)
    assert pair.interval() == pytest.approx([-end for end in reversed(mirror.interval())])
    assert pair.p_value() == mirror.p_value()


def test_no_difference_has_a_width():
    low, high = once(100, 0, 0, 0).interval()
    assert low == pytest.approx(-high)
    assert 0.01 < high < 0.04
    assert not math.isnan(once(0, 0, 0, 5).interval()[0])


# Start states with several episodes


def drawn(seed: int, states: int, sizes: tuple[int, ...]) -> tuple[Outcomes, Outcomes]:
    """Outcomes that hang on the start state, on the noise and on the policy."""
    random = np.random.default_rng(seed)
    mine, other = [], []
    for _ in range(states):
        size, chance = random.choice(sizes), random.beta(1.5, 0.5)
        noise = random.random(size)
        other.append([bool(value < chance) for value in noise])
        mine.append([bool(value < chance - 0.1) for value in np.where(random.random(size) < 0.5, noise, 1 - noise)])
    return mine, other


def wilson_in_loops(outcomes: Outcomes) -> tuple[float, float, float, float]:
    """Rate, both ends and design effect, as docs/closed-loop.md writes them."""
    m, n = len(outcomes), sum(len(state) for state in outcomes)
    p = sum(sum(state) for state in outcomes) / n
    s = 0.0
    for state in outcomes:
        s += (sum(state) - len(state) * p) ** 2
    most = sum(len(state) ** 2 for state in outcomes) / n
    effect = most if p in (0, 1) or m == 1 else (m / (m - 1) * s / n**2) / (p * (1 - p) / (n - 1))
    effect = min(max(effect, 1), most)
    z = norm.ppf(0.975)
    e = n / effect
    half = z / (1 + z**2 / e) * math.sqrt(p * (1 - p) / e + z**2 / (4 * e**2))
    middle = (p + z**2 / (2 * e)) / (1 + z**2 / e)
    return p, max(0, middle - half), min(1, middle + half), effect


def newcombe_in_loops(mine: Outcomes, other: Outcomes) -> tuple[float, float]:
    p, low, high, effect = wilson_in_loops(mine)
    q, other_low, other_high, other_effect = wilson_in_loops(other)
    together = alone = other_alone = 0.0
    for ours, theirs in zip(mine, other, strict=True):
        a, b = sum(ours) - len(ours) * p, sum(theirs) - len(theirs) * q
        together, alone, other_alone = together + a * b, alone + a * a, other_alone + b * b
    if together > 0:
        together = max(together - effect * other_effect / 2, 0)
    phi = together / math.sqrt(alone * other_alone)
    below = math.sqrt((p - low) ** 2 - 2 * phi * (p - low) * (other_high - q) + (other_high - q) ** 2)
    above = math.sqrt((high - p) ** 2 - 2 * phi * (high - p) * (q - other_low) + (q - other_low) ** 2)
    return p - q - below, p - q + above


@pytest.mark.parametrize(("states", "sizes"), [(200, (1,)), (30, (4,)), (120, (2, 3, 7)), (1, (9,)), (400, (2,))])
def test_intervals_over_start_states_are_the_loops(states, sizes):
    for seed in range(5):
        mine, other = drawn(seed, states, sizes)
        for outcomes in (mine, other):
            _, low, high, effect = wilson_in_loops(outcomes)
            assert success_interval(outcomes) == pytest.approx((low, high), abs=1e-12)
            assert design_effect(outcomes) == pytest.approx(effect, rel=1e-12)
        if states > 1:
            assert Paired(mine, other).interval() == pytest.approx(newcombe_in_loops(mine, other), abs=1e-12)


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 2, 4)])
def test_p_counts_all_ways_to_turn_start_states_round(sizes):
    for seed in range(6):
        mine, other = drawn(seed, 9, sizes)
        gains = [sum(ours) - sum(theirs) for ours, theirs in zip(mine, other, strict=True)]
        ways = [
            abs(sum(sign * gain for sign, gain in zip(signs, gains, strict=True)))
            for signs in product((1, -1), repeat=9)
        ]
        expected = sum(way >= abs(sum(gains)) for way in ways) / len(ways)
        assert Paired(mine, other).p_value() == pytest.approx(expected, rel=1e-12)


def test_episodes_that_only_say_again_what_the_first_said_change_nothing():
    mine, other = drawn(1, 80, (1,))
    again = [[state * 5 for state in outcomes] for outcomes in (mine, other)]
    alone, repeated = against(mine, other), against(*again)
    assert success_interval(again[0]) == pytest.approx(success_interval(mine), abs=1e-12)
    assert repeated["interval"] == pytest.approx(alone["interval"], abs=1e-12)
    assert (repeated["difference"], repeated["p_value"]) == pytest.approx((alone["difference"], alone["p_value"]))
    assert repeated["gained"] == 5 * alone["gained"]


def test_where_all_end_the_same_way_start_states_count():
    assert design_effect([[True] * 4] * 50) == 4
    assert success_interval([[True] * 4] * 50) == pytest.approx(wilson_interval(50, 50))


# Which differences are real


def difference(value: float, low: float, high: float) -> dict[str, object]:
    return {"difference": value, "interval": [low, high]}


@pytest.mark.parametrize(
    ("found", "real"),
    [
        (difference(0.05, 0.01, 0.09), True),
        (difference(-0.05, -0.09, -0.01), True),
        (difference(0.05, -0.001, 0.1), False),  # the interval holds 0
        (difference(0.03, 0.01, 0.05), False),  # other noise alone reaches as far
        (difference(-0.029, -0.05, -0.01), False),  # whichever way
    ],
)
def test_real_is_beyond_0_and_beyond_chance(found, real):
    assert is_real(found, difference(0.01, -0.01, 0.03)) is real
    assert is_real(found, difference(-0.01, -0.03, 0.01)) is real


def test_summary_pairs_each_with_the_first():
    results = {
        "a": {"x": each_alone(True, True, True), "y": each_alone(False, True, True)},
        "b": {"x": each_alone(True, False, False), "y": each_alone(True, True, False)},
    }
    first, second = summarize(results)
    assert first["against_first"] is None
    assert (first["all"]["successes"], second["all"]["successes"]) == (5, 3)
    assert second["against_first"]["difference"] == pytest.approx(-2 / 6)
    assert (second["against_first"]["gained"], second["against_first"]["lost"]) == (1, 3)
    assert second["tasks"]["x"]["against_first"]["lost"] == 2
    text = success_table([first, second])
    assert "points against a" in text
    assert "-33.3" in text
    assert "No difference is called real" in text
    assert second["against_first"]["real"] is None
    assert "points against" not in success_table([first])


def test_differences_are_judged_by_the_control_row_of_all_tasks_and_of_each():
    """In x the control itself moves far; in y nothing moves but the worse candidate."""
    good, bad = [[True, True]] * 40, [[False, False]] * 40
    results = {
        "dense": {"x": good, "y": good},
        "other noise": {"x": good[:25] + bad[:15], "y": good},
        "worse": {"x": good[:30] + bad[:10], "y": bad},
        "the same": {"x": good, "y": good},
    }
    _, chance, worse, same = rows = summarize(results, "other noise")
    assert [row["against_first"]["real"] for row in rows[1:]] == [None, True, False]
    assert {task: worse["tasks"][task]["against_first"]["real"] for task in "xy"} == {"x": False, "y": True}
    assert {task: same["tasks"][task]["against_first"]["real"] for task in "xy"} == {"x": False, "y": False}
    low = chance["against_first"]["interval"][0]
    pooled, by_task, legend = success_table(rows, "other noise").split("\n\n")
    verdicts = [line.split()[-1] for line in pooled.splitlines()]
    assert (verdicts[0], verdicts[-2:]) == ("real", ["yes", "no"])
    assert by_task.count("*") == 1
    assert f"larger than {-100 * low:.1f} points, the farther end of the interval of 'other noise'" in legend
    assert "Both over 80 start states." in legend
