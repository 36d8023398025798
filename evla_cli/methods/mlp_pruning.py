"""Narrow gated MLP blocks: how many intermediate rows stay, which ones by a plain rule, and the slicing itself.

Letters: D hidden size, F intermediate size, K rows kept.
"""

import math
import random

import torch
from torch import Tensor

from evla_cli.errors import EvlaError

# Matrix kernels like these; the widest one that fits at least twice into the block is used.
_MULTIPLES = (64, 32, 16, 8, 1)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a value -> something numpy knows


def prune_width(intermediate_size: int, mlp_prune_ratio: float, multiple: int | None = None) -> int:
    """The width left after removing `mlp_prune_ratio` of the rows: 11008 at 0.25 gives 8256.

    Rounded to the nearest `multiple` (halfway: up, keep more), never above the original width and never below one
    multiple. By default the multiple is 64, or 32, 16, 8, 1 for blocks narrower than 128, 64, 32, 16. A small ratio
    may therefore round to the next lower multiple, or to nothing removed. Ratio 0 is exact: the width as it is.
    """
    if intermediate_size < 1:
        raise EvlaError(f"The MLP's intermediate size must be at least 1, got {intermediate_size}.")
    if not 0 <= mlp_prune_ratio < 1:
        raise EvlaError(f"mlp_prune_ratio is the fraction removed, in [0, 1), got {mlp_prune_ratio}.")
    if multiple is not None and not 1 <= multiple <= intermediate_size:
        raise EvlaError(f"The width's multiple must be between 1 and {intermediate_size}, got {multiple}.")
    if mlp_prune_ratio == 0:
        return intermediate_size
    if multiple is None:
        multiple = width_multiple(intermediate_size)
    wanted = math.floor(intermediate_size * (1 - mlp_prune_ratio) / multiple + 0.5)
    return multiple * min(max(wanted, 1), intermediate_size // multiple)


def width_multiple(intermediate_size: int) -> int:
    """What widths are rounded to."""
    return next((multiple for multiple in _MULTIPLES if intermediate_size >= 2 * multiple), 1)


def magnitude_scores(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The sum of the largest absolute weights of a row's three vectors: (F, D), (F, D), (D, F) -> (F), float64.

    Of a dozen definitions the best on SmolLM2-135M, where norms of the whole vectors cost a hundred times the
    perplexity; on the demo model the product of norms is somewhat better (docs/refit.md).
    """
    return _largest(gate, 1) + _largest(up, 1) + _largest(down, 0)


def activation_scores(channel_rms: Tensor, down: Tensor) -> Tensor:
    """What a unit adds to the block's output: its root mean square on calibration samples (F), seen at the input of
    down (D, F), times the norm of its column -> (F), float64."""
    return channel_rms.double() * column_norms(down)


def channel_energy(inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """Sum of squares of down's inputs (B, T, F) over real positions (mask (B, T)) -> (F) float64; their number."""
    rows = inputs.flatten(0, 1) if mask is None else inputs[mask.bool()]  # (N, F)
    squares = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for piece in rows.split(64):
        squares += piece.double().square().sum(dim=0)
    return squares, len(rows)


def top_rows(scores: Tensor, num_keep: int) -> Tensor:
    """Rows of the highest scores (F); ties go to the lower index; ascending int64 (K)."""
    if not bool(torch.isfinite(scores).all()):
        raise EvlaError("The scores of MLP rows hold NaN or infinite values; rows cannot be ranked.")
    _check_num_keep(num_keep, scores.numel())
    return torch.sort(scores, descending=True, stable=True).indices[:num_keep].sort().values


def select_rows_random(intermediate_size: int, num_keep: int, seed: int, layer_index: int) -> Tensor:
    """Uniformly random rows, the same on every platform and library version for the same seed and layer."""
    _check_num_keep(num_keep, intermediate_size)
    # Python promises the stream of random() for a given seed; it promises no such thing for sample() or shuffle(),
    # nor does torch for randperm.
    generator = random.Random(f"{seed}/{layer_index}")
    keys = [generator.random() for _ in range(intermediate_size)]
    keep = sorted(range(intermediate_size), key=lambda row: (keys[row], row))[:num_keep]
    return torch.tensor(sorted(keep), dtype=torch.int64)  # (K)


def slice_mlp(gate: Tensor, up: Tensor, down: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three weights of a gated MLP with only the kept intermediate units: (K, D), (K, D), (D, K)."""
    return slice_rows(gate, keep), slice_rows(up, keep), slice_columns(down, keep)


def slice_rows(tensor: Tensor, keep: Tensor) -> Tensor:
    """Kept rows of a gate or up weight (F, D), or of its bias (F). The bias of down (D) has nothing to slice."""
    return tensor.index_select(0, keep)


def slice_columns(down: Tensor, keep: Tensor) -> Tensor:
    """Kept columns of a down weight: (D, F) -> (D, K)."""
    bits = down.view(_BITS[down.dtype.itemsize]).numpy()  # numpy picks columns three times as fast as torch
    return torch.from_numpy(bits.take(keep.numpy(), axis=1)).view(down.dtype)


# Both in float64 and in pieces that stay in the cache: ten times as fast as `matrix.double().norm()`.


def row_norms(matrix: Tensor) -> Tensor:
    return torch.cat([piece.double().square().sum(dim=1) for piece in matrix.split(64)]).sqrt()


def column_norms(matrix: Tensor) -> Tensor:
    squares = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for piece in matrix.split(64):
        squares += piece.double().square().sum(dim=0)
    return squares.sqrt()


def _largest(matrix: Tensor, dim: int) -> Tensor:
    low, high = torch.aminmax(matrix, dim=dim)
    return torch.maximum(-low, high).double()


def _check_num_keep(num_keep: int, intermediate_size: int) -> None:
    if not 1 <= num_keep <= intermediate_size:
        raise EvlaError(f"Cannot keep {num_keep} of {intermediate_size} MLP rows; keep 1 to {intermediate_size}.")
