"""Intervals and tests of success rates against scipy, published examples and brute force."""

import math

import pytest
from scipy.stats import binom, binomtest

from evla_cli.evaluation.success import Paired, success_table, summarize, wilson_interval


@pytest.mark.parametrize(("successes", "episodes"), [(0, 1), (0, 120), (1, 1), (50, 50), (380, 400), (3, 90), (7, 20)])
def test_wilson_is_scipys(successes, episodes):
    found = binomtest(successes, episodes).proportion_ci(method="wilson")
    assert wilson_interval(successes, episodes) == pytest.approx((found.low, found.high), abs=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 1), (1, 1), (2, 9), (9, 2), (22, 0), (40, 44)])
def test_mcnemar_is_scipys_binomial_test(gained, lost):
    found = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert Paired(5, gained, lost, 3).p_value() == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize(
    ("pair", "interval"),
    [
        (Paired(36, 12, 2, 0), (0.0569, 0.3404)),  # Newcombe 1998, Stat. Med. 17:2635
        (Paired(1, 1, 7, 12), (-0.507, -0.026)),  # Fagerland, Lydersen and Laake 2017, Bentur's data
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
                low, high = Paired(both, gained, lost, neither).interval()
                covered += likely * (low <= p_gained - p_lost <= high)
    assert 0.94 < covered < 0.99


def test_the_other_way_round_everything_is_mirrored():
    mine, other = [True, True, False, False, True, True], [True, False, True, False, False, True]
    pair, mirror = Paired.of(mine, other), Paired.of(other, mine)
    assert pair == Paired(both=2, gained=2, lost=1, neither=1)
    assert pair.difference == -mirror.difference == pytest.approx(1 / 6)
    assert pair.interval() == pytest.approx([-end for end in reversed(mirror.interval())])
    assert pair.p_value() == mirror.p_value()


def test_no_difference_has_a_width():
    low, high = Paired(100, 0, 0, 0).interval()
    assert low == pytest.approx(-high)
    assert 0.01 < high < 0.04
    assert not math.isnan(Paired(0, 0, 0, 5).interval()[0])


def test_summary_pairs_each_with_the_first():
    results = {
        "a": {"x": [True, True, True], "y": [False, True, True]},
        "b": {"x": [True, False, False], "y": [True, True, False]},
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
    assert "points against" not in success_table([first])
