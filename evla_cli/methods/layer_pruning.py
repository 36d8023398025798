"""Which decoder layers go, and what the weights of the rest are called afterwards (EfficientVLA, arXiv 2506.10100)."""

import re
from collections.abc import Collection, Mapping, Sequence

import torch

from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors
from evla_cli.errors import EvlaError
from evla_cli.methods.mlp_pruning import slice_columns, slice_rows
from evla_cli.plan import PrunePlan, StackPlan


def choose_layers(
    ranking: Sequence[int],
    num_drop: int = 0,
    drop_ids: Collection[int] = (),
    protected: Collection[int] = (),
) -> tuple[int, ...]:
    """The layers that stay, ascending.

    Args:
        ranking: all layers, least important first.
        num_drop: how many to remove in all: `drop_ids`, then the least important.
        drop_ids: layers removed whatever their rank.
        protected: layers that are never chosen by rank; naming one in `drop_ids` is an error.
    """
    num_layers = len(ranking)
    outside = sorted({*drop_ids, *protected} - set(ranking))
    if outside:
        raise EvlaError(f"Layer {outside[0]} does not exist; the decoder has layers 0 to {num_layers - 1}.")
    both = sorted(set(drop_ids) & set(protected))
    if both:
        raise EvlaError(f"Layer {both[0]} is protected (--protect-first) and cannot be dropped.")
    num_drop = max(num_drop, len(set(drop_ids)))
    free = [layer for layer in ranking if layer not in protected and layer not in drop_ids]
    num_free = len(free) + len(set(drop_ids))
    if num_drop >= num_layers or num_drop > num_free:
        raise EvlaError(
            f"Cannot drop {num_drop} of {num_layers} layers: {num_layers - num_free} are protected "
            f"({', '.join(map(str, sorted(protected))) or 'none'}) and at least one must stay."
        )
    dropped = {*drop_ids, *free[: num_drop - len(set(drop_ids))]}
    return tuple(layer for layer in range(num_layers) if layer not in dropped)


def prune_weights(
    tensors: LazyTensors,
    plan: PrunePlan,
    layer_prefix: str,
    tower_prefixes: Mapping[str, tuple[str, ...]] | None = None,
) -> LazyTensors:
    """The weights that stay, under their new names, sliced when they are loaded; in the order of the source.

    Args:
        tower_prefixes: vision tower -> prefix of its blocks' names and of other modules whose `mlp` is as wide, for
            those that the plan prunes. The others never run, and keep what the last block does.
    """
    pruned = _prune_stack(tensors, plan, layer_prefix)
    for tower, stack in plan.vision.items():
        blocks, *others = (tower_prefixes or {})[tower]
        pruned = _prune_stack(pruned, stack, blocks)
        keep = None if stack.mlp_keep is None else stack.mlp_keep[-1]
        for other in others:
            for name in [name for name in pruned if name.startswith(f"{other}.mlp.")]:
                pruned[name] = _prune_tensor(name, name.removeprefix(f"{other}."), pruned[name], keep)
    return pruned


def _prune_stack(tensors: LazyTensors, plan: StackPlan, layer_prefix: str) -> LazyTensors:
    pattern = re.compile(re.escape(layer_prefix) + r"\.(\d+)\.(.+)")
    position = {layer: number for number, layer in enumerate(plan.keep_layers)}
    pruned: LazyTensors = {}
    for name, lazy in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            pruned[name] = lazy
            continue
        layer, rest = int(match[1]), match[2]
        if layer >= plan.num_layers:
            raise EvlaError(f"{name} belongs to layer {layer}, the plan is for {plan.num_layers} layers.")
        if layer in position:
            keep = None if plan.mlp_keep is None else plan.mlp_keep[position[layer]]
            pruned[f"{layer_prefix}.{position[layer]}.{rest}"] = _prune_tensor(name, rest, lazy, keep)
    return pruned


def _prune_tensor(name: str, rest: str, lazy: LazyTensor, keep: tuple[int, ...] | None) -> LazyTensor:
    """Rows of gate and up (a tower's fc1), columns of down (fc2); everything else as it is."""
    if keep is None or not rest.startswith("mlp."):
        return lazy
    channels = torch.tensor(keep)
    if rest.startswith(("mlp.gate_proj.", "mlp.up_proj.", "mlp.fc1.")):
        return lazy.map((len(keep), *lazy.shape[1:]), lambda tensor: slice_rows(tensor, channels))
    if rest in ("mlp.down_proj.weight", "mlp.fc2.weight"):
        return lazy.map((lazy.shape[0], len(keep)), lambda tensor: slice_columns(tensor, channels))
    if rest in ("mlp.down_proj.bias", "mlp.fc2.bias"):
        return lazy
    raise EvlaError(f"{name}: the width of this kind of MLP cannot be pruned; use --mlp-prune-ratio 0.")
