"""Choose MLP rows with a policy that learns by REINFORCE to keep a block's output (after PruneNet).

Sengupta et al., "You Only Prune Once", ICLR 2025, arXiv 2501.15296: one policy scores the rows of every layer, and is
rewarded by 1 / KS, a Kolmogorov-Smirnov distance between the spectra of the matrix and of what is left of it. The
published distance counts singular values, whatever their size, and looks at the first matrix alone. Rows that are good
by it ruin a model; docs/prunenet.md has the figures. What differs here:

- The matrix is what the block puts out: row j is column j of the down projection times the root mean square of
  channel j on calibration samples, which holds the norm's gain and both other matrices.
- A singular value s has the mass s^2, its energy, and both spectra are summed up over the singular values, largest
  first, in units of the whole matrix's energy. Removing rows lowers every one of these values (Cauchy's interlacing),
  so the gap between the sums only grows, and KS, the largest, is the one at the end: the share of the energy that goes.
  No decomposition is needed.
- The policy sees what a row is made of, in logarithms, and has one weight for each, for all layers. They start at 0.

Everything is computed by one thread: what comes out does not depend on how many there are.

Letters: L layers, F intermediate size, D hidden size, K rows kept, P parts of a row.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evla_cli.errors import EvlaError
from evla_cli.methods.mlp_pruning import activation_scores, column_norms, row_norms, top_rows
from evla_cli.methods.threads import single_threaded

_LEAST = 2.0**-20  # of the largest: a channel that is never used must not stretch the scale of the others
_LEAST_KS = 1e-9  # identical spectra (the published code's reward is then 99999)

Mlp = tuple[Tensor, Tensor, Tensor]  # gate (F, D), up (F, D), down (D, F)


@dataclass(frozen=True)
class PolicyResult:
    """A trained policy, the rows it keeps, and how it got there.

    Attributes:
        weights: one for each part of a row, see `describe`.
        rows, untrained_rows: one (K) per layer, ascending.
        history: mean KS over the layers of the policy's top rows, by the number of episodes.
        best_episode: where in the history the returned policy stands; 0 is the untrained one.
    """

    weights: Tensor
    rows: tuple[Tensor, ...]
    untrained_rows: tuple[Tensor, ...]
    history: tuple[float, ...]
    best_episode: int


@dataclass(frozen=True)
class _Layer:
    parts: Tensor  # (F, P), standardised
    energy: Tensor  # (F), of all together 1


def train_policy(
    read_mlp: Callable[[int], Mlp],
    read_rms: Callable[[int], Tensor],
    num_layers: int,
    num_keep: int,
    *,
    episodes: int = 40,
    num_draws: int = 16,
    learning_rate: float = 0.1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PolicyResult:
    """Train one policy on all layers, which are read one at a time, once, and keep the best policy seen.

    An episode draws `num_draws` times from every layer's rows, with the policy fixed, and takes one step.
    `progress(done, total)` counts layers read and episodes.
    """
    if num_layers < 1 or episodes < 0 or num_draws < 2:
        got = f"{num_layers}, {episodes}, {num_draws}"
        raise EvlaError(f"PruneNet needs num_layers >= 1, episodes >= 0 and num_draws >= 2, got {got}.")
    report = progress or (lambda _done, _total: None)
    with single_threaded(), torch.no_grad():
        layers = []
        for at in range(num_layers):
            layers.append(_Layer(*describe(read_mlp(at), read_rms(at), f"layer {at}")))
            report(len(layers), num_layers + episodes)
        weights = torch.zeros(layers[0].parts.shape[1], dtype=torch.float64)
        optimizer = torch.optim.Adam([weights], lr=learning_rate)
        policies, history = [weights.clone()], [_mean_ks(layers, weights, num_keep)]
        for episode in range(episodes):
            gradients = [
                _gradient(layer, weights, num_keep, [(seed, episode, at, draw) for draw in range(num_draws)])
                for at, layer in enumerate(layers)
            ]
            weights.grad = -torch.stack(gradients).mean(dim=0)
            optimizer.step()
            policies.append(weights.clone())
            history.append(_mean_ks(layers, weights, num_keep))
            report(num_layers + episode + 1, num_layers + episodes)
        best = history.index(min(history))
        rows, untrained = (
            tuple(top_rows(layer.parts @ policy, num_keep) for layer in layers)
            for policy in (policies[best], policies[0])
        )
    return PolicyResult(policies[best], rows, untrained, tuple(history), best)


def describe(mlp: Mlp, channel_rms: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """What the policy sees of an MLP's rows (F, P), and the share of the output's energy that each carries (F).

    The parts are a row's channel on the samples, its column of down, its rows of gate and up: the logarithm of root
    mean square or norm, standardised within the layer, so that the model's scale and the layer's do not matter.
    """
    gate, up, down = mlp
    sizes = torch.stack([channel_rms.double(), column_norms(down), row_norms(gate), row_norms(up)], dim=1)  # (F, P)
    if not bool(sizes.isfinite().all()):
        raise EvlaError(f"The MLP weights of {where} hold NaN or infinite values.")
    largest = sizes.amax(dim=0)
    logarithms = (sizes / torch.where(largest > 0, largest, 1)).clamp_min(_LEAST).log()
    parts = (logarithms - logarithms.mean(dim=0)) / logarithms.std(dim=0, correction=0).clamp_min(1e-12)
    energy = activation_scores(channel_rms, down).square()
    return parts, energy / energy.sum() if bool(energy.any()) else energy


def energy_ks(energy: Tensor, rows: Tensor) -> float:
    """KS between the energy spectra of a matrix whose rows have the given shares (F) of its energy and of the slice
    with these rows (K): see the top."""
    removed = torch.ones(energy.numel(), dtype=torch.bool)
    removed[rows] = False
    return float(energy[removed].sum())


def _mean_ks(layers: Sequence[_Layer], weights: Tensor, num_keep: int) -> float:
    """Of the policy's top rows, without drawing."""
    return sum(energy_ks(layer.energy, top_rows(layer.parts @ weights, num_keep)) for layer in layers) / len(layers)


def _gradient(layer: _Layer, weights: Tensor, num_keep: int, paths: Sequence[tuple[int, ...]]) -> Tensor:
    """REINFORCE's estimate from one draw for each path: (P).

    Under relaxed-Bernoulli noise, the published one, row j is among the top K with probability p_j = sigmoid(score_j -
    t), and the score function of the draw is sum_j (kept_j - p_j) d score_j (Pareto sampling, Rosen 1997). The baseline
    is the mean of the layer's draws; the advantages then sum to zero, and p drops out. They are in units of the draws'
    own deviation: 1 / KS is a thousand where one direction holds nearly all of a layer's energy, and 4 elsewhere.
    """
    scores = layer.parts @ weights
    draws = [top_rows(scores + torch.logit(_uniform(scores.numel(), *path)), num_keep) for path in paths]
    rewards = torch.tensor([1 / max(energy_ks(layer.energy, rows), _LEAST_KS) for rows in draws], dtype=torch.float64)
    deviation = rewards.std(correction=0)
    if not bool(deviation > 0):
        return torch.zeros_like(weights)
    advantages = (rewards - rewards.mean()) / deviation / len(draws)
    return advantages @ torch.stack([layer.parts[rows].sum(dim=0) for rows in draws])


def _uniform(num: int, *path: int) -> Tensor:
    """Draws inside (0, 1), float64, that depend on seed, episode, layer and draw alone."""
    digest = hashlib.sha256("/".join(map(str, path)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.rand(num, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
