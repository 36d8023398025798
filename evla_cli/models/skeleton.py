"""Models without weights: built on the meta device, then given their tensors by name, all at once or part by part."""

import json
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from evla_cli.checkpoint.tensors import LazyTensors, load_finite
from evla_cli.errors import EvlaError
from evla_cli.families.base import ModelFamily, check_weights
from evla_cli.families.quantized import check_not_quantized
from evla_cli.models.tiled_linear import tile_linear

_UNUSED = re.compile(r".*\.rotary_emb\.inv_freq")  # old versions of transformers saved this buffer
# Of the driver; of cuBLAS and cuSOLVER; of torch's allocator on the CPU.
_OUT_OF_MEMORY = "CUDA error: out of memory|_STATUS_ALLOC_FAILED|can't allocate memory|not enough memory"


def build_skeleton(family: ModelFamily, config: dict[str, Any]) -> PreTrainedModel:
    """The model with parameters on the meta device (no memory) and the buffers that no checkpoint holds computed."""
    model = _build_on_meta(family, config)
    _compute_buffers(model)
    return model.eval()


def _build_on_meta(family: ModelFamily, config: dict[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        model = family.build_model(family.build_config(config))
    drop_weights(model)  # those that were made elsewhere all the same (DiffLlama's lambdas, with random values)
    return model


def checked_skeleton(family: ModelFamily, config: dict[str, Any], weights: LazyTensors, where: Path) -> PreTrainedModel:
    """`build_skeleton` for a checkpoint from outside. Errors: no model can be built, or its weights do not fit it."""
    check_not_quantized(config, weights, where)
    with _told_of_config(where):
        model = _build_on_meta(family, config)
    needs = _Needs(expected_shapes(model), frozenset(getattr(model, "all_tied_weights_keys", None) or ()))
    _needs[_key(family, config)] = needs
    needs.check(weights, where)  # before buffers are computed, whose sizes the config alone decides
    with _told_of_config(where):
        _compute_buffers(model)
    return model.eval()


@contextmanager
def _told_of_config(where: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises many kinds, all of them about the config
        raise EvlaError(
            f"{where}: no model can be built from its config ({type(error).__name__}: {str(error)[:200]})."
        ) from error


def check_fits(family: ModelFamily, config: dict[str, Any], weights: LazyTensors, where: Path) -> None:
    """The errors of `checked_skeleton`; no model is built where one was built from this config before."""
    if (needs := _needs.get(_key(family, config))) is None:
        checked_skeleton(family, config, weights, where)
    else:
        check_not_quantized(config, weights, where)
        needs.check(weights, where)


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


def with_tied(model: PreTrainedModel, weights: LazyTensors) -> LazyTensors:
    """The weights under every name that the model has for them, those that a checkpoint leaves out included."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: weights[source] for name, source in tied.items() if source in weights} | weights


def load_weights(
    module: nn.Module,
    weights: LazyTensors,
    prefix: str = "",
    dtypes: Mapping[str, torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    on_bytes: Callable[[int], Any] | None = None,
) -> None:
    """Give every parameter of `module` its tensor, named `prefix` + its own name; mapped tensors are not copied.

    Args:
        dtypes: by the names in `weights`, where they are to be others than the stored ones.

    Errors: a missing weight (KeyError: callers check names first), NaN or infinite values.
    """
    state = {}
    for name in module.state_dict():
        lazy = weights[prefix + name]
        state[name] = load_finite(prefix + name, lazy).to((dtypes or {}).get(prefix + name, lazy.dtype)).to(device)
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
    """The whole model, in `dtype` (None: as stored) but for what the family keeps in float32.

    Errors: any weight missing, unknown, misshapen or not finite.
    """
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
    weights = with_tied(model, weights)
    dtypes = {name: family.compute_dtype(name, dtype or lazy.dtype) for name, lazy in weights.items()}
    load_weights(model, weights, dtypes=dtypes, device=device)
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


@contextmanager
def out_of_memory(device: torch.device | str, advice: str) -> Iterator[None]:
    """What to do about a GPU that is too small, in one line instead of a traceback."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EvlaError(f"{device} is out of memory: {advice}.") from error


def is_out_of_memory(error: Exception) -> bool:
    """Torch's own kind, which is for GPUs, those of the libraries that it calls, and its CPU allocator's words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and re.search(_OUT_OF_MEMORY, str(error)) is not None


@contextmanager
def failures_of_transformers(where: Path) -> Iterator[None]:
    """What transformers' code for a kind of model raises, in one line: not every kind can be run layer by layer, and
    some not at all with every config. Errors of other code stay as they are."""
    try:
        yield
    except EvlaError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if is_out_of_memory(error) or not any("/transformers/models/" in Path(f.filename).as_posix() for f in frames):
            raise
        text = " ".join(str(error).split())[:200]
        raise EvlaError(
            f"{where}: transformers' code for this kind of model fails when it is run layer by layer "
            f"({type(error).__name__}: {text})."
        ) from error


def move_buffers(model: nn.Module, device: torch.device | str) -> None:
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            module._buffers[name] = None if buffer is None else buffer.to(device)


def drop_weights(module: nn.Module) -> None:
    """All that checkpoints hold of it goes back to the meta device; the memory is free again."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None and not parameter.is_meta:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None and name not in owner._non_persistent_buffers_set and not buffer.is_meta:
                owner._buffers[name] = buffer.to("meta")


def _compute_buffers(model: PreTrainedModel) -> None:
    """Rotary frequencies, position ids: not in any file, computed by the model's own initialisation."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.full_like(buffer, _unset(buffer.dtype), device="cpu")
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for owner in owners:
        for module in owner.modules():
            if module._non_persistent_buffers_set:
                owner._init_weights(module)
    if _unset_buffers(model):  # one module computes what others hold (Falcon-H1)
        for owner in owners:
            owner.apply(owner._init_weights)
    for name in _unset_buffers(model):
        raise EvlaError(f"{name}, which no checkpoint holds, is not computed by this model's own initialisation")


def _unset_buffers(model: nn.Module) -> list[str]:
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if (buffer := module._buffers[name]) is not None and bool(_is_unset(buffer).any())
    ]


def _unset(dtype: torch.dtype) -> Any:
    """What no initialisation gives: memory that was never written to must not pass for a value."""
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return False if dtype == torch.bool else torch.iinfo(dtype).min


def _is_unset(buffer: Tensor) -> Tensor:
    if buffer.dtype.is_floating_point or buffer.dtype.is_complex:
        return buffer.isnan()
    if buffer.dtype in (torch.bool, torch.uint8):  # every value may be meant
        return torch.zeros_like(buffer, dtype=torch.bool)
    return buffer == _unset(buffer.dtype)


class NothingOnMeta(TorchDispatchMode):
    """Inside the block no operation takes a tensor on the meta device.

    Parameters wait there for their values; a model that asks one of them for its device, and moves an input there,
    would go on with shapes alone, and what it put out would be memory that nobody wrote to.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _any_on_meta((args, kwargs)):
            raise EvlaError(
                f"This model computes ({function}) with a weight before it is loaded: it cannot be run part by part."
            )
        return function(*args, **(kwargs or {}))


def _any_on_meta(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta
    if isinstance(value, list | tuple):
        return any(map(_any_on_meta, value))
    return isinstance(value, dict) and any(map(_any_on_meta, value.values()))
