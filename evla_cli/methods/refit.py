"""Ridge regression around pruned weights: the linear maths of refitting an MLP's last layer in closed form.

Letters: N positions, K inputs of the layer (kept channels), D its outputs (hidden size).

With H (N, K) what goes into the layer and R (N, D) what its output lacks, the change of its weight is

    argmin over Delta (D, K) of  sum over positions n of w_n | H_n Delta^T - R_n |^2 + lambda |Delta|^2

Related: ReplaceMe (arXiv 2505.02819) and CORP (arXiv 2602.05243) fit linear maps in closed form to make up for what was
removed; "A Free Lunch in LLM Compression" (arXiv 2510.14444) studies what such repairs gain; RCPU (arXiv 2510.07782)
that least squares overfits small calibration sets. Hence lambda is what serves held-out samples best, and no change at
all is one of the candidates.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evla_cli.methods.threads import single_threaded

# Candidates for lambda, relative to the mean of the Gram matrix's diagonal; from "hardly any change" on down.
RIDGES = (1.0, 0.1, 0.01, 1e-3, 1e-4)


class NormalEquations:
    """H^T H (K, K) and H^T R (K, D), added up in float64 over batches of rows."""

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.moment = torch.zeros(num_inputs, num_outputs, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, residual: Tensor, weights: Tensor | None = None) -> None:
        """Rows of H (N, K) and R (N, D), each counted by its weight (N)."""
        inputs, residual = inputs.double(), residual.double()
        weighted = inputs if weights is None else inputs * weights.double().unsqueeze(1)
        self.gram.addmm_(weighted.T, inputs)
        self.moment.addmm_(weighted.T, residual)

    def solutions(self, ridges: Sequence[float] = RIDGES) -> Iterator[tuple[float, Tensor]]:
        """The change of the weight (D, K), in float64, for each ridge (relative to the Gram matrix's mean diagonal).

        A ridge too small for these equations to have one solution is left out.
        """
        scale = float(self.gram.diagonal().mean())
        for ridge in ridges:
            shifted = self.gram.clone()
            shifted.diagonal().add_(ridge * scale)
            with single_threaded():  # LAPACK's factor depends on the number of threads; products do not
                factor, failed = torch.linalg.cholesky_ex(shifted)
            if scale > 0 and not int(failed):
                yield ridge, torch.cholesky_solve(self.moment, factor).T


def squared_error(inputs: Tensor, residual: Tensor, change: Tensor | None, weights: Tensor | None = None) -> float:
    """What the output still lacks after the `change` (D, K) of the weight: weighted sum of squares over rows."""
    left = residual if change is None else residual - inputs @ change.T.to(inputs.dtype)
    squares = left.double().square().sum(dim=1)  # (N)
    return float(squares.sum() if weights is None else squares @ weights.double())


def best_candidate(errors: Sequence[float]) -> int:
    """The index of the least held-out error; of equal ones the first: list candidates from least change to most."""
    return min(range(len(errors)), key=lambda index: (errors[index], index))
