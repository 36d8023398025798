"""Hold a pruned checkpoint against its source: its structure before a byte is written, what it computes before it is
published.

Transformers builds a layer from the config and the layer's index. A layer that moves up may therefore come out as
another one (a window where there was none, another constant), with weights that fit it all the same. So every kept
layer of the model that the pruned config gives is compared with the layer that it was, first as it stands, then by what
it gives for the same input.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors
from evla_cli.errors import CheckFailed, EvlaError
from evla_cli.families.base import Checkpoint, check_weights
from evla_cli.methods.layer_pruning import prune_weights
from evla_cli.models.first_use import loading_on_first_use
from evla_cli.models.skeleton import (
    NothingOnMeta,
    build_skeleton,
    checked_skeleton,
    drop_weights,
    expected_shapes,
    with_tied,
)
from evla_cli.models.tiled_linear import tile_linear
from evla_cli.plan import PrunePlan, StackPlan
from evla_cli.progress import progress_bar

TOLERANCE = 1e-5  # of the largest value: rounding of sums in float32 in another order gives 1e-6


# Structure


def fit_packed_layers(checkpoint: Checkpoint, plan: PrunePlan, pruned: LazyTensors) -> LazyTensors:
    """The pruned weights, those that hold something for every layer in one tensor (Gemma 4's embeddings by layer)
    without the parts of removed layers.

    Errors: the pruned config gives no model, its weights would be others than the plan leaves, or a kept layer would be
    another one than it was. Nothing has been written then.
    """
    family = checkpoint.family
    source = checked_skeleton(family, checkpoint.config, checkpoint.weights, checkpoint.root)
    try:
        model = build_skeleton(family, checkpoint.pruned_config(plan))
    except Exception as error:  # transformers raises many kinds, all of them about the config
        text = " ".join(str(error).split())[:200]
        raise EvlaError(
            f"{checkpoint.root}: {_without(plan)} its config gives no model ({type(error).__name__}: {text})."
        ) from error
    stacks = [(family.decoder_layers, plan), *((family.towers[name].blocks, plan.vision[name]) for name in plan.vision)]
    for blocks, stack in stacks:
        _check_blocks(checkpoint, blocks, stack, source.get_submodule(blocks), model.get_submodule(blocks))
    if _has_cache(source) and not _has_cache(model):
        raise EvlaError(
            f"{checkpoint.root}: {_without(plan)} no layer is left that transformers could keep a cache of: it would "
            "not generate. Keep one attention layer."
        )
    shapes = expected_shapes(model)
    if checkpoint.layout == "native":  # whose names are others; there nothing is packed
        fitting = prune_weights(checkpoint.weights, plan, family.decoder_layers, family.tower_prefixes)
        needed = fitting
    else:
        fitting = {name: _unpacked(lazy, shapes.get(name), plan) for name, lazy in pruned.items()}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        needed = {name: lazy for name, lazy in fitting.items() if name in shapes or name not in tied}
        needed = {name: lazy for name, lazy in needed.items() if not name.endswith(".rotary_emb.inv_freq")}
    check_weights(shapes, needed, checkpoint.root)
    return pruned if checkpoint.layout == "native" else fitting


def _unpacked(lazy: LazyTensor, shape: tuple[int, ...] | None, plan: StackPlan) -> LazyTensor:
    """A tensor one of whose dimensions is (layers, size of a layer's part), without the parts of removed layers."""
    if shape is None or shape == lazy.shape or len(shape) != len(lazy.shape):
        return lazy
    (dim, *others) = (dim for dim, (new, old) in enumerate(zip(shape, lazy.shape, strict=True)) if new != old)
    num_layers, num_kept = plan.num_layers, len(plan.keep_layers)
    if others or lazy.shape[dim] % num_layers or lazy.shape[dim] // num_layers * num_kept != shape[dim]:
        return lazy
    part = torch.arange(lazy.shape[dim]).view(num_layers, -1)[list(plan.keep_layers)].flatten()
    return lazy.map(shape, lambda tensor: tensor.index_select(dim, part))


def _check_blocks(checkpoint: Checkpoint, blocks: str, stack: StackPlan, source: Any, pruned: Any) -> None:
    if len(pruned) != len(stack.keep_layers):
        raise EvlaError(
            f"{checkpoint.root}: the pruned config gives {len(pruned)} {blocks}, the plan keeps "
            f"{len(stack.keep_layers)}: layers of this model cannot be removed."
        )
    are_read = any(getattr(module, _READS_THEM, False) for module in source.modules())
    ignored = () if are_read else (_FOR_OTHERS,)
    for new, old in enumerate(stack.keep_layers):
        difference = _difference(source[old], pruned[new], old, new, stack, ignored)
        if difference is not None:
            raise EvlaError(
                f"{checkpoint.root}: {_without(stack)} {blocks}.{old} would be built as another layer ({difference}); "
                "its config cannot say what it was. Drop other layers, if any leave the kinds of the rest as they are."
            )


def _difference(
    source: nn.Module, pruned: nn.Module, old: int, new: int, stack: StackPlan, ignored: Collection[str] = ()
) -> str | None:
    """First difference of two modules, but for the layer's number, the MLP's width and `ignored` attributes; None where
    there is none."""
    width, kept_width = stack.intermediate_size, stack.kept_intermediate_size

    def same(before: Any, after: Any) -> bool:
        if isinstance(before, tuple) and isinstance(after, tuple):
            return len(before) == len(after) and all(map(same, before, after))
        number = type(before) is int and type(after) is int  # bool is another thing
        return before == after or (number and (before, after) in ((old, new), (width, kept_width)))

    found, wanted = dict(pruned.named_modules()), dict(source.named_modules())
    for path in sorted(found.keys() ^ wanted.keys()):
        return f"{'without' if path in wanted else 'with'} {path}"
    for path, module in wanted.items():
        if type(module) is not type(found[path]):
            return f"{path} a {type(found[path]).__name__}, not a {type(module).__name__}"
        before, after = _facts(module), _facts(found[path])
        for name in sorted((before.keys() | after.keys()) - set(ignored)):
            if not same(before.get(name), after.get(name)):
                return f"{f'{path}.{name}'.lstrip('.')} {after.get(name)}, not {before.get(name)}"
    return None


def _facts(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module and the shapes of its own weights."""
    facts: dict[str, Any] = {
        name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)
    }
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        facts[name] = None if tensor is None else tuple(tensor.shape)
    return facts


# Gemma 4's last layers of a kind keep keys and values for others, and say so even where no other layer reads them.
_FOR_OTHERS, _READS_THEM = "store_full_length_kv", "is_kv_shared_layer"


def _without(stack: StackPlan) -> str:
    if not stack.dropped_layers:
        return "with narrower MLPs"
    layers = "layer" if len(stack.dropped_layers) == 1 else "layers"
    return f"without {layers} {', '.join(map(str, stack.dropped_layers))}"


def _has_cache(model: PreTrainedModel) -> bool:
    """Whether transformers' cache for this model can tell how many tokens are in it, as `generate` asks it."""
    try:
        DynamicCache(config=model.config.get_text_config(decoder=True)).get_seq_length()
    except Exception:  # of any kind, where a model has no attention layer
        return False
    return True


# Values


def check_values(source: Checkpoint, output: Checkpoint, plan: PrunePlan) -> None:
    """Run both on a few tokens, the source without what the plan removes, and compare.

    Both are streamed: one block in memory at a time. Every block of the output is given what the source's block was
    given, so that rounding does not add up and a difference is found where it arises.

    Errors (CheckFailed): a difference above `TOLERANCE` of the largest value; a model that cannot be run.
    """
    family = source.family
    stacks: dict[str, StackPlan] = {family.decoder_layers: plan}
    stacks |= {family.towers[name].blocks: stack for name, stack in plan.vision.items()}
    dense = _Dense(stacks)
    repeated = _Repeated(dense, stacks)
    num_blocks = sum(stack.num_layers + len(stack.keep_layers) for stack in stacks.values())
    with progress_bar("checking", num_blocks, "layer") as bar, torch.inference_mode():
        wanted = _run(source, dense, _silent_columns(stacks), bar.update)
        found = _run(output, repeated, {}, bar.update)
    repeated.check_all_ran()
    _compare("the output", found, wanted)


class _Dense:
    """Inputs and outputs of every block of the source; removed ones hand on what they are given."""

    def __init__(self, stacks: Mapping[str, StackPlan]):
        self.names = {f"{blocks}.{n}" for blocks, stack in stacks.items() for n in range(stack.num_layers)}
        self._dropped = {f"{blocks}.{layer}" for blocks, stack in stacks.items() for layer in stack.dropped_layers}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, tuple[Tensor, ...]] = {}

    def enter(self, name: str, hidden_states: Tensor) -> Tensor:
        self.inputs[name] = hidden_states.clone()
        return hidden_states

    def leave(self, name: str, output: Any) -> Any:
        if name in self._dropped:
            given = self.inputs.pop(name)
            return (given, *output[1:]) if isinstance(output, tuple) else given
        self.outputs[name] = _tensors(output)
        return output


class _Repeated:
    """The output's blocks, each of which is given what the source's was, and must give the same."""

    def __init__(self, dense: _Dense, stacks: Mapping[str, StackPlan]):
        self._dense = dense
        self._source_name = {
            f"{blocks}.{new}": f"{blocks}.{old}"
            for blocks, stack in stacks.items()
            for new, old in enumerate(stack.keep_layers)
        }
        self.names = set(self._source_name)
        self._ran: set[str] = set()

    def enter(self, name: str, hidden_states: Tensor) -> Tensor:
        wanted = self._dense.inputs.get(self._source_name[name])
        if wanted is None:
            raise CheckFailed(f"{name} of the output runs, {self._source_name[name]} of the source does not.")
        _compare(f"what {name} of the output is given", (hidden_states,), (wanted,))
        return wanted.clone()

    def leave(self, name: str, output: Any) -> Any:
        old = self._source_name[name]
        self._ran.add(old)
        _compare(f"{name} of the output ({old} of the source)", _tensors(output), self._dense.outputs[old])
        return output

    def check_all_ran(self) -> None:
        absent = sorted(self._dense.outputs.keys() - self._ran)
        if absent:
            raise CheckFailed(f"{absent[0]} of the source runs, its counterpart in the output does not.")


def _tensors(output: Any) -> tuple[Tensor, ...]:
    values = output if isinstance(output, tuple) else (output,)
    return tuple(value.clone() for value in values if isinstance(value, Tensor))


def _compare(what: str, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        largest, difference = float(theirs.abs().max()), float((mine - theirs).abs().max())
        if not difference <= TOLERANCE * largest:
            raise CheckFailed(
                f"The pruned model is not the source without what was removed: {what} differs by {difference:.1e}, "
                f"where the largest value is {largest:.1e}. Nothing was written. Drop other layers; if all do this, "
                "please report the kind of model."
            )


def _run(
    checkpoint: Checkpoint,
    watcher: _Dense | _Repeated,
    silent: Mapping[str, tuple[int, ...]],
    on_block: Callable[[], Any],
) -> tuple[Tensor, ...]:
    """Output of the model for a few made-up inputs, in float32.

    Args:
        silent: weight -> its columns that count as zero.
    """
    model = checked_skeleton(checkpoint.family, checkpoint.config, checkpoint.weights, checkpoint.root)
    blocks = {
        f"{prefix}.{number}": block
        for prefix in (checkpoint.family.decoder_layers, *(t.blocks for t in checkpoint.family.towers.values()))
        for number, block in enumerate(cast(nn.ModuleList, model.get_submodule(prefix)))
    }
    load = _Loader(model, checkpoint.weights, silent)
    try:
        with (
            checkpoint.reader.reading_again() as in_order,
            loading_on_first_use(model, load, [*blocks.values()]),
            _watched(blocks, watcher, on_block),
            NothingOnMeta(),
        ):
            # What runs before the decoder may stand anywhere in the files.
            blocks[f"{checkpoint.family.decoder_layers}.0"].register_forward_pre_hook(lambda *_: in_order())
            return checkpoint.family.try_out(model)
    except EvlaError:
        raise
    except Exception as error:  # whatever a model's own code may raise
        text = " ".join(str(error).split())[:200]
        raise CheckFailed(
            f"{checkpoint.root}: transformers cannot run this model on a few tokens ({type(error).__name__}: {text}), "
            "so that what is left of it cannot be checked. Nothing was written."
        ) from error


@contextmanager
def _watched(
    blocks: Mapping[str, nn.Module], watcher: _Dense | _Repeated, on_block: Callable[[], Any]
) -> Iterator[None]:
    """Every block shows `watcher` what goes in and comes out; its weights go when it has run."""

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (watcher.enter(name, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": watcher.enter(name, kwargs["hidden_states"])}

    def leave(name: str, block: nn.Module, output: Any) -> Any:
        drop_weights(block)
        on_block()
        return watcher.leave(name, output) if name in watcher.names else output

    handles = []
    for name, block in blocks.items():
        if name in watcher.names:
            handles.append(
                block.register_forward_pre_hook(
                    lambda _block, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
                )
            )
        handles.append(
            block.register_forward_hook(lambda block, _inputs, output, name=name: leave(name, block, output))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Loader:
    """Loads weights for float32 arithmetic. Large ones in half precision stay as they are and are widened when used."""

    def __init__(self, model: Any, weights: LazyTensors, silent: Mapping[str, tuple[int, ...]]):
        self._weights = with_tied(model, weights)
        self._silent = silent
        self._as_stored: set[str] = set()
        for name, module in model.named_modules():
            stored = self._weights.get(f"{name}.weight")
            if stored is None or not isinstance(module, nn.Linear | nn.Embedding):
                continue
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda _module, _inputs, output: output.float())
            elif type(module) is not nn.Linear or not tile_linear(module, stored.dtype, torch.float32, "cpu"):
                continue
            self._as_stored.add(f"{name}.weight")

    def __call__(self, names: Sequence[str]) -> list[Tensor]:
        return [self._load(name) for name in names]

    def _load(self, name: str) -> Tensor:
        weight = self._weights[name].load()
        if name not in self._as_stored and weight.dtype.is_floating_point:
            weight = weight.float()
        if name in self._silent:
            weight = weight.clone()
            weight[:, list(self._silent[name])] = 0
        return weight


def _silent_columns(stacks: Mapping[str, StackPlan]) -> dict[str, tuple[int, ...]]:
    """The last linear layer of every kept MLP -> its columns that belong to removed channels."""
    silent: dict[str, tuple[int, ...]] = {}
    for blocks, stack in stacks.items():
        for layer, channels in zip(stack.keep_layers, stack.mlp_keep or (), strict=False):
            gone = tuple(sorted(set(range(stack.intermediate_size)) - set(channels)))
            silent |= {f"{blocks}.{layer}.mlp.{name}.weight": gone for name in ("down_proj", "fc2")}
    return silent
