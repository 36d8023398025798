"""Which MLP channels of every kept layer stay, by any of the methods that `--mlp-method` names."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from evla_cli.errors import EvlaError, suggest
from evla_cli.methods.mlp_pruning import select_rows_magnitude, select_rows_random

ReadMlp = Callable[[int], tuple[Tensor, Tensor, Tensor]]  # layer -> gate (F, D), up (F, D), down (D, F)
Rows = tuple[tuple[int, ...], ...]


def select_channels(
    method: str,
    layers: Sequence[int],
    read_mlp: ReadMlp,
    intermediate_size: int,
    num_keep: int,
    seed: int,
    on_step: Callable[[int, int], Any] | None = None,
) -> tuple[Rows, dict[str, Any]]:
    """The channels that stay for each of `layers`, and what the method has to say about its choice."""
    if method not in METHODS:
        raise EvlaError(f"Unknown --mlp-method '{method}'. {suggest(method, METHODS)}")
    return METHODS[method](layers, read_mlp, intermediate_size, num_keep, seed, on_step)


def _prunenet(
    layers: Sequence[int], read_mlp: ReadMlp, intermediate_size: int, num_keep: int, seed: int, on_step: Any
) -> tuple[Rows, dict[str, Any]]:
    from evla_cli.methods.prunenet import train_policy

    result = train_policy(lambda at: read_mlp(layers[at])[0], len(layers), num_keep, seed=seed, progress=on_step)
    report = result.report
    kinds = {
        "untrained": report.before,
        "prunenet": report.after,
        "random": report.random,
        "magnitude": report.magnitude,
    }
    facts = {"mean_ks_distance": {name: round(quality.mean_ks, 6) for name, quality in kinds.items()}}
    return tuple(tuple(rows.tolist()) for rows in result.rows), facts


def _magnitude(
    layers: Sequence[int], read_mlp: ReadMlp, intermediate_size: int, num_keep: int, seed: int, on_step: Any
) -> tuple[Rows, dict[str, Any]]:
    return tuple(tuple(select_rows_magnitude(*read_mlp(layer), num_keep).tolist()) for layer in layers), {}


def _random(
    layers: Sequence[int], read_mlp: ReadMlp, intermediate_size: int, num_keep: int, seed: int, on_step: Any
) -> tuple[Rows, dict[str, Any]]:
    return tuple(tuple(select_rows_random(intermediate_size, num_keep, seed, layer).tolist()) for layer in layers), {}


METHODS: dict[str, Callable[..., tuple[Rows, dict[str, Any]]]] = {
    "prunenet": _prunenet,
    "magnitude": _magnitude,
    "random": _random,
}
