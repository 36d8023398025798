"""Choose MLP rows that preserve a matrix's spectrum, with a policy trained on the weights alone (PruneNet).

Sengupta et al., "You Only Prune Once", ICLR 2025, arXiv 2501.15296. The reward of a slice is 1 / KS, where KS is the
two-sample Kolmogorov-Smirnov statistic between the singular values of the matrix and those of the slice.

"paper" is the published policy with the published training. It ends at uniformly random rows: its loss only ever
raises keep probabilities (there is no baseline, and it is not the log-probability of the draw), so that within one
episode they are all 1; and its score is linear in the row, so that a row and its negative, which are one and the same
to the spectrum, get opposite scores. "spectral", the default, keeps reward, noise and REINFORCE, shows the policy each
row's share in every band of its own matrix's spectrum instead of the row, and takes the layer's other draws as the
baseline. docs/prunenet.md has the evidence and the measurements.

Every matrix is worked on by one thread, several matrices at a time: what comes out does not depend on how many threads
there are.

Letters: L layers, F intermediate size, D hidden size, K rows kept, B spectral bands.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import TypeVar

import torch
from torch import Tensor, nn

from evla_cli.errors import EvlaError, suggest
from evla_cli.methods.mlp_pruning import row_norms, top_rows
from evla_cli.methods.threads import single_threaded

Distance = Callable[[Tensor], float]  # kept rows (K) -> KS statistic against the whole matrix
Result = TypeVar("Result")

NUM_BANDS = 8  # bands with equally many singular values each, weakest first
_CHUNK_ROWS = 2048  # rows that are converted at a time
_BLOCK_COLUMNS = 512  # columns of a Gram matrix that are computed at a time, from the diagonal down


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
    history: tuple[float, ...]  # mean KS of the policy's top rows on its training layers, by the number of episodes
    best_episode: int  # where in the history the returned policy stands; 0 is the untrained one
    training_layers: tuple[int, ...]
    variant: str
    reward: str
    seed: int


def train_policy(
    read_matrix: Callable[[int], Tensor],
    num_layers: int,
    num_keep: int,
    *,
    num_training_layers: int = 8,
    episodes: int = 4,
    discount: float = 0.99,
    learning_rate: float | None = None,
    seed: int = 0,
    variant: str = "spectral",
    reward: str = "gram",
    num_samples: int = 4,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> PolicyResult:
    """Train one policy on the first MLP matrices (F, D) of some layers, keep the best seen, and apply it to all.

    As many matrices are in memory as torch has threads; `read_matrix` is called from as many threads. The training
    layers are spread evenly. `learning_rate` is 0.001 for "paper" and 0.1 for the few weights of "spectral" unless
    given. `num_samples` is the number of draws per layer and episode of "spectral"; "paper" has one. A spectrum that
    float32 cannot resolve is computed in float64. `progress(done, total)` counts visits to matrices.
    """
    if variant not in VARIANTS:
        raise EvlaError(f"Unknown PruneNet variant '{variant}'. {suggest(variant, VARIANTS)}")
    if reward not in REWARDS:
        raise EvlaError(f"Unknown PruneNet reward '{reward}'. {suggest(reward, REWARDS)}")
    if min(num_layers, num_training_layers) < 1 or episodes < 0 or num_samples < 2:
        got = f"{num_layers}, {num_training_layers}, {episodes}, {num_samples}"
        raise EvlaError(
            f"PruneNet needs num_layers >= 1, num_training_layers >= 1, episodes >= 0, num_samples >= 2, got {got}."
        )
    chosen = VARIANTS[variant]
    training = _spread(num_layers, num_training_layers)
    num_visits = len(training) * (episodes * chosen.visits + 1) + num_layers
    on_visit = None if progress is None else lambda done: progress(done, num_visits)
    with single_threaded() as num_threads, ThreadPool(num_threads) as workers:
        layers = _Layers(
            read_matrix, training, num_keep, chosen.policy, REWARDS[reward], dtype, seed, workers, on_visit
        )
        policy = chosen.policy(*layers.shape, _generator(seed, "policy")).to(dtype)
        rate = chosen.learning_rate if learning_rate is None else learning_rate
        optimizer = torch.optim.AdamW(policy.parameters(), lr=rate)
        untrained = best_policy = deepcopy(policy)
        best_episode = 0
        sweeps: list[list[_Choice]] = []
        for episode in range(episodes + 1):
            before = deepcopy(policy)
            if episode < episodes:
                sweeps.append(chosen.train_episode(policy, optimizer, layers, episode, discount, num_samples))
            else:
                sweeps.append(layers.sweep(lambda visit: layers.choose(visit, policy(visit.features)), training))
            if _mean_reward(sweeps[episode]) > _mean_reward(sweeps[best_episode]):
                best_policy, best_episode = before, episode

        def survey(visit: _Visit) -> tuple[_Choice, ...]:
            random = _uniform(visit.energy.numel(), seed, "random", visit.layer)
            scores = (untrained(visit.features), best_policy(visit.features), random, visit.energy)
            return tuple(layers.choose(visit, score) for score in scores)

        kinds = list(zip(*layers.sweep(survey, range(num_layers)), strict=True))
    rows = tuple(choice.rows for choice in kinds[1])
    history = tuple(_quality(sweep).mean_ks for sweep in sweeps)
    report = PolicyReport(*map(_quality, kinds))
    return PolicyResult(best_policy, rows, report, history, best_episode, training, variant, reward, seed)


def select_rows(policy: "Policy", gate: Tensor, num_keep: int) -> Tensor:
    """The policy's top rows of one matrix, ascending: no sampling, so two runs agree."""
    with torch.no_grad(), single_threaded():
        features, _, _ = describe(type(policy), gate, policy.dtype)
        return top_rows(policy(features), num_keep)


def describe(policy_type: type["Policy"], matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features, singular values and Gram matrix; in float64 where `dtype` cannot tell the smallest values from zero."""
    gram = gram_matrix(matrix, dtype)
    features, spectrum = policy_type.features_and_spectrum(matrix, gram)
    if dtype != torch.float64 and not bool(spectrum.all()):
        return describe(policy_type, matrix, torch.float64)
    return features, spectrum, gram


# The policies


class Policy(nn.Module):
    """Scores a matrix's rows: features (F, ...) of the matrix -> one score per row (F). Higher = keep."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @staticmethod
    def features_and_spectrum(matrix: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """The features of a matrix and its singular values, given its `gram_matrix`, in the latter's precision."""
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
    def features_and_spectrum(matrix: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        return matrix, _roots(torch.linalg.eigvalsh(gram)[-min(matrix.shape) :])

    def forward(self, features: Tensor) -> Tensor:
        # (W A^T + b) r of the published code, evaluated as W (A^T r) + b.r: no (F, F) product.
        direction = self.map.T @ self.vector
        return features.to(self.dtype) @ direction + self.bias @ self.vector  # (F, D) -> (F)


class SpectralPolicy(Policy):
    """One weight per band of the spectrum, shared by all layers. It sees a row's standardised shares in the bands.

    It starts with equal weights, which rank rows by their leverage score.
    """

    def __init__(self, intermediate_size: int, hidden_size: int, generator: torch.Generator):
        super().__init__()
        num_bands = min(NUM_BANDS, intermediate_size, hidden_size)
        self.weights = nn.Parameter(torch.full((num_bands,), num_bands**-0.5))

    @staticmethod
    def features_and_spectrum(matrix: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(gram)  # ascending
        values, vectors = values[-min(matrix.shape) :], vectors[:, -min(matrix.shape) :]
        shares = spectral_shares(matrix, values, vectors, min(NUM_BANDS, *matrix.shape))
        features = (shares - shares.mean(dim=0)) / shares.std(dim=0, correction=0).clamp_min(1e-12)
        return features, _roots(values)

    def forward(self, features: Tensor) -> Tensor:
        return features.to(self.dtype) @ self.weights  # (F, B) -> (F)


def spectral_shares(matrix: Tensor, values: Tensor, vectors: Tensor, num_bands: int) -> Tensor:
    """How much each row carries of every band of the matrix's spectrum, relative to the average row: (F, D) -> (F, B).

    `values` and `vectors` are those of W^T W that W = U S V^T has, ascending. The share of row j in a band is the mean
    of F * U[j, i]^2 over the band's singular values i; over all bands together it is the row's leverage score. It
    ignores the row's sign, the matrix's scale, and any rotation of the hidden space, as the singular values do, so that
    one policy can serve all layers.
    """
    alive = values > _noise_floor(values)  # a direction that the matrix lacks has no share in anything
    weights = matrix.shape[0] * alive / torch.where(alive, values, 1)
    parts = []
    for chunk in _chunks(matrix, values.dtype):
        squares = (chunk @ vectors).square_().mul_(weights)  # F * U^2: (chunk, D) -> (chunk, min(F, D))
        parts.append(torch.stack([band.mean(dim=1) for band in squares.tensor_split(num_bands, dim=1)], dim=1))
    return torch.cat(parts)


# Rewards


def singular_values(matrix: Tensor) -> Tensor:
    """All min(F, D) singular values, ascending, from the eigenvalues of the smaller Gram matrix.

    Squaring halves the range that is resolved (see `describe`), and takes 0.6 times as long as the SVD.
    """
    narrow = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return _roots(torch.linalg.eigvalsh(gram_matrix(narrow, matrix.dtype)))


def gram_matrix(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """W^T W, computed in `dtype`: its lower triangle, which is all that eigh and eigvalsh read."""
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=dtype)
    for chunk in _chunks(matrix, dtype):
        _add_gram(gram, chunk)
    return gram


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


def _exact_distance(matrix: Tensor, gram: Tensor, spectrum: Tensor) -> Distance:
    """As published: the singular values of the slice."""
    return lambda rows: ks_distance(spectrum, singular_values(matrix[rows].to(gram.dtype)))


def _gram_distance(matrix: Tensor, gram: Tensor, spectrum: Tensor) -> Distance:
    """The same up to rounding, from W^T W minus the Gram matrix of the removed rows: cheaper when few are removed."""

    def distance(rows: Tensor) -> float:
        removed = torch.ones(matrix.shape[0], dtype=torch.bool)
        removed[rows] = False
        rest = _add_gram(gram.clone(), matrix[removed].to(gram.dtype), alpha=-1)
        return ks_distance(spectrum, _roots(torch.linalg.eigvalsh(rest)[-min(rows.numel(), matrix.shape[1]) :]))

    return distance


REWARDS: dict[str, Callable[[Tensor, Tensor, Tensor], Distance]] = {"exact": _exact_distance, "gram": _gram_distance}


def _add_gram(gram: Tensor, rows: Tensor, alpha: float = 1) -> Tensor:
    for start in range(0, gram.shape[0], _BLOCK_COLUMNS):
        block = slice(start, start + _BLOCK_COLUMNS)
        gram[start:, block].addmm_(rows[:, start:].T, rows[:, block], alpha=alpha)
    return gram


def _chunks(matrix: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    return (chunk.to(dtype) for chunk in matrix.split(_CHUNK_ROWS))


def _roots(eigenvalues: Tensor) -> Tensor:
    # Rounding must not decide an order: what is numerically zero is zero, and two thirds of the digits count.
    mantissa, exponent = torch.frexp(torch.where(eigenvalues > _noise_floor(eigenvalues), eigenvalues, 0).sqrt())
    steps = 2 ** round(-math.log2(torch.finfo(eigenvalues.dtype).eps) * 2 / 3)
    return torch.ldexp((mantissa * steps).round() / steps, exponent)


def _noise_floor(eigenvalues: Tensor) -> Tensor:
    return 100 * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]


# Training


def _train_spectral(policy, optimizer, layers, episode, discount, num_samples) -> list["_Choice"]:
    """One REINFORCE step: the policy is fixed over the sweep, every layer is drawn several times and read once."""

    def step(visit: _Visit) -> tuple[_Choice, Tensor]:
        scores = policy(visit.features)
        paths = [(layers.seed, episode, visit.layer, sample) for sample in range(num_samples)]
        draws = [layers.choose(visit, _with_relaxed_bernoulli_noise(scores, *path)) for path in paths]
        # Under relaxed-Bernoulli noise row j is among the top K with probability p_j = sigmoid(score_j - t), and the
        # score function of the draw is sum_j (kept_j - p_j) d score_j (Pareto sampling, Rosen 1997). The baseline is
        # the mean of the layer's other draws; the advantages then sum to zero, and p drops out.
        total = sum(draw.reward for draw in draws)
        advantages = [(draw.reward - (total - draw.reward) / (num_samples - 1)) / num_samples for draw in draws]
        gains = [advantage * scores[draw.rows].sum() for advantage, draw in zip(advantages, draws, strict=True)]
        return layers.choose(visit, scores), torch.stack(gains).sum()

    choices, objectives = zip(*layers.sweep(step, layers.training), strict=True)
    discounts = discount ** torch.arange(len(objectives), dtype=policy.dtype)
    _ascend(policy, optimizer, (discounts * torch.stack(objectives)).mean())
    return list(choices)


def _train_paper(policy, optimizer, layers, episode, discount, num_samples) -> list["_Choice"]:
    """The published episode: one draw per layer with the policy fixed, then one step per layer, in order."""

    @torch.no_grad()
    def draw(visit: _Visit) -> tuple[_Choice, _Choice]:
        path = (layers.seed, episode, visit.layer)
        scores = policy(visit.features)
        # log(alpha) - log(1 - alpha) of the published code is the score itself, without its NaN when alpha is 1.
        keep = nn.functional.logsigmoid(_with_relaxed_bernoulli_noise(scores, *path, "noise"))
        # K rows in proportion to keep, without replacement, are the top K under Gumbel noise.
        gumbel = -torch.log(-torch.log(_uniform(keep.numel(), *path, "draw")))
        return layers.choose(visit, scores), layers.choose(visit, keep + gumbel.to(keep.dtype))

    choices, draws = zip(*layers.sweep(draw, layers.training), strict=True)

    def step(visit: _Visit) -> None:
        at = layers.training.index(visit.layer)
        path = (layers.seed, episode, visit.layer)
        keep = nn.functional.logsigmoid(_with_relaxed_bernoulli_noise(policy(visit.features), *path, "loss"))
        _ascend(policy, optimizer, keep[draws[at].rows].sum() * discount**at * draws[at].reward)

    for layer in layers.training:  # one after the other: each finds the policy that the one before has left
        layers.sweep(step, [layer])
    return list(choices)


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


# The layers


@dataclass(frozen=True)
class _Visit:
    """A layer while its matrix is in memory."""

    layer: int
    features: Tensor
    distance: Distance
    energy: Tensor  # squared norm of each row (F), float64


@dataclass(frozen=True)
class _Known:
    """What stays of a training layer when its matrix is gone."""

    features: Tensor | None  # None where they are the matrix
    spectrum: Tensor
    gram: Tensor
    energy: Tensor


@dataclass(frozen=True)
class _Choice:
    rows: Tensor
    ks: float
    frobenius_error: float
    reward: float


class _Layers:
    """Reads matrices, one per worker; remembers of the training layers what was computed."""

    def __init__(self, read_matrix, training, num_keep, policy_type, prepare_distance, dtype, seed, workers, on_visit):
        self.training, self.seed = training, seed
        self.shape: tuple[int, int] = tuple(read_matrix(0).shape)
        if not 1 <= num_keep <= self.shape[0]:
            raise EvlaError(f"Cannot keep {num_keep} of {self.shape[0]} MLP rows.")
        self._read_matrix, self._num_keep, self._dtype = read_matrix, num_keep, dtype
        self._policy_type, self._prepare_distance = policy_type, prepare_distance
        self._workers, self._on_visit, self._num_visits = workers, on_visit, 0
        self._known: dict[int, _Known] = {}

    def sweep(self, step: Callable[[_Visit], Result], layers: Iterable[int]) -> list[Result]:
        results = []
        for result in self._workers.imap(lambda layer: step(self._visit(layer)), layers):
            results.append(result)
            self._num_visits += 1
            if self._on_visit is not None:
                self._on_visit(self._num_visits)
        return results

    def choose(self, visit: _Visit, scores: Tensor) -> _Choice:
        rows = top_rows(scores.detach(), self._num_keep)
        ks = visit.distance(rows) if self._num_keep < self.shape[0] else 0.0
        removed = 1 - float(visit.energy[rows].sum() / visit.energy.sum())
        return _Choice(rows, ks, max(removed, 0.0) ** 0.5, ks_reward(ks, min(self.shape)))

    def _visit(self, layer: int) -> _Visit:
        matrix = self._read_matrix(layer)
        if matrix.shape != self.shape:
            raise EvlaError(
                f"PruneNet trains one policy for matrices of one shape; layer {layer} has {tuple(matrix.shape)}, "
                f"layer 0 has {self.shape}."
            )
        known = self._known.get(layer) or self._inspect(layer, matrix)
        if layer in self.training:
            self._known[layer] = known
        features = matrix if known.features is None else known.features
        return _Visit(layer, features, self._prepare_distance(matrix, known.gram, known.spectrum), known.energy)

    def _inspect(self, layer: int, matrix: Tensor) -> _Known:
        energy = row_norms(matrix).square()
        if not bool(torch.isfinite(energy).all()) or not bool(energy.any()):
            raise EvlaError(f"The MLP matrix of layer {layer} holds NaN or infinite values, or only zeros.")
        features, spectrum, gram = describe(self._policy_type, matrix, self._dtype)
        return _Known(None if features is matrix else features, spectrum, gram, energy)


def _spread(num_layers: int, num_chosen: int) -> tuple[int, ...]:
    """The middle layers of `num_chosen` equal parts."""
    num_chosen = min(num_chosen, num_layers)
    return tuple((2 * part + 1) * num_layers // (2 * num_chosen) for part in range(num_chosen))


def _quality(sweep: Sequence[_Choice]) -> RowQuality:
    return RowQuality(tuple(choice.ks for choice in sweep), tuple(choice.frobenius_error for choice in sweep))


def _mean_reward(sweep: Sequence[_Choice]) -> float:
    return sum(choice.reward for choice in sweep) / len(sweep)
