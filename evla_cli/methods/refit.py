"""Ridge regression around pruned weights: the linear maths of refitting an MLP's last layer in closed form.

Letters: N positions, K inputs of the layer (kept channels), D its outputs (hidden size).

With H (N, K) what goes into the layer and R (N, D) what its output lacks, the change of its weight is

    argmin over Delta (D, K) of  sum over positions n of w_n | H_n Delta^T - R_n |^2 + lambda |Delta|^2

Related: ReplaceMe (arXiv 2505.02819) and CORP (arXiv 2602.05243) fit linear maps in closed form to make up for what was
removed; "A Free Lunch in LLM Compression" (arXiv 2510.14444) studies what such repairs gain; RCPU (arXiv 2510.07782)
that least squares overfits small calibration sets. Hence lambda is what serves held-out samples best, and no change at
all is one of the candidates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evla_cli.methods.threads import single_threaded

# Candidates for lambda, relative to the mean of the Gram matrix's diagonal; from "hardly any change" on down.
RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
_BLOCK = 512  # columns of the Gram matrix that are added up, factored and solved at a time


class NormalEquations:
    """H^T H (K, K) and H^T R (K, D), added up in float64 over batches of rows.

    One K x K matrix serves everything: what is on and above its blocks' diagonal are the sums, and what is below them
    is where `solution` puts its factor. More rows may come after a solution.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.moment = torch.zeros(num_inputs, num_outputs, dtype=torch.float64, device=device)
        starts = range(0, num_inputs, _BLOCK)
        self._blocks = [slice(start, min(start + _BLOCK, num_inputs)) for start in starts]

    def add(self, inputs: Tensor, residual: Tensor, weights: Tensor | None = None) -> None:
        """Rows of H (N, K) and R (N, D), each counted by its weight (N)."""
        inputs, residual = inputs.double(), residual.double()
        if weights is not None:
            residual = residual * weights.double().unsqueeze(1)
        self.moment.addmm_(inputs.T, residual)
        for rows in self._blocks:
            part = inputs[:, rows]
            if weights is not None:
                part = part * weights.double().unsqueeze(1)
            self.gram[rows, rows.start :].addmm_(part.T, inputs[:, rows.start :])

    def solution(self, ridge: float) -> Tensor | None:
        """The change of the weight (D, K), in float64, for a ridge relative to the Gram matrix's mean diagonal; None
        where it is too small for these equations to have one solution."""
        corners = self._factor(ridge * float(self.gram.diagonal().mean()))
        if corners is None:
            return None
        change = self.moment.clone()  # (K, D)
        for rows, corner in zip(self._blocks, corners, strict=True):
            change[rows].addmm_(self.gram[rows, : rows.start], change[: rows.start], alpha=-1)
            change[rows] = _triangular(corner, change[rows], upper=False)
        for rows, corner in zip(reversed(self._blocks), reversed(corners), strict=True):
            change[rows].addmm_(self.gram[rows.stop :, rows].T, change[rows.stop :], alpha=-1)
            change[rows] = _triangular(corner.T, change[rows], upper=True)
        return change.T

    def _factor(self, shift: float) -> list[Tensor] | None:
        """Cholesky's factor of the Gram matrix plus `shift` on its diagonal: the blocks on its diagonal. Those below
        stand in `gram`, which LAPACK's routine would need a second time."""
        corners = []
        for rows in self._blocks:
            left, below = self.gram[rows, : rows.start], self.gram[rows.stop :, rows]
            corner = self.gram[rows, rows].clone()
            corner.diagonal().add_(shift)
            corner.addmm_(left, left.T, alpha=-1)
            with single_threaded():  # LAPACK's factor depends on the number of threads; products do not
                factor, failed = torch.linalg.cholesky_ex(corner)
            if shift <= 0 or int(failed):
                return None
            below.copy_(self.gram[rows, rows.stop :].T)
            below.addmm_(self.gram[rows.stop :, : rows.start], left.T, alpha=-1)
            below.copy_(_triangular(factor, below.T, upper=False).T)
            corners.append(factor)
        return corners


def _triangular(factor: Tensor, right: Tensor, upper: bool) -> Tensor:
    with single_threaded():
        return torch.linalg.solve_triangular(factor, right, upper=upper)


@dataclass(frozen=True)
class Fit:
    """What became of a weight: the ridge and the weight (both None: it stays), and the error on held-out rows with the
    weight as it was and as it is now."""

    ridge: float | None
    weight: Tensor | None
    errors: tuple[float, float]


def best_fit(
    weight: Callable[[float], Tensor | None],
    error: Callable[[Tensor | None], float],
    ridges: Sequence[float] = RIDGES,
    start: float | None = None,
) -> Fit:
    """The weight of least `error` that is found among no change and those of the ridges, walking from `start` (None: no
    change) to more change for as long as it makes it no worse, else to less; of equal ones the one that changes least.
    """
    before = error(None)
    tried = {0: before}  # by place: no change, then each ridge
    best, best_place = Fit(None, None, (before, before)), 0

    def left(place: int) -> float:
        nonlocal best, best_place
        if place not in tried:
            ridge = ridges[place - 1]
            candidate = weight(ridge)
            tried[place] = math.inf if candidate is None else error(candidate)
            if (tried[place], place) < (best.errors[1], best_place):
                best, best_place = Fit(ridge, candidate, (before, tried[place])), place
        return tried[place]

    first = place = 0 if start is None else 1 + list(ridges).index(start)
    while place < len(ridges) and left(place + 1) <= left(place) < math.inf:
        place += 1
    while place == first > 0 and left(place - 1) <= left(place):
        first = place = place - 1
    return best


def squared_error(inputs: Tensor, residual: Tensor, change: Tensor | None, weights: Tensor | None = None) -> float:
    """What the output still lacks after the `change` (D, K) of the weight: weighted sum of squares over rows."""
    left = residual if change is None else residual - inputs @ change.T.to(inputs.dtype)
    squares = left.double().square().sum(dim=1)  # (N)
    return float(squares.sum() if weights is None else squares @ weights.double())
