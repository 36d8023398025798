"""PruneNet: the published policy, the spectral one, and the reward that trains both."""

import math
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evla_cli.errors import EvlaError
from evla_cli.methods import prunenet
from evla_cli.methods.prunenet import (
    REWARDS,
    PruneNetPolicy,
    SpectralPolicy,
    gram_matrix,
    ks_distance,
    ks_reward,
    select_rows,
    singular_values,
    spectral_shares,
    top_rows,
    train_policy,
)

VARIANTS = ("spectral", "paper")


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only wait for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def matrices(num_layers=3, rows=24, columns=8, seed=0):
    """Matrices with uneven rows and spectra, float32, as read from a checkpoint."""
    generator = seeded(seed)
    scale = torch.linspace(0.3, 2, columns)
    return [torch.randn(rows, columns, generator=generator) * scale for _ in range(num_layers)]


# The statistic and the rewards


def naive_ks(a, b):
    """sup over x of |F_a(x) - F_b(x)|, counted point by point."""
    return max(abs(sum(v <= x for v in a) / len(a) - sum(v <= x for v in b) / len(b)) for x in [*a, *b])


@pytest.mark.parametrize(("num_a", "num_b"), [(1, 1), (7, 7), (9, 4), (50, 31)])
def test_ks_equals_a_count_point_by_point(num_a, num_b):
    for seed in range(20):
        # Multiples of 1/8 so that values are shared within and between the samples.
        a, b = (torch.randint(0, 40, (n,), generator=seeded(1000 * n + seed)) / 8 for n in (num_a, num_b))
        assert ks_distance(a, b) == pytest.approx(naive_ks(a.tolist(), b.tolist()), abs=1e-15)


def test_ks_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(40, generator=seeded(1)).double(), torch.randn(33, generator=seeded(2)).double() + 0.5
    assert ks_distance(a, b) == pytest.approx(stats.ks_2samp(a.numpy(), b.numpy()).statistic, abs=1e-15)


def test_ks_of_known_spectra():
    assert ks_distance(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])) == 0
    assert ks_distance(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])) == 1
    assert ks_distance(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 2.5])) == 0.25


def test_reward_of_identical_spectra_is_finite_and_beats_every_other():
    assert math.isfinite(ks_reward(0.0, 10))
    assert ks_reward(0.0, 10) > ks_reward(1 / 10, 10) == 10


@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (9, 9)])
def test_singular_values_equal_a_float64_svd(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=seeded())
    expected = np.sort(np.linalg.svd(matrix.numpy(), compute_uv=False))
    np.testing.assert_allclose(singular_values(matrix).numpy(), expected, rtol=1e-6)  # float32 results


def test_singular_values_of_a_deficient_matrix_are_exact_zeros():
    matrix = torch.randn(20, 3, dtype=torch.float64, generator=seeded()) @ torch.randn(
        3, 8, dtype=torch.float64, generator=seeded(1)
    )
    assert singular_values(matrix)[:5].tolist() == [0] * 5
    assert float(singular_values(matrix)[5]) > 0.1


def measure(reward, matrix, rows):
    return REWARDS[reward](matrix, gram_matrix(matrix, matrix.dtype), singular_values(matrix))(rows)


def full_ks(matrix, rows):
    whole, part = (np.linalg.svd(m.double().numpy(), compute_uv=False) for m in (matrix, matrix[rows]))
    return ks_distance(torch.from_numpy(whole), torch.from_numpy(part))


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30, 8), (12, 12), (10, 16)])
def test_reward_equals_full_svds_in_numpy(reward, dtype, shape):
    for seed in range(5):
        matrix = torch.randn(shape, dtype=dtype, generator=seeded(seed))
        rows = torch.randperm(shape[0], generator=seeded(100 + seed))[: shape[0] * 3 // 4].sort().values
        assert measure(reward, matrix, rows) == pytest.approx(full_ks(matrix, rows), abs=1e-12)


def power_law(rows, columns, decades, seed=0):
    """Long-tailed row norms, and singular values that fall by `decades` from the largest to the smallest direction."""
    generator = seeded(seed)
    scale = torch.logspace(0, -decades, columns)
    tails = torch.randn(rows, 1, generator=generator).mul(0.4).exp()
    rotation = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return tails * torch.randn(rows, columns, generator=generator) * scale @ rotation


@pytest.mark.parametrize("decades", [0.5, 1.5])
def test_float32_gram_is_within_the_bound_of_full_svds(decades):
    matrix = power_law(1100, 410, decades).bfloat16().float()
    for scores in (torch.rand(1100, generator=seeded(1)), matrix.norm(dim=1)):
        rows = top_rows(scores, 826)
        assert measure("gram", matrix, rows) == pytest.approx(full_ks(matrix, rows), abs=0.002)


@pytest.mark.parametrize("reward", REWARDS)
def test_spectra_too_wide_for_float32_are_computed_in_float64(reward):
    matrix = power_law(200, 60, 5)
    in_float32 = torch.linalg.eigvalsh(gram_matrix(matrix, torch.float32))
    assert float(in_float32[0]) < 1e-7 * float(in_float32[-1])  # rounding alone
    result = train_policy(lambda _: matrix, 1, 150, episodes=1, reward=reward)
    for quality, rows in ((result.report.after, result.rows[0]), (result.report.magnitude, None)):
        rows = top_rows(matrix.double().norm(dim=1), 150) if rows is None else rows
        assert quality.ks[0] == pytest.approx(full_ks(matrix, rows), abs=1e-12)


def test_gram_matrix_is_the_product_block_by_block(monkeypatch):
    monkeypatch.setattr(prunenet, "_BLOCK_COLUMNS", 4)
    monkeypatch.setattr(prunenet, "_CHUNK_ROWS", 7)
    matrix = torch.randn(30, 10, generator=seeded()).bfloat16()
    gram = gram_matrix(matrix, torch.float64)
    torch.testing.assert_close(gram.tril(), (matrix.double().T @ matrix.double()).tril(), rtol=1e-12, atol=1e-12)
    assert singular_values(matrix.double()).tolist() == pytest.approx(
        np.linalg.svd(matrix.double().numpy(), compute_uv=False)[::-1].tolist(), rel=1e-6
    )


@pytest.mark.parametrize("reward", REWARDS)
def test_removing_rows_of_zeros_changes_nothing(reward):
    matrix = torch.randn(30, 8, dtype=torch.float64, generator=seeded())
    matrix[::3] = 0
    rows = torch.nonzero(matrix.any(dim=1)).flatten()
    assert measure(reward, matrix, rows) == 0


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_singular_values_are_not_told_apart_by_rounding(reward, dtype):
    orthonormal = torch.linalg.qr(torch.randn(24, 8, dtype=dtype, generator=seeded())).Q
    matrix = torch.cat([orthonormal, torch.zeros(8, 8, dtype=dtype)])
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=dtype, generator=seeded(1))).Q
    reference = singular_values(matrix @ rotation)
    assert REWARDS[reward](matrix, gram_matrix(matrix, dtype), reference)(torch.arange(24)) == 0


# The policies


class LargestResult(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_published_policy_is_evaluated_without_the_square_product():
    rows, columns = 64, 8
    policy = PruneNetPolicy(rows, columns, seeded()).double()
    matrix = matrices(1, rows, columns)[0].double()
    with LargestResult() as watched, torch.no_grad():
        scores = policy(policy.features_and_spectrum(matrix, gram_matrix(matrix, matrix.dtype))[0])
    assert watched.largest <= rows * columns  # the published order makes a (rows, rows) product

    published = (matrix @ policy.map.T + policy.bias) @ policy.vector
    torch.testing.assert_close(scores, published, rtol=1e-12, atol=1e-12)  # the same sum in another order
    assert torch.equal(scores, matrix @ (policy.map.T @ policy.vector) + policy.bias @ policy.vector)


def test_spectral_shares_are_the_rows_energy_in_the_singular_vectors():
    matrix = matrices(1, 30, 8)[0].double()
    left, _, _ = np.linalg.svd(matrix.numpy(), full_matrices=False)  # descending
    squares = left[:, ::-1] ** 2 * 30
    expected = np.stack(
        [squares[:, :2].mean(1), squares[:, 2:4].mean(1), squares[:, 4:6].mean(1), squares[:, 6:].mean(1)]
    )
    shares = spectral_shares(matrix, *torch.linalg.eigh(matrix.T @ matrix), 4)
    np.testing.assert_allclose(shares.numpy(), expected.T, rtol=1e-9)
    torch.testing.assert_close(shares.mean(dim=0), torch.ones(4, dtype=torch.float64))  # the average row is 1


def test_spectral_policy_sees_what_the_spectrum_sees():
    """Signs of rows, scale and a rotated hidden space leave the singular values alone, and so the choice of rows."""
    policy = SpectralPolicy(40, 8, seeded()).double()
    matrix = matrices(1, 40, 8)[0].double()
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=seeded(3))).Q
    signs = torch.randint(0, 2, (40, 1), generator=seeded(4)) * 2 - 1
    assert torch.equal(select_rows(policy, matrix, 30), select_rows(policy, 5 * signs * matrix @ rotation, 30))


@pytest.mark.parametrize("shape", [(40, 8), (6, 20), (5, 1)])
def test_spectral_policy_takes_any_shape_and_missing_directions(shape):
    matrix = torch.randn(shape, generator=seeded())
    matrix[:, -1] = 0 if shape[1] > 1 else 1
    features, _ = SpectralPolicy.features_and_spectrum(matrix, gram_matrix(matrix, torch.float64))
    scores = SpectralPolicy(*shape, seeded())(features)
    assert scores.shape == shape[:1]
    assert bool(torch.isfinite(scores).all())


def test_top_rows_break_ties_by_the_lower_index():
    assert top_rows(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]), 3).tolist() == [0, 1, 3]
    assert top_rows(torch.zeros(1000), 10).tolist() == list(range(10))
    assert top_rows(torch.zeros(3), 2).dtype == torch.int64


@pytest.mark.parametrize("variant", VARIANTS)
def test_selection_does_not_draw(variant):
    result = train_policy(matrices().__getitem__, 3, 16, episodes=1, variant=variant)
    state = torch.get_rng_state()
    first, second = (select_rows(result.policy, matrices()[1], 16) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


# Training


def planted(layer):
    """64 rows in 16 dimensions; the 20 returned ones are long and share two directions that no other row uses.

    With any 16 of the 20 removed, 2 of the 16 singular values move and KS is 2/16; other choices move nearly all.
    Magnitude keeps all 20; order and directions differ from layer to layer.
    """
    generator = seeded(layer)
    rest = torch.randn(44, 14, generator=generator, dtype=torch.float64)
    shared = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    matrix = torch.block_diag(rest / rest.norm(dim=1, keepdim=True), 8 * shared / shared.norm(dim=1, keepdim=True))
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(64, generator=generator)
    return (matrix @ rotation)[order], torch.nonzero(order >= 44).flatten()


def test_training_finds_the_rows_that_the_spectrum_can_spare(monkeypatch):
    def reversed_start(self, *arguments):
        original(self, *arguments)
        self.weights.data.neg_()  # as it stands, the start finds them without training

    original = SpectralPolicy.__init__
    monkeypatch.setattr(SpectralPolicy, "__init__", reversed_start)
    result = train_policy(lambda layer: planted(layer)[0], 10, 48, episodes=20, learning_rate=0.2, seed=1)
    report = result.report
    assert min(report.before.mean_ks, report.random.mean_ks, report.magnitude.mean_ks) > 1.4 * 2 / 16
    assert report.after.ks == (2 / 16,) * 10
    assert result.training_layers == (0, 1, 3, 4, 5, 6, 8, 9)
    for layer, rows in enumerate(result.rows):  # those that it was not trained on among them
        removed = set(range(64)) - set(rows.tolist())
        assert removed < set(planted(layer)[1].tolist()), f"layer {layer}"


@pytest.mark.parametrize("seed", [0, 1])
def test_training_beats_random_rows_on_uneven_matrices(seed):
    layers = [
        matrix * torch.rand(96, 1, generator=seeded(50 + at)).add(0.5) for at, matrix in enumerate(matrices(6, 96, 32))
    ]
    report = train_policy(layers.__getitem__, 6, 72, episodes=10, seed=seed).report
    assert report.after.mean_ks < 0.8 * report.random.mean_ks
    assert report.after.mean_ks <= report.before.mean_ks


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_rows_whatever_the_number_of_threads(variant):
    layers = matrices(3, 300, 60)  # large enough for the linear algebra to use both threads
    results = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(train_policy(layers.__getitem__, 3, 225, episodes=3, seed=5, variant=variant))
    for other in results[1:]:
        assert [rows.tolist() for rows in other.rows] == [rows.tolist() for rows in results[0].rows]
        assert other.report == results[0].report
        assert other.history == results[0].history


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_seed_is_another_run(variant):
    layers = matrices(3, 96, 32)
    first, second = (train_policy(layers.__getitem__, 3, 72, episodes=2, seed=s, variant=variant) for s in (0, 1))
    assert first.history[1:] != second.history[1:]  # the spectral policy always starts the same
    assert first.report.random != second.report.random
    assert first.report.magnitude == second.report.magnitude


def test_both_rewards_train_the_same_policy():
    exact, gram = (train_policy(matrices().__getitem__, 3, 16, episodes=4, reward=reward) for reward in REWARDS)
    assert exact.history == gram.history
    assert all(torch.equal(a, b) for a, b in zip(exact.rows, gram.rows, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_result_describes_the_policy_it_returns(variant):
    layers = matrices(4, 48, 12)
    result = train_policy(layers.__getitem__, 4, 36, episodes=6, variant=variant)
    assert len(result.history) == 7
    assert result.report.before.mean_ks == result.history[0]
    assert result.report.after.mean_ks == result.history[result.best_episode]
    rewards = [1 / ks for ks in result.report.after.ks]
    assert sum(rewards) >= sum(1 / ks for ks in result.report.before.ks)
    for layer, matrix in enumerate(layers):
        rows = select_rows(result.policy, matrix, 36)
        assert torch.equal(rows, result.rows[layer])
        whole, part = (np.linalg.svd(m.double().numpy(), compute_uv=False) for m in (matrix, matrix[rows]))
        assert result.report.after.ks[layer] == pytest.approx(naive_ks(whole.tolist(), part.tolist()), abs=1e-12)
        removed = torch.ones(48, dtype=torch.bool)
        removed[rows] = False
        error = float(matrix[removed].norm() / matrix.norm())
        assert result.report.after.frobenius_error[layer] == pytest.approx(error, rel=1e-5)
    largest = sorted(range(48), key=lambda row: -float(layers[0][row].norm()))[:36]
    kept = np.linalg.svd(layers[0][sorted(largest)].double().numpy(), compute_uv=False)
    whole = np.linalg.svd(layers[0].double().numpy(), compute_uv=False)
    assert result.report.magnitude.ks[0] == pytest.approx(naive_ks(whole.tolist(), kept.tolist()), abs=1e-12)
    assert "magnitude" in result.report.table()


@pytest.mark.parametrize("variant", VARIANTS)
def test_keeping_every_row_is_exact(variant):
    result = train_policy(matrices().__getitem__, 3, 24, episodes=1, variant=variant)
    assert all(rows.tolist() == list(range(24)) for rows in result.rows)
    assert result.report.after.ks == (0.0,) * 3
    assert result.report.after.frobenius_error == (0.0,) * 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_matrix_is_in_memory_at_a_time(variant):
    alive: list[weakref.ref] = []
    most = 0

    def read(layer):
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        matrix = matrices()[layer].double()
        alive.append(weakref.ref(matrix))
        return matrix

    train_policy(read, 3, 16, episodes=2, variant=variant)
    assert most == 0  # every earlier one is gone when the next is read


@pytest.mark.parametrize("variant", VARIANTS)
def test_matrices_are_not_written_to(variant):
    for dtype in (torch.float32, torch.float64):  # those that are computed in: a view would be enough
        layers = [matrix.to(dtype) for matrix in matrices()]
        before = [matrix.clone() for matrix in layers]
        train_policy(layers.__getitem__, 3, 16, episodes=2, variant=variant, dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(layers, before, strict=True))


def test_failure_in_a_worker_is_the_callers_and_leaves_torch_as_it_was():
    torch.set_num_threads(2)
    layers = matrices()
    layers[1][3, 2] = float("nan")
    with pytest.raises(EvlaError, match="layer 1"):
        train_policy(layers.__getitem__, 3, 16)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_progress_counts_every_matrix_read(variant):
    seen, reads = [], []

    def read(layer):
        reads.append(layer)
        return matrices()[layer]

    train_policy(read, 3, 16, episodes=2, variant=variant, progress=lambda done, total: seen.append((done, total)))
    num_visits = len(reads) - 1  # the first only asks for the shape
    assert seen == [(done, num_visits) for done in range(1, num_visits + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_policy_neither_fails_nor_turns_nan(monkeypatch, dtype):
    """The published log(alpha) - log(1 - alpha) is NaN as soon as a keep probability rounds to 1."""

    def saturated(self, *arguments):
        original(self, *arguments)
        self.vector.data.mul_(1e6)

    original = PruneNetPolicy.__init__
    monkeypatch.setattr(PruneNetPolicy, "__init__", saturated)
    result = train_policy(matrices().__getitem__, 3, 16, episodes=2, variant="paper", dtype=dtype)
    with torch.no_grad():
        scores = result.policy(matrices()[0].to(dtype))
    assert float(torch.sigmoid(scores).max()) == 1
    assert all(bool(torch.isfinite(parameter).all()) for parameter in result.policy.parameters())
    assert all(len(set(rows.tolist())) == 16 for rows in result.rows)


def test_relaxed_bernoulli_noise_keeps_rows_in_proportion():
    """P(row among the top K) = sigmoid(score - t): what the gradient of the spectral variant rests on."""
    scores = torch.linspace(-3, 3, 60, dtype=torch.float64)
    noisy = prunenet._with_relaxed_bernoulli_noise(scores.repeat(4000), "test").view(4000, 60)
    kept = torch.zeros(4000, 60).scatter_(1, noisy.topk(40, dim=1).indices, 1).mean(dim=0)
    low, high = -10.0, 10.0
    for _ in range(60):  # the threshold at which 40 rows are expected
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.sigmoid(scores - middle).sum()) > 40 else (low, middle)
    # 4000 draws: standard deviation at most 0.008; the approximation itself is of order 1/60
    assert float((kept - torch.sigmoid(scores - low)).abs().max()) < 0.04


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    train_policy(matrices().__getitem__, 3, 16, episodes=1)
    assert torch.equal(state, torch.get_rng_state())


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "spectrel"}, "Did you mean 'spectral'"),
        ({"reward": "exakt"}, "Did you mean 'exact'"),
        ({"episodes": -1}, "episodes"),
        ({"num_samples": 1}, "num_samples"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(EvlaError, match=message):
        train_policy(matrices().__getitem__, 3, 16, **options)


@pytest.mark.parametrize("num_keep", [0, 25])
def test_impossible_counts_are_refused(num_keep):
    with pytest.raises(EvlaError, match="Cannot keep"):
        train_policy(matrices().__getitem__, 3, num_keep)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_refused_by_layer(bad):
    layers = matrices()
    layers[2][5, 1] = bad
    with pytest.raises(EvlaError, match="layer 2"):
        train_policy(layers.__getitem__, 3, 16)


def test_matrices_of_different_shapes_are_refused():
    layers = [*matrices(2), torch.randn(20, 8)]
    with pytest.raises(EvlaError, match="layer 2"):
        train_policy(layers.__getitem__, 3, 16)
