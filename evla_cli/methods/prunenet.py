"""Choose MLP rows that preserve a matrix's spectrum, with a policy trained on the weights alone (PruneNet).

Sengupta et al., "You Only Prune Once", ICLR 2025, arXiv 2501.15296. The reward of a slice is 1 / KS, where KS is the
two-sample Kolmogorov-Smirnov statistic between the singular values of the matrix and those of the slice.

"paper" is the published policy with the published training. It ends at uniformly random rows: its loss only ever
raises keep probabilities (there is no baseline, and it is not the log-probability of the draw), so that within one
episode they are all 1; and its score is linear in the row, so that a row and its negative, which are one and the same
to the spectrum, get opposite scores. "spectral", the default, keeps reward, noise and REINFORCE, shows the policy each
row's share in every band of its own matrix's spectrum instead of the row, and takes the layer's other draws as the
baseline. docs/prunenet.md has the evidence and the measurements.

Letters: L layers, F intermediate size, D hidden size, K rows kept, B spectral bands.
"""

import hashlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evla_cli.errors import EvlaError, suggest

Distance = Callable[[Tensor], float]  # kept rows (K) -> KS statistic against the whole matrix

NUM_BANDS = 8  # bands with equally many singular values each, weakest first


@dataclass(frozen=True)
class RowQuality:
    """How well one choice of rows preserves each layer's matrix. Lower is better for both."""

    ks: tuple[float, ...]
    frobenius_error: tuple[float, ...]  # norm of the removed rows / norm of the matrix; for information only

    @property
    def mean_ks(self) -> float:
        return sum(self.ks) / len(self.ks)

    @property
    def mean_frobenius_error(self) -> float:
        return sum(self.frobenius_error) / len(self.frobenius_error)


@dataclass(frozen=True)
class PolicyReport:
    """The trained policy's rows beside the untrained policy's and two rules that need no training."""

    before: RowQuality
    after: RowQuality
    random: RowQuality
    magnitude: RowQuality  # largest norms of the same matrix's rows

    def table(self) -> str:
        lines = [f"{'rows':<10} {'mean KS':>8} {'min':>7} {'max':>7} {'rel. error':>11}"]
        for name in ("before", "after", "random", "magnitude"):
            quality: RowQuality = getattr(self, name)
            spread = f"{quality.mean_ks:8.4f} {min(quality.ks):7.4f} {max(quality.ks):7.4f}"
            lines.append(f"{name:<10} {spread} {quality.mean_frobenius_error:11.4f}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PolicyResult:
    """A trained policy, the rows it keeps, and how it got there."""

    policy: "Policy"
    rows: tuple[Tensor, ...]  # one (K) per layer, ascending: what select_rows gives, without the work
    report: PolicyReport
    history: tuple[float, ...]  # mean KS of the policy's top rows before each episode, and after the last
    best_episode: int  # where in the history the returned policy stands; 0 is the untrained one
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
    """Train one policy for the first MLP matrices (F, D) of all layers, reading one at a time, and keep the best seen.

    `learning_rate` is 0.001 for "paper" and 0.1 for the few weights of "spectral" unless given. `num_samples` is the
    number of draws per layer and episode of "spectral"; "paper" has one. `progress(done, total)` counts matrices read.
    """
    if variant not in VARIANTS:
        raise EvlaError(f"Unknown PruneNet variant '{variant}'. {suggest(variant, VARIANTS)}")
    if reward not in REWARDS:
        raise EvlaError(f"Unknown PruneNet reward '{reward}'. {suggest(reward, REWARDS)}")
    if num_layers < 1 or episodes < 0 or num_samples < 2:
        got = f"{num_layers}, {episodes}, {num_samples}"
        raise EvlaError(f"PruneNet needs num_layers >= 1, episodes >= 0, num_samples >= 2, got {got}.")
    chosen = VARIANTS[variant]
    layers = _Layers(read_matrix, num_layers, num_keep, chosen.policy, REWARDS[reward], dtype, seed)
    num_visits = num_layers * (2 + episodes * chosen.visits)
    layers.on_visit = None if progress is None else lambda done: progress(done, num_visits)

    random, magnitude = layers.reference_rows()
    policy = chosen.policy(*layers.shape, _generator(seed, "policy")).to(dtype)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate or chosen.learning_rate)
    best_policy, best_episode = deepcopy(policy), 0
    sweeps: list[list[_Choice]] = []
    for episode in range(episodes + 1):
        before = deepcopy(policy)
        if episode < episodes:
            sweeps.append(chosen.train_episode(policy, optimizer, layers, episode, discount, num_samples))
        else:
            sweeps.append(layers.sweep(lambda visit: layers.choose(visit, policy(visit.features))))
        if _mean_reward(sweeps[episode]) > _mean_reward(sweeps[best_episode]):
            best_policy, best_episode = before, episode

    report = PolicyReport(*(_quality(sweep) for sweep in (sweeps[0], sweeps[best_episode], random, magnitude)))
    rows = tuple(choice.rows for choice in sweeps[best_episode])
    history = tuple(_quality(sweep).mean_ks for sweep in sweeps)
    return PolicyResult(best_policy, rows, report, history, best_episode, variant, reward, seed)


def select_rows(policy: "Policy", gate: Tensor, num_keep: int) -> Tensor:
    """The policy's top rows of one matrix, ascending: no sampling, so two runs agree."""
    with torch.no_grad():
        return top_rows(policy(policy.features(gate.to(policy.dtype))), num_keep)


def top_rows(scores: Tensor, num_keep: int) -> Tensor:
    """Rows of the highest scores; ties go to the lower index; ascending int64."""
    if not 1 <= num_keep <= scores.numel():
        raise EvlaError(f"Cannot keep {num_keep} of {scores.numel()} MLP rows; keep 1 to {scores.numel()}.")
    return torch.sort(scores, descending=True, stable=True).indices[:num_keep].sort().values


# The policies


class Policy(nn.Module):
    """Scores a matrix's rows: features (F, ...) of the matrix -> one score per row (F). Higher = keep."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @staticmethod
    def features(matrix: Tensor) -> Tensor:
        raise NotImplementedError


class PruneNetPolicy(Policy):
    """The published policy: a linear map from hidden to intermediate size, then one vector. It sees the row itself."""

    def __init__(self, intermediate_size: int, hidden_size: int, generator: torch.Generator):
        super().__init__()
        bound = hidden_size**-0.5  # torch's default for a linear layer; the vector is uniform in [0, 1) as published
        self.map = nn.Parameter((2 * torch.rand(intermediate_size, hidden_size, generator=generator) - 1) * bound)
        self.bias = nn.Parameter((2 * torch.rand(intermediate_size, generator=generator) - 1) * bound)
        self.vector = nn.Parameter(torch.rand(intermediate_size, generator=generator))

    @staticmethod
    def features(matrix: Tensor) -> Tensor:
        return matrix

    def forward(self, features: Tensor) -> Tensor:
        # (W A^T + b) r of the published code, evaluated as W (A^T r) + b.r: no (F, F) product.
        return features @ (self.map.T @ self.vector) + self.bias @ self.vector  # (F, D) -> (F)


class SpectralPolicy(Policy):
    """One weight per band of the spectrum, shared by all layers. It sees a row's standardised shares in the bands."""

    def __init__(self, intermediate_size: int, hidden_size: int, generator: torch.Generator):
        super().__init__()
        num_bands = min(NUM_BANDS, intermediate_size, hidden_size)
        self.weights = nn.Parameter((2 * torch.rand(num_bands, generator=generator) - 1) * num_bands**-0.5)

    @staticmethod
    def features(matrix: Tensor) -> Tensor:
        shares = spectral_shares(matrix, min(NUM_BANDS, *matrix.shape))
        return (shares - shares.mean(dim=0)) / shares.std(dim=0, correction=0).clamp_min(1e-12)

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weights  # (F, B) -> (F)


def spectral_shares(matrix: Tensor, num_bands: int) -> Tensor:
    """How much each row carries of every band of the matrix's spectrum, relative to the average row: (F, D) -> (F, B).

    With W = U S V^T, the share of row j in a band is the mean of F * U[j, i]^2 over the band's singular values i; over
    all bands together it is the row's leverage score. It ignores the row's sign, the matrix's scale, and any rotation
    of the hidden space, as the singular values do, so that one policy can serve all layers.
    """
    num_rows, num_columns = matrix.shape
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)  # ascending
    values, vectors = values[-min(num_rows, num_columns) :], vectors[:, -min(num_rows, num_columns) :]
    alive = values > _noise_floor(values)  # a direction that the matrix lacks has no share in anything
    left = matrix @ (vectors * torch.where(alive, values, 1).rsqrt() * alive)  # (F, D) -> (F, min(F, D)), columns of U
    bands = left.square_().tensor_split(num_bands, dim=1)
    return torch.stack([num_rows * band.mean(dim=1) for band in bands], dim=1)


# Rewards


def singular_values(matrix: Tensor) -> Tensor:
    """All min(F, D) singular values, ascending, as float32, from the eigenvalues of the smaller Gram matrix.

    In float64 that is as good as the SVD for this purpose (errors below 1e-7 of the largest value, where KS only asks
    for their order), at 0.6 times its cost; a float32 SVD would cost more than the float64 Gram matrix.
    """
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    return _roots(torch.linalg.eigvalsh(gram))


def ks_distance(spectrum_a: Tensor, spectrum_b: Tensor) -> float:
    """Two-sample Kolmogorov-Smirnov statistic: the largest gap between the two empirical distribution functions."""
    a, b = spectrum_a.sort().values, spectrum_b.sort().values
    at = torch.cat([a, b])
    below_a = torch.searchsorted(a, at, right=True).double() / a.numel()
    below_b = torch.searchsorted(b, at, right=True).double() / b.numel()
    return float((below_a - below_b).abs().max())


def ks_reward(ks: float, num_values: int) -> float:
    """1 / KS. Identical spectra (the published code's 99999) count as half of the smallest step that KS can make."""
    return 1 / max(ks, 0.5 / num_values)


def _exact_distance(matrix: Tensor, spectrum: Tensor) -> Distance:
    """As published: the singular values of the slice."""
    return lambda rows: ks_distance(spectrum, singular_values(matrix[rows]))


def _gram_distance(matrix: Tensor, spectrum: Tensor) -> Distance:
    """The same up to rounding, from W^T W minus the Gram matrix of the removed rows: cheaper when few are removed."""
    gram = matrix.T @ matrix

    def distance(rows: Tensor) -> float:
        removed = torch.ones(matrix.shape[0], dtype=torch.bool)
        removed[rows] = False
        gone = matrix[removed]
        values = torch.linalg.eigvalsh(gram - gone.T @ gone)[-min(rows.numel(), matrix.shape[1]) :]
        return ks_distance(spectrum, _roots(values))

    return distance


REWARDS: dict[str, Callable[[Tensor, Tensor], Distance]] = {"exact": _exact_distance, "gram": _gram_distance}


def _roots(eigenvalues: Tensor) -> Tensor:
    # Rounding must not decide an order: what is numerically zero is zero, and float32 merges what differs by rounding.
    eigenvalues = torch.where(eigenvalues > _noise_floor(eigenvalues), eigenvalues, 0)
    return eigenvalues.sqrt().float()


def _noise_floor(eigenvalues: Tensor) -> Tensor:
    return 100 * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]


# Training


def _train_spectral(policy, optimizer, layers, episode, discount, num_samples) -> list["_Choice"]:
    """One REINFORCE step: the policy is fixed over the sweep, every layer is drawn several times and read once."""
    objective = torch.zeros((), dtype=policy.dtype)

    def step(visit: _Visit) -> _Choice:
        nonlocal objective
        scores = policy(visit.features)
        paths = [(layers.seed, episode, visit.layer, sample) for sample in range(num_samples)]
        draws = [layers.choose(visit, _with_relaxed_bernoulli_noise(scores, *path)) for path in paths]
        # Under relaxed-Bernoulli noise row j is among the top K with probability p_j = sigmoid(score_j - t), and the
        # score function of the draw is sum_j (kept_j - p_j) d score_j (Pareto sampling, Rosen 1997). The baseline is
        # the mean of the layer's other draws; the advantages then sum to zero, and p drops out.
        total = sum(draw.reward for draw in draws)
        for draw in draws:
            advantage = (draw.reward - (total - draw.reward) / (num_samples - 1)) / num_samples
            objective = objective + discount**visit.layer * advantage * scores[draw.rows].sum()
        return layers.choose(visit, scores)

    choices = layers.sweep(step)
    _ascend(policy, optimizer, objective / len(choices))
    return choices


def _train_paper(policy, optimizer, layers, episode, discount, num_samples) -> list["_Choice"]:
    """The published episode: one draw per layer with the policy fixed, then one step per layer, in order."""
    draws: list[_Choice] = []

    @torch.no_grad()
    def draw(visit: _Visit) -> _Choice:
        path = (layers.seed, episode, visit.layer)
        scores = policy(visit.features)
        # log(alpha) - log(1 - alpha) of the published code is the score itself, without its NaN when alpha is 1.
        keep = nn.functional.logsigmoid(_with_relaxed_bernoulli_noise(scores, *path, "noise"))
        # K rows in proportion to keep, without replacement, are the top K under Gumbel noise.
        gumbel = -torch.log(-torch.log(_uniform(keep.numel(), *path, "draw")))
        draws.append(layers.choose(visit, keep + gumbel.to(keep.dtype)))
        return layers.choose(visit, scores)

    def step(visit: _Visit) -> None:
        path = (layers.seed, episode, visit.layer)
        keep = nn.functional.logsigmoid(_with_relaxed_bernoulli_noise(policy(visit.features), *path, "loss"))
        drawn = draws[visit.layer]
        _ascend(policy, optimizer, keep[drawn.rows].sum() * discount**visit.layer * drawn.reward)

    choices = layers.sweep(draw)
    layers.sweep(step)
    return choices


@dataclass(frozen=True)
class _Variant:
    policy: type[Policy]
    train_episode: Callable[..., list["_Choice"]]
    learning_rate: float
    visits: int  # how often an episode reads each matrix


VARIANTS = {
    "spectral": _Variant(SpectralPolicy, _train_spectral, learning_rate=0.1, visits=1),
    "paper": _Variant(PruneNetPolicy, _train_paper, learning_rate=0.001, visits=2),
}


def _ascend(policy: Policy, optimizer: torch.optim.Optimizer, objective: Tensor) -> None:
    optimizer.zero_grad()
    (-objective).backward()
    # The published code clips after the step and zero_grad, where it has no effect.
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def _uniform(num: int, *path: object) -> Tensor:
    """Draws inside (0, 1), float64, that depend on seed, episode, layer and draw alone."""
    return torch.rand(num, generator=_generator(*path), dtype=torch.float64).clamp(1e-12, 1 - 1e-12)


def _with_relaxed_bernoulli_noise(scores: Tensor, *path: object) -> Tensor:
    return scores + torch.logit(_uniform(scores.numel(), *path)).to(scores.dtype)


def _generator(*path: object) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, path)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


# The layers, one matrix in memory at a time


@dataclass(frozen=True)
class _Visit:
    layer: int
    features: Tensor
    distance: Distance
    energy: Tensor  # squared norm of each row (F), float64


@dataclass(frozen=True)
class _Choice:
    rows: Tensor
    ks: float
    frobenius_error: float
    reward: float


class _Layers:
    """Reads matrices; remembers of each only its spectrum and, where they are small, the policy's features."""

    def __init__(self, read_matrix, num_layers, num_keep, policy_type, prepare_distance, dtype, seed):
        self.read_matrix, self.num_layers, self.num_keep = read_matrix, num_layers, num_keep
        self.policy_type, self.prepare_distance, self.dtype, self.seed = policy_type, prepare_distance, dtype, seed
        self.shape: tuple[int, int] = (0, 0)
        self.on_visit: Callable[[int], None] | None = None
        self._num_visits = 0
        self._spectra: dict[int, Tensor] = {}
        self._features: dict[int, Tensor] = {}

    def sweep(self, step: Callable[[_Visit], Any]) -> list[Any]:
        results = []
        for layer in range(self.num_layers):
            results.append(step(self._visit(layer)))  # the visit, and with it the matrix, ends with the call
            self._num_visits += 1
            if self.on_visit is not None:
                self.on_visit(self._num_visits)
        return results

    def choose(self, visit: _Visit, scores: Tensor) -> _Choice:
        rows = top_rows(scores.detach(), self.num_keep)
        ks = visit.distance(rows)
        removed = 1 - float(visit.energy[rows].sum() / visit.energy.sum())
        return _Choice(rows, ks, max(removed, 0.0) ** 0.5, ks_reward(ks, min(self.shape)))

    def reference_rows(self) -> tuple[list[_Choice], list[_Choice]]:
        """Uniformly random rows, and the rows of largest norm."""

        def both(visit: _Visit) -> tuple[_Choice, _Choice]:
            noise = _uniform(visit.energy.numel(), self.seed, "random", visit.layer)
            return self.choose(visit, noise), self.choose(visit, visit.energy)

        pairs = self.sweep(both)
        return [random for random, _ in pairs], [magnitude for _, magnitude in pairs]

    def _visit(self, layer: int) -> _Visit:
        matrix = self.read_matrix(layer).to(self.dtype)
        if layer == 0 and not self._spectra:
            self.shape = (matrix.shape[0], matrix.shape[1])
            if not 1 <= self.num_keep <= matrix.shape[0]:
                raise EvlaError(f"Cannot keep {self.num_keep} of {matrix.shape[0]} MLP rows.")
        if matrix.shape != self.shape:
            raise EvlaError(
                f"PruneNet trains one policy for matrices of one shape; layer {layer} has {tuple(matrix.shape)}, "
                f"layer 0 has {self.shape}."
            )
        energy = matrix.square().sum(dim=1, dtype=torch.float64)
        if not bool(torch.isfinite(energy).all()) or not bool(energy.any()):
            raise EvlaError(f"The MLP matrix of layer {layer} holds NaN or infinite values, or only zeros.")
        if layer not in self._spectra:
            self._spectra[layer] = singular_values(matrix)
        features = self._features.get(layer)
        if features is None:
            features = self.policy_type.features(matrix)
            if features is not matrix:
                self._features[layer] = features
        return _Visit(layer, features, self.prepare_distance(matrix, self._spectra[layer]), energy)


def _quality(sweep: list[_Choice]) -> RowQuality:
    return RowQuality(tuple(choice.ks for choice in sweep), tuple(choice.frobenius_error for choice in sweep))


def _mean_reward(sweep: list[_Choice]) -> float:
    return sum(choice.reward for choice in sweep) / len(sweep)
