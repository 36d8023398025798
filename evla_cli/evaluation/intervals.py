"""Confidence intervals over samples or runs: 95 %, by percentiles of a seeded bootstrap."""

from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 2000
_PERCENTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval, all of one shape. A single sample has no interval: NaN."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def to_record(self) -> dict[str, Any]:
        """JSON numbers or nested lists; null instead of NaN."""
        return {name: _plain(getattr(self, name)) for name in ("value", "low", "high")}


def mean_estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """(N, ...), one row a sample -> mean over samples, (...)."""
    count = len(values)
    mean = values.mean(axis=0)
    if count < 2:
        return _without_interval(mean)
    times_drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)  # (R, N)
    means = (times_drawn @ values.reshape(count, -1)).reshape(_RESAMPLES, *mean.shape) / count
    return Estimate(mean, *np.quantile(means, _PERCENTILES, axis=0))


def median_estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """(N,) -> median."""
    median = np.median(values)
    if len(values) < 2:
        return _without_interval(median)
    drawn = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    return Estimate(median, *np.quantile(np.median(values[drawn], axis=1), _PERCENTILES))


def _without_interval(value: np.ndarray) -> Estimate:
    nowhere = np.full_like(value, np.nan)
    return Estimate(value, nowhere, nowhere)


def _plain(values: np.ndarray) -> Any:
    if np.ndim(values):
        return [_plain(value) for value in values]
    return None if np.isnan(values) else float(values)
