"""PruneNet: what the policy sees, the reward that trains it, and what comes of the training."""

import numpy as np
import pytest
import torch

from evla_cli.errors import EvlaError
from evla_cli.methods.mlp_pruning import activation_scores, top_rows
from evla_cli.methods.prunenet import describe, energy_ks, train_policy

LAYERS, ROWS, COLUMNS = 3, 60, 12


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only wait for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def uneven(*shape, generator):
    """Rows whose norms differ by their own factors."""
    return torch.randn(*shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).div(2).exp()


def mlp(layer, rows=ROWS, columns=COLUMNS):
    generator = torch.Generator().manual_seed(layer)
    gate, up, down = (uneven(rows, columns, generator=generator) for _ in range(3))
    return gate, up, down.T.contiguous()


def rms(layer, rows=ROWS):
    return torch.randn(rows, generator=torch.Generator().manual_seed(100 + layer)).div(2).exp()


def train(num_keep=45, num_layers=LAYERS, **options):
    return train_policy(mlp, rms, num_layers, num_keep, **options)


def energies():
    return [activation_scores(rms(layer), mlp(layer)[2]).square() for layer in range(LAYERS)]


class TestReward:
    @pytest.mark.parametrize("shape", [(60, 12), (10, 24)])
    @pytest.mark.parametrize("num_keep", [1, 7, 9])
    def test_ks_is_the_largest_gap_between_energy_spectra(self, shape, num_keep):
        """Summed up over the singular values of the weighted matrix, largest first, as numpy finds them."""
        gate, up, down = mlp(0, *shape)
        weighted = (down.double() * rms(0, shape[0]).double()).T.numpy()
        rows = top_rows(torch.rand(shape[0], generator=torch.Generator().manual_seed(1)), num_keep)
        whole, part = (np.linalg.svd(matrix, compute_uv=False) ** 2 for matrix in (weighted, weighted[rows.numpy()]))
        part = np.pad(part, (0, len(whole) - len(part)))
        gaps = np.abs(whole.cumsum() - part.cumsum()) / whole.sum()
        _, energy = describe((gate, up, down), rms(0, shape[0]), "layer 0")
        assert energy_ks(energy, rows) == pytest.approx(gaps.max(), rel=1e-9)
        assert gaps.argmax() == len(gaps) - 1

    def test_all_rows_lose_nothing(self):
        _, energy = describe(mlp(0), rms(0), "layer 0")
        assert energy_ks(energy, torch.arange(ROWS)) == 0.0
        assert train(ROWS).history == (0.0,) * 41


class TestWhatThePolicySees:
    def test_logarithms_in_units_of_their_deviation(self):
        (gate, up, down), channels = mlp(1), rms(1)
        parts, _ = describe((gate, up, down), channels, "layer 1")
        sizes = np.stack([channels, down.norm(dim=0), gate.norm(dim=1), up.norm(dim=1)], axis=1).astype(float)
        expected = np.log(sizes)
        np.testing.assert_allclose(parts, (expected - expected.mean(0)) / expected.std(0), atol=1e-5)

    def test_scale_does_not_count(self):
        (gate, up, down), channels = mlp(1), rms(1)
        parts, energy = describe((gate, up, down), channels, "layer 1")
        other, of_other = describe((gate * 8, up / 4, down * 2), channels * 16, "layer 1")
        torch.testing.assert_close(parts, other)
        torch.testing.assert_close(energy, of_other)

    def test_a_channel_that_is_never_used_does_not_stretch_the_scale(self):
        channels = rms(1)
        channels[3] = 0.0
        parts, _ = describe(mlp(1), channels, "layer 1")
        assert -8 < float(parts[3, 0]) == float(parts[:, 0].min())

    def test_equal_rows_and_silent_layers_are_no_nan(self):
        parts, energy = describe((torch.ones(8, 2), torch.ones(8, 2), torch.ones(2, 8)), torch.zeros(8), "layer 0")
        assert (parts.tolist(), energy.tolist()) == ([[0.0] * 4] * 8, [0.0] * 8)


class TestTraining:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_it_learns_what_puts_out_most(self, seed):
        """From a start that knows nothing to nearly the best that any rows can do."""
        result = train(seed=seed)
        best = sum(1 - float(e[top_rows(e, 45)].sum() / e.sum()) for e in energies()) / LAYERS
        assert result.history[0] > 4 * best
        assert min(result.history) == result.history[result.best_episode] < 1.2 * best
        channel, column, gate, up = result.weights.tolist()
        assert min(channel, column) > 2 * max(abs(gate), abs(up))

    def test_the_untrained_policy_prefers_no_row(self):
        result = train(episodes=0)
        assert result.weights.tolist() == [0.0] * 4
        for rows in (*result.rows, *result.untrained_rows):
            assert rows.tolist() == list(range(45))

    def test_its_rows_are_those_that_its_weights_choose(self):
        result = train(episodes=5)
        for layer, rows in enumerate(result.rows):
            assert torch.equal(rows, top_rows(describe(mlp(layer), rms(layer), "")[0] @ result.weights, 45))

    def test_same_seed_same_policy_whatever_the_number_of_threads(self):
        results = []
        for num_threads in (1, 2, 1):
            torch.set_num_threads(num_threads)
            results.append(train(episodes=3, seed=5))
        for other in results[1:]:
            assert torch.equal(other.weights, results[0].weights)
            assert other.history == results[0].history
        assert torch.get_num_threads() == 1
        assert not torch.equal(train(episodes=3, seed=6).weights, results[0].weights)

    def test_every_layer_is_read_once_and_progress_counts_up(self):
        read, steps = [], []

        def read_mlp(layer):
            read.append(layer)
            return mlp(layer)

        train_policy(read_mlp, rms, LAYERS, 45, episodes=2, progress=lambda *step: steps.append(step))
        assert (read, steps) == ([0, 1, 2], [(done, 5) for done in range(1, 6)])

    def test_global_random_state_is_left_alone(self):
        state = torch.get_rng_state()
        train(episodes=1)
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", [{"episodes": -1}, {"num_draws": 1}, {"num_layers": 0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(EvlaError, match=next(iter(options))):
        train(**options)


@pytest.mark.parametrize("num_keep", [0, 61])
def test_impossible_counts_are_refused(num_keep):
    with pytest.raises(EvlaError, match="Cannot keep"):
        train(num_keep)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("matrix", [0, 1, 2])
def test_broken_weights_are_refused_by_layer(bad, matrix):
    def read(layer):
        found = mlp(layer)
        if layer == 2:
            found[matrix][5, 1] = bad
        return found

    with pytest.raises(EvlaError, match="layer 2"):
        train_policy(read, rms, LAYERS, 45)
