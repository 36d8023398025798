"""Which MLP channels of every kept layer stay, by any of the methods that `--mlp-method` names, and what goes with the
others."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evla_cli.errors import EvlaError, suggest
from evla_cli.methods.mlp_pruning import activation_scores, magnitude_scores, select_rows_random, top_rows

LOG = logging.getLogger(__name__)

Mlp = tuple[Tensor, Tensor, Tensor]  # gate (F, D), up (F, D), down (D, F)
Rows = tuple[tuple[int, ...], ...]  # for each layer, ascending
OnStep = Callable[[int, int], Any]  # done, of


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


@dataclass(frozen=True)
class RowChoice:
    """The channels that stay for each layer and, where channels were measured, the energy that goes with the others."""

    rows: Rows
    removed_energy: dict[str, Any] | None


def select_channels(method: str, mlps: MlpLayers, seed: int, on_step: OnStep | None = None) -> RowChoice:
    """Errors: an unknown method, or one that needs what was not measured."""
    if method not in METHODS:
        raise EvlaError(f"Unknown --mlp-method '{method}'. {suggest(method, METHODS)}")
    if method in NEED_ACTIVATIONS and mlps.read_rms is None:
        raise EvlaError(f"--mlp-method {method} needs --importance from evla analyze of this checkpoint.")
    chosen = METHODS[method](mlps, seed, on_step or (lambda _done, _total: None))
    return RowChoice(chosen[method], removed_energy(mlps, chosen))


def removed_energy(mlps: MlpLayers, chosen: Mapping[str, Rows]) -> dict[str, Any] | None:
    """The share of the MLPs' output energy that goes with the rows that do not stay, for each way of choosing, for rows
    by activation, and for random rows; None where channels were not measured.

    A row's energy is the mean square of its channel times that of its column's norm: what it puts out, all rows taken
    for uncorrelated. Random rows lose in the mean, in every layer, the share of them that goes.
    """
    if mlps.read_rms is None:
        return None
    shares: dict[str, list[float]] = {name: [] for name in (*chosen, "activation")}
    for at, layer in enumerate(mlps.layers):
        energy = activation_scores(mlps.read_rms(layer), mlps.read(layer)[2]).square()
        for name in shares:
            kept = torch.tensor(chosen[name][at]) if name in chosen else top_rows(energy, mlps.num_keep)
            removed = energy.index_fill(0, kept, 0.0)
            shares[name].append(float(removed.sum() / energy.sum()) if bool(energy.any()) else 0.0)
    record: dict[str, Any] = {}
    for name, of_layers in shares.items():
        worst = max(range(len(of_layers)), key=of_layers.__getitem__)
        record[name] = {
            "mean": round(sum(of_layers) / len(of_layers), 6),
            "worst": round(of_layers[worst], 6),
            "worst_layer": mlps.layers[worst],
        }
    return record | {"expected_of_random": round(1 - mlps.num_keep / mlps.intermediate_size, 6)}


def warn_if_worse_than_random(method: str, stack: str, energy: Mapping[str, Any] | None) -> None:
    """Random rows themselves are a control, and worse than their own mean half of the time."""
    if energy is not None and method != "random" and energy[method]["mean"] > energy["expected_of_random"]:
        LOG.warning(
            "Warning: %s rows take %.1f %% of what the MLPs of the %s put out, random rows would take %.1f %%; use "
            "activation rows (%.1f %%).",
            method,
            100 * energy[method]["mean"],
            stack,
            100 * energy["expected_of_random"],
            100 * energy["activation"]["mean"],
        )


def _prunenet(mlps: MlpLayers, seed: int, on_step: OnStep) -> dict[str, Rows]:
    from evla_cli.methods.prunenet import train_policy

    layers, read_rms = mlps.layers, mlps.read_rms
    assert read_rms is not None
    result = train_policy(
        lambda at: mlps.read(layers[at]),
        lambda at: read_rms(layers[at]),
        len(layers),
        mlps.num_keep,
        seed=seed,
        progress=on_step,
    )
    return {"prunenet": _plain(result.rows), "untrained": _plain(result.untrained_rows)}


def _magnitude(mlps: MlpLayers, seed: int, on_step: OnStep) -> dict[str, Rows]:
    return {"magnitude": _highest(lambda layer: magnitude_scores(*mlps.read(layer)), mlps, on_step)}


def _activation(mlps: MlpLayers, seed: int, on_step: OnStep) -> dict[str, Rows]:
    read_rms = mlps.read_rms
    assert read_rms is not None
    return {
        "activation": _highest(lambda layer: activation_scores(read_rms(layer), mlps.read(layer)[2]), mlps, on_step)
    }


def _highest(score: Callable[[int], Tensor], mlps: MlpLayers, on_step: OnStep) -> Rows:
    chosen = []
    for done, layer in enumerate(mlps.layers, start=1):
        chosen.append(top_rows(score(layer), mlps.num_keep))
        on_step(done, len(mlps.layers))
    return _plain(chosen)


def _random(mlps: MlpLayers, seed: int, on_step: OnStep) -> dict[str, Rows]:
    rows = [select_rows_random(mlps.intermediate_size, mlps.num_keep, seed, layer) for layer in mlps.layers]
    return {"random": _plain(rows)}


def _plain(rows: Sequence[Tensor]) -> Rows:
    return tuple(tuple(each.tolist()) for each in rows)


METHODS: dict[str, Callable[[MlpLayers, int, OnStep], dict[str, Rows]]] = {
    "activation": _activation,
    "prunenet": _prunenet,
    "magnitude": _magnitude,
    "random": _random,
}
NEED_ACTIVATIONS = ("activation", "prunenet")
