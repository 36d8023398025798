"""Widths, plain row rules and slicing of gated MLP blocks."""

import random

import pytest
import torch

from evla_cli.errors import EvlaError
from evla_cli.methods.mlp_pruning import (
    magnitude_scores,
    prune_width,
    select_rows_random,
    slice_columns,
    slice_mlp,
    slice_rows,
    top_rows,
)

# (seed, layer): 6 of 16 rows. Any other platform, Python or torch must give these, or a plan could not be reproduced.
GOLDEN_ROWS = {
    (0, 0): [0, 8, 9, 10, 12, 13],
    (0, 1): [6, 8, 10, 13, 14, 15],
    (1, 0): [1, 2, 5, 6, 8, 9],
}


@pytest.mark.parametrize(
    ("size", "ratio", "width"),
    [
        (11008, 0.25, 8256),  # Llama-2-7B in the paper
        (1536, 0.25, 1152),
        (512, 0.25, 384),
        (352, 0.25, 256),  # 264 is nearer to 4 x 64 than to 5 x 64
        (512, 0.999, 64),  # never below one multiple
        (128, 0.25, 128),  # 96 lies halfway between 64 and 128: keep more
        (100, 0.25, 64),  # narrower than 128: multiples of 32
        (120, 0.01, 96),  # 118.8 would round to 128, wider than the block
        (40, 0.25, 32),  # multiples of 16
        (20, 0.25, 16),  # multiples of 8
        (10, 0.25, 8),  # too narrow for any
        (1, 0.9, 1),
    ],
)
def test_width_is_a_multiple_of_64_where_the_block_allows(size, ratio, width):
    assert prune_width(size, ratio) == width


@pytest.mark.parametrize("size", [11008, 353, 7])
def test_ratio_zero_keeps_every_row_even_of_an_odd_width(size):
    assert prune_width(size, 0.0) == size
    assert prune_width(size, 0.0, multiple=4) == size


def test_width_takes_a_given_multiple():
    assert prune_width(512, 0.25, multiple=256) == 512  # 384 is halfway: keep more
    assert prune_width(512, 0.26, multiple=256) == 256
    assert prune_width(10, 0.25, multiple=1) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((512, 1.0), "fraction removed"),
        ((512, -0.1), "fraction removed"),
        ((512, float("nan")), "fraction removed"),
        ((0, 0.5), "at least 1"),
        ((512, 0.5, 0), "multiple"),
        ((512, 0.5, 513), "multiple"),
    ],
)
def test_width_refuses_what_makes_no_sense(arguments, message):
    with pytest.raises(EvlaError, match=message):
        prune_width(*arguments)


def mlp(intermediate=12, hidden=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_magnitude_keeps_the_largest_sums_of_largest_weights():
    gate, up, down = mlp()
    vectors = [(gate[j].tolist(), up[j].tolist(), down[:, j].tolist()) for j in range(12)]
    sums = [sum(max(abs(weight) for weight in vector) for vector in unit) for unit in vectors]
    expected = sorted(sorted(range(12), key=lambda j: -sums[j])[:7])
    scores = magnitude_scores(gate, up, down)
    torch.testing.assert_close(scores, torch.tensor(sums, dtype=torch.float64))
    rows = top_rows(scores, 7)
    assert rows.dtype == torch.int64
    assert rows.tolist() == expected


def test_magnitude_leaves_the_weights_as_they_are():
    weights = [weight.double() for weight in mlp()]  # the dtype of the scores: a view would be enough
    before = [weight.clone() for weight in weights]
    top_rows(magnitude_scores(*weights), 7)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_magnitude_looks_at_all_three_matrices():
    for which, dim in ((0, 0), (1, 0), (2, 1)):
        weights = [torch.ones(4, 2), torch.ones(4, 2), torch.ones(2, 4)]
        weights[which].select(dim, 3).mul_(-2)
        assert top_rows(magnitude_scores(*weights), 1).tolist() == [3]


def test_magnitude_breaks_ties_by_the_lower_index():
    ones = torch.ones(300, 4, dtype=torch.bfloat16)
    assert top_rows(magnitude_scores(ones, ones, ones.T), 77).tolist() == list(range(77))


def test_magnitude_refuses_nan():
    gate, up, down = mlp()
    up[3, 1] = float("nan")
    with pytest.raises(EvlaError, match="NaN"):
        top_rows(magnitude_scores(gate, up, down), 7)


@pytest.mark.parametrize(("seed", "layer"), GOLDEN_ROWS)
def test_random_rows_are_fixed_by_seed_and_layer_for_good(seed, layer):
    assert select_rows_random(16, 6, seed, layer).tolist() == GOLDEN_ROWS[seed, layer]


def test_random_rows_are_distinct_sorted_and_uniform():
    counts = torch.zeros(20)
    for layer in range(1000):
        rows = select_rows_random(20, 5, seed=3, layer_index=layer)
        assert rows.dtype == torch.int64
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert len(rows) == 5
        counts[rows] += 1
    # 250 expected for each row, standard deviation 13.7
    assert float((counts - 250).abs().max()) < 70


def test_random_rows_leave_global_random_state_alone():
    state, torch_state = random.getstate(), torch.get_rng_state()
    select_rows_random(16, 6, seed=0, layer_index=0)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("num_keep", [0, 13])
def test_impossible_counts_are_refused(num_keep):
    with pytest.raises(EvlaError, match="Cannot keep"):
        select_rows_random(12, num_keep, seed=0, layer_index=0)
    with pytest.raises(EvlaError, match="Cannot keep"):
        top_rows(magnitude_scores(*mlp()), num_keep)


def block(gate, up, down, x):
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_sliced_block_equals_the_block_with_dropped_units_zeroed():
    gate, up, down = (weight.double() for weight in mlp())
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keep = torch.tensor([0, 2, 3, 7, 11])
    zeroed = torch.zeros_like(down)
    zeroed[:, keep] = down[:, keep]
    sliced = slice_mlp(gate, up, down, keep)
    assert [tuple(weight.shape) for weight in sliced] == [(5, 5), (5, 5), (5, 5)]
    # float64 sums in another order
    torch.testing.assert_close(block(*sliced, x), block(gate, up, zeroed, x), rtol=1e-12, atol=1e-12)


def test_keeping_every_row_is_exact_and_biases_follow_their_rows():
    gate, up, down = mlp()
    for before, after in zip((gate, up, down), slice_mlp(gate, up, down, torch.arange(12)), strict=True):
        assert torch.equal(before, after)
    bias = torch.arange(12.0)
    keep = torch.tensor([1, 4, 9])
    assert slice_rows(bias, keep).tolist() == [1.0, 4.0, 9.0]
    assert torch.equal(slice_columns(down, keep), torch.stack([down[:, 1], down[:, 4], down[:, 9]], dim=1))
