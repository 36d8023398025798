"""Which layers to remove when the layer before them is refit: the maths of runs of removed layers.

A run is (i, j): layer i stays, j is the next that stays (or the final norm), what is between goes, and layer i's last
linear map is refit to the dense model's state x_j at the input of j. Removing n layers costs the sum of its runs; the
cheapest set follows from dynamic programming over (last layer that stayed, layers removed so far).

Letters used here: N positions fit to, M positions that judge, K inputs of the linear map, D hidden size, R resamples.
"""

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from evla_cli.methods.refit import RIDGES, best_fit
from evla_cli.methods.threads import single_threaded

Run = tuple[int, int]


class Absorber:
    """What layer i gives at the judging positions once its last linear map is refit to any target.

    The ridge solution in either of its forms, which are equal: with H (N, K) and H' (M, K) going into the map and E
    (N, D) what the output lacks, the refit adds H' (H^T H + lambda)^-1 (H^T E) = (H' H^T) (H H^T + lambda)^-1 E. What
    stands before E (before H^T E) is one matrix for each lambda, whatever the target.
    """

    def __init__(self, inputs: Tensor, judging_inputs: Tensor, outputs: Tensor, judging_outputs: Tensor):
        """Inputs (N, K) and (M, K) of the linear map, outputs (N, D) and (M, D) of the layer."""
        self._outputs, self._judging_outputs = outputs, judging_outputs
        self._inputs = inputs if inputs.shape[1] < inputs.shape[0] else None  # the first form, where it is the smaller
        wide, judging = inputs.double(), judging_inputs.double()
        gram, cross = (wide.T @ wide, judging.T) if self._inputs is not None else (wide @ wide.T, wide @ judging.T)
        scale = float(gram.diagonal().sum()) / inputs.shape[1]  # the mean of H^T H's diagonal
        self.ridge: float | None = None  # of the last target
        self._maps: dict[float, Tensor] = {}
        for ridge in RIDGES:
            shifted = gram.clone()
            shifted.diagonal().add_(ridge * scale)
            with single_threaded():  # LAPACK's factor depends on the number of threads; products do not
                factor, failed = torch.linalg.cholesky_ex(shifted)
            if scale > 0 and not int(failed):
                self._maps[ridge] = torch.cholesky_solve(cross, factor).T.float()  # (M, K) or (M, N)

    def best(self, target: Tensor, judging_target: Tensor) -> Tensor:
        """What the layer gives (M, D) with the lambda that serves the judging positions best, by relative error;
        without a refit where that is better. The first target, the nearest one, settles lambda for those that follow.
        """
        lacking = target - self._outputs
        if self._inputs is not None:
            lacking = self._inputs.T @ lacking
        start = self._judging_outputs

        def error(values: Tensor | None) -> float:
            return float(relative_error(start if values is None else values, judging_target).sum())

        fit = best_fit(lambda ridge: start + self._maps[ridge] @ lacking, error, tuple(self._maps))
        self.ridge = fit.ridge
        self._maps = {ridge: self._maps[ridge] for ridge in (fit.ridge,) if ridge is not None}
        return start if fit.weight is None else fit.weight


def relative_error(found: Tensor, target: Tensor) -> Tensor:
    """At every position |found - target|^2 / |target|^2, (M, D) -> (M), float64: what a norm after it would see."""
    target = target.double()
    return (found.double() - target).square().sum(dim=1) / target.square().sum(dim=1).clamp_min(1e-30)


def cheapest_runs(
    costs: Mapping[Run, np.ndarray], num_layers: int, num_drop: int, forced: Collection[int] = ()
) -> np.ndarray:
    """Which layers go, (R, num_layers), for R sets of costs at once. Of equal costs the shorter last run wins.

    Args:
        costs: (R) for every run that may be removed; a run with nothing between costs nothing and need not be there.
        forced: layers that must go.

    Errors: ValueError where no runs make up such a set, or at no finite cost.
    """
    count = len(next(iter(costs.values())))
    places = [layer for layer in range(-1, num_layers + 1) if layer not in forced]
    best = {place: np.full((num_drop + 1, count), np.inf) for place in places}
    before = {place: np.zeros((num_drop + 1, count), dtype=int) for place in places}
    best[-1][0] = 0.0
    for j in places[1:]:
        for i in reversed([place for place in places if place < j]):
            length = j - i - 1
            if length > num_drop or (length and (i, j) not in costs):
                continue
            for removed in range(length, num_drop + 1):
                total = best[i][removed - length] + (costs[i, j] if length else 0.0)
                better = total < best[j][removed]
                best[j][removed] = np.where(better, total, best[j][removed])
                before[j][removed] = np.where(better, i, before[j][removed])
    if not np.isfinite(best[num_layers][num_drop]).all():
        raise ValueError(f"These runs do not remove {num_drop} of {num_layers} layers at a finite cost.")
    dropped = np.zeros((count, num_layers), dtype=bool)
    for row in range(count):
        j, removed = num_layers, num_drop
        while j >= 0:
            i = int(before[j][removed, row])
            dropped[row, i + 1 : j] = True
            j, removed = i, removed - (j - i - 1)
    return dropped


def longest_run(num_layers: int, num_drop: int, removable: Collection[int], forced: Collection[int] = ()) -> int:
    """How many layers a run may remove: a sixth of all, or as many more as it takes to remove so many."""
    for limit in range(max(2, math.ceil(num_layers / 6)), num_drop):
        runs = {
            (i, j): np.zeros(1)
            for i in range(-1, num_layers)
            for j in range(i + 2, min(i + 2 + limit, num_layers + 1))
            if set(range(i + 1, j)) <= set(removable)
        }
        try:
            cheapest_runs(runs, num_layers, num_drop, forced)
        except ValueError:
            continue
        return limit
    return num_drop
