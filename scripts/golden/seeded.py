"""Weights and inputs from a seed alone: the same bits under every version of numpy and on every machine.

numpy promises that a `RandomState` keeps its stream (NEP 19); uniform numbers need no library's logarithm.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

Shapes = Mapping[str, Sequence[int]]

_SMALL = ("x_embedder", "patch_embed", "pos_embed", "positional_embedding", "_token")


def weights(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Float32, by name: no norm, bias or layer scale is neutral, and no two layers are alike.

    What most tokens are made of is small, so that the first norm's epsilon counts.
    """
    random = np.random.RandomState(seed)
    return {name: _weight(name, tuple(shapes[name]), random) for name in sorted(shapes)}


def inputs(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Float32, of variance 1."""
    random = np.random.RandomState(seed)
    return {name: _spread(random, tuple(shapes[name])).astype(np.float32) for name in sorted(shapes)}


def image(width: int, height: int, seed: int) -> np.ndarray:
    """uint8, (height, width, 3)."""
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of all their bytes, in the order of their names."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        sha256.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha256.hexdigest()


def _weight(name: str, shape: tuple[int, ...], random: np.random.RandomState) -> np.ndarray:
    spread = _spread(random, shape)
    if name.endswith("gamma"):
        value = 0.3 + 0.4 * np.abs(spread)
    elif "norm" in name:
        value = 0.3 * spread + name.endswith("weight")
    elif name.endswith("bias"):
        value = 0.2 * spread
    elif name.endswith("weight"):
        value = spread / math.sqrt(math.prod(shape[1:]))
    else:
        value = 0.5 * spread  # positions, class and register tokens, the null condition
    return (0.1 * value if any(part in name for part in _SMALL) else value).astype(np.float32)


def _spread(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    return math.sqrt(3) * (2 * random.random_sample(shape) - 1)
