"""Choose MLP rows that preserve a matrix's spectrum, with a policy trained on the weights alone (PruneNet, arXiv 2501.15296).

The reward of a slice is 1 / KS, KS being the two-sample Kolmogorov-Smirnov statistic between the singular values of the
matrix and of the slice. Two variants:

"paper"     the published policy and training. It ends at uniformly random rows, because its loss only ever raises keep
            probabilities (no baseline, not the log-probability of the draw) until all of them are 1, and because its
            score is linear: a row and its negative, which are the same to the spectrum, get opposite scores.
"spectral"  (default) the same reward, noise and REINFORCE, with a policy that sees each row's share in the bands of
            its own matrix's spectrum, and with a gradient whose baseline is the other draws of the same layer.

docs/prunenet.md has the evidence and the measurements.
Letters: L layers, F intermediate size, D hidden size, K rows kept, B spectral bands.
"""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evla_cli.errors import EvlaError

NUM_BANDS = 8  # bands of equal numbers of singular values, weakest first
_ZERO = 100.0  # eigenvalues below this many rounding units of the largest are zero


@dataclass(frozen=True)
class RowQuality:
    """How well one choice of rows, layer by layer, preserves the matrices; both figures: lower is better."""

    ks: tuple[float, ...]
    frobenius_error: tuple[float, ...]  # |W - slice| / |W|: for information, nothing optimises it

    @property
    def mean_ks(self) -> float:
        return sum(self.ks) / len(self.ks)

    @property
    def mean_frobenius_error(self) -> float:
        return sum(self.frobenius_error) / len(self.frobenius_error)


@dataclass(frozen=True)
class PolicyReport:
    """The trained policy's rows beside those of the untrained policy and of two rules that need no training."""

    before: RowQuality
    after: RowQuality
    random: RowQuality
    magnitude: RowQuality  # largest row norms of the same matrix

    def table(self) -> str:
        lines = [f"{'rows':<10} {'mean KS':>8} {'min':>7} {'max':>7} {'rel. error':>11}"]
        for name in ("before", "after", "random", "magnitude"):
            rows: RowQuality = getattr(self, name)
            lines.append(
                f"{name:<10} {rows.mean_ks:8.4f} {min(rows.ks):7.4f} {max(rows.ks):7.4f} "
                f"{rows.mean_frobenius_error:11.4f}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class PolicyResult:
    """A trained policy, what it keeps of every layer, and how it got there."""

    policy: nn.Module
    rows: tuple[Tensor, ...]  # per layer (K), ascending: what select_rows gives for this policy
    report: PolicyReport
    history: tuple[float, ...]  # mean KS of the policy's top rows before each episode, and after the last
    best_episode: int  # index into history of the policy kept
    variant: str
    reward: str
    seed: int


def train_policy(
    read_matrix: Callable[[int], Tensor],
    num_layers: int,
    num_keep: int,
    *,
    episodes: int = 20,
    discount: float = 0.99,
    learning_rate: float | None = None,
    seed: int = 0,
    variant: str = "spectral",
    reward: str = "exact",
    num_samples: int = 2,
    dtype: torch.dtype = torch.float64,
    progress: Callable[[int, int], None] | None = None,
) -> PolicyResult:
    """Train one policy over all layers' first MLP matrices (F, D), reading one matrix at a time, without data.

    `learning_rate` defaults to the paper's 0.001 for "paper" and to 0.1 for the 8 weights of "spectral";
    `num_samples` is the number of draws per layer and episode in "spectral" ("paper" has one). `reward` names an entry of
    REWARDS. `progress(done, total)` counts matrices visited. The best policy seen is the one returned.
    """
    if variant not in VARIANTS:
        raise EvlaError(f"Unknown PruneNet variant '{variant}'. Known: {', '.join(VARIANTS)}.")
    if reward not in REWARDS:
        raise EvlaError(f"Unknown PruneNet reward '{reward}'. Known: {', '.join(REWARDS)}.")
    if num_layers < 1 or episodes < 0 or num_samples < 2:
        raise EvlaError(
            f"PruneNet needs num_layers >= 1, episodes >= 0 and num_samples >= 2, got {num_layers}, {episodes}, "
            f"{num_samples}."
        )
    make_policy, train_episode, default_learning_rate = VARIANTS[variant]
    layers = _Layers(read_matrix, num_layers, num_keep, reward, dtype, seed, progress)
    layers.expect_visits(num_layers * (1 + episodes * (2 if variant == "paper" else 1) + 1))
    policy = make_policy(layers, _generator(seed, "policy"))
    magnitude, random = layers.survey(policy)

    # AdamW makes the step's size independent of the gradient's, so the clip only bounds its momentum's spikes.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate or default_learning_rate)
    best, best_reward, best_episode = copy.deepcopy(policy), 0.0, 0
    qualities: list[RowQuality] = []
    for episode in range(episodes + 1):
        snapshot = copy.deepcopy(policy)
        if episode < episodes:
            quality = train_episode(policy, optimizer, layers, episode, discount, num_samples)
        else:
            quality = layers.measure(policy)
        qualities.append(quality)
        mean_reward = sum(layers.reward(ks) for ks in quality.ks) / num_layers
        if mean_reward > best_reward:
            best, best_reward, best_episode = snapshot, mean_reward, episode
    rows = tuple(top_rows(layers.scores(best, layer), num_keep) for layer in range(num_layers))
    report = PolicyReport(qualities[0], qualities[best_episode], random, magnitude)
    return PolicyResult(
        best, rows, report, tuple(quality.mean_ks for quality in qualities), best_episode, variant, reward, seed
    )
