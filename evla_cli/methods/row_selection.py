"""Which MLP channels of every kept layer stay, by any of the methods that `--mlp-method` names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evla_cli.errors import EvlaError, suggest
from evla_cli.methods.mlp_pruning import activation_scores, magnitude_scores, select_rows_random, top_rows

Mlp = tuple[Tensor, Tensor, Tensor]  # gate (F, D), up (F, D), down (D, F)
Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MlpLayers:
    """The MLPs to narrow.

    Attributes:
        layers: their numbers.
        read: the weights of one.
        intermediate_size, num_keep: rows before and after.
        read_rms: the root mean square of every channel (F) of a layer on calibration samples; None: not measured.
    """

    layers: Sequence[int]
    read: Callable[[int], Mlp]
    intermediate_size: int
    num_keep: int
    read_rms: Callable[[int], Tensor] | None = None


def select_channels(
    method: str, mlps: MlpLayers, seed: int, on_step: Callable[[int, int], Any] | None = None
) -> tuple[Rows, dict[str, Any]]:
    """The channels that stay for each layer, and what the method has to say about its choice: by its own measure,
    beside that of uniformly random rows."""
    if method not in METHODS:
        raise EvlaError(f"Unknown --mlp-method '{method}'. {suggest(method, METHODS)}")
    return METHODS[method](mlps, seed, on_step or (lambda _done, _total: None))


def _prunenet(mlps: MlpLayers, seed: int, on_step: Any) -> tuple[Rows, dict[str, Any]]:
    from evla_cli.methods.prunenet import train_policy

    layers = mlps.layers
    result = train_policy(lambda at: mlps.read(layers[at])[0], len(layers), mlps.num_keep, seed=seed, progress=on_step)
    report = result.report
    kinds = {
        "untrained": report.before,
        "prunenet": report.after,
        "random": report.random,
        "magnitude": report.magnitude,
    }
    facts = {"mean_ks_distance": {name: round(quality.mean_ks, 6) for name, quality in kinds.items()}}
    return tuple(tuple(rows.tolist()) for rows in result.rows), facts


def _magnitude(mlps: MlpLayers, seed: int, on_step: Any) -> tuple[Rows, dict[str, Any]]:
    return _highest("magnitude", lambda layer: magnitude_scores(*mlps.read(layer)), mlps, seed, on_step)


def _activation(mlps: MlpLayers, seed: int, on_step: Any) -> tuple[Rows, dict[str, Any]]:
    read_rms = mlps.read_rms
    if read_rms is None:
        raise EvlaError("--mlp-method activation needs --importance from evla analyze --activations.")
    return _highest(
        "activation", lambda layer: activation_scores(read_rms(layer), mlps.read(layer)[2]), mlps, seed, on_step
    )


def _highest(
    method: str, score: Callable[[int], Tensor], mlps: MlpLayers, seed: int, on_step: Any
) -> tuple[Rows, dict[str, Any]]:
    """The rows of highest score, and the mean share of the squared scores that goes with the others."""
    chosen, removed = [], {method: 0.0, "random": 0.0}
    for done, layer in enumerate(mlps.layers, start=1):
        scores = score(layer)
        rows = top_rows(scores, mlps.num_keep)
        chosen.append(tuple(rows.tolist()))
        control = select_rows_random(mlps.intermediate_size, mlps.num_keep, seed, layer)
        energy = scores.square()
        for name, kept in ((method, rows), ("random", control)):
            removed[name] += 1 - float(energy[kept].sum() / energy.sum()) if bool(energy.any()) else 0.0
        on_step(done, len(mlps.layers))
    shares = {name: round(share / len(chosen), 6) for name, share in removed.items()}
    return tuple(chosen), {"removed_score_share": shares}


def _random(mlps: MlpLayers, seed: int, on_step: Any) -> tuple[Rows, dict[str, Any]]:
    rows = [select_rows_random(mlps.intermediate_size, mlps.num_keep, seed, layer) for layer in mlps.layers]
    return tuple(tuple(each.tolist()) for each in rows), {}


METHODS: dict[str, Callable[[MlpLayers, int, Any], tuple[Rows, dict[str, Any]]]] = {
    "prunenet": _prunenet,
    "magnitude": _magnitude,
    "activation": _activation,
    "random": _random,
}
