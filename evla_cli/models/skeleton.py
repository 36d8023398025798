"""Models without weights: built on the meta device, then given their tensors by name, all at once or part by part."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from evla_cli.checkpoint.tensors import LazyTensors, load_finite
from evla_cli.errors import EvlaError
from evla_cli.families.base import ModelFamily, check_weights
from evla_cli.models.tiled_linear import tile_linear

_UNUSED = re.compile(r".*\.rotary_emb\.inv_freq")  # old versions of transformers saved this buffer


def build_skeleton(family: ModelFamily, config: dict[str, Any]) -> PreTrainedModel:
    """The model with parameters on the meta device (no memory) and the buffers that no checkpoint holds computed."""
    with torch.device("meta"), no_init_weights():  # what has no memory needs no first values
        model = family.build_model(family.build_config(config))
    _compute_buffers(model)
    return model.eval()


def checked_skeleton(family: ModelFamily, config: dict[str, Any], weights: LazyTensors, where: Path) -> PreTrainedModel:
    """`build_skeleton` for a checkpoint from outside. Errors: no model can be built, or its weights do not fit it."""
    try:
        model = build_skeleton(family, config)
    except Exception as error:  # transformers raises many kinds, all of them about the config
        raise EvlaError(
            f"{where}: no model can be built from its config ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    needs = _Needs(expected_shapes(model), frozenset(getattr(model, "all_tied_weights_keys", None) or ()))
    _needs[_key(family, config)] = needs
    needs.check(weights, where)
    return model


def check_fits(family: ModelFamily, config: dict[str, Any], weights: LazyTensors, where: Path) -> None:
    """The errors of `checked_skeleton`; no model is built where one was built from this config before."""
    if (needs := _needs.get(_key(family, config))) is not None:
        needs.check(weights, where)
    else:
        checked_skeleton(family, config, weights, where)


@dataclass(frozen=True)
class _Needs:
    """What a model takes from a checkpoint."""

    shapes: dict[str, tuple[int, ...]]
    tied: frozenset[str]

    def check(self, weights: LazyTensors, where: Path) -> None:
        used = {name: lazy for name, lazy in weights.items() if name not in self.tied and not _UNUSED.fullmatch(name)}
        check_weights(self.shapes, used, where)


_needs: dict[str, _Needs] = {}  # a command sees few configs; some kB each


def _key(family: ModelFamily, config: dict[str, Any]) -> str:
    return f"{family.name} {json.dumps(config, sort_keys=True, default=repr)}"


def expected_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Every weight that a checkpoint of this model must hold. Tied weights are held once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if name not in tied}


def load_weights(
    module: nn.Module,
    weights: LazyTensors,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_bytes: Callable[[int], Any] | None = None,
) -> None:
    """Give every parameter of `module` its tensor, named `prefix` + its own name; mapped tensors are not copied.

    Errors: a missing weight (KeyError: callers check names first), NaN or infinite values.
    """
    state = {}
    for name in module.state_dict():
        lazy = weights[prefix + name]
        state[name] = load_finite(prefix + name, lazy)
        if dtype is not None and lazy.dtype.is_floating_point:
            state[name] = state[name].to(dtype)
        state[name] = state[name].to(device)
        if on_bytes:
            on_bytes(lazy.num_bytes)
    assign_weights(module, state)


def assign_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def load_model(
    family: ModelFamily,
    config: dict[str, Any],
    weights: LazyTensors,
    where: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The whole model. Errors: any weight missing, unknown, misshapen or not finite."""
    model = load_plain_model(family, config, weights, where, dtype, device)
    for module in model.modules():
        if type(module) is nn.Linear:
            tile_linear(module, module.weight.dtype, module.weight.dtype, device)
    return model


def load_plain_model(
    family: ModelFamily,
    config: dict[str, Any],
    weights: LazyTensors,
    where: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """`load_model` with transformers' own linear layers, however slow they are in this dtype."""
    model = checked_skeleton(family, config, weights, where)
    if len(expected_shapes(model)) < len(model.state_dict()):
        weights = weights | {name: weights[source] for name, source in model.all_tied_weights_keys.items()}
    load_weights(model, weights, dtype=dtype, device=device)
    move_buffers(model, device)
    return model


def check_device(device: torch.device | str) -> None:
    try:
        torch.device(device)
    except RuntimeError as error:  # whose text lists every kind of hardware that torch has a name for
        raise EvlaError(f"Unknown device '{device}'; use cpu, cuda or cuda:N.") from error
    try:
        if torch.empty(1, device=device).is_meta:
            raise RuntimeError("the meta device computes nothing")
    except (RuntimeError, AssertionError, AttributeError) as error:  # torch's kinds for a device that is not there
        raise EvlaError(f"Device '{device}' cannot be used: {str(error).splitlines()[0]}. Try cpu.") from error


def move_buffers(model: nn.Module, device: torch.device | str) -> None:
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            module._buffers[name] = None if buffer is None else buffer.to(device)


def drop_weights(module: nn.Module) -> None:
    """Back to the meta device; the memory is free again."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _compute_buffers(model: PreTrainedModel) -> None:
    """Rotary frequencies, position ids: not in any file, computed by the model's own initialisation."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for owner in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        for module in owner.modules():
            if module._non_persistent_buffers_set:
                owner._init_weights(module)
