"""Weights that are loaded when they are first needed: what never runs is never read."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def loading_on_first_use(
    model: nn.Module, load: Callable[[Sequence[str]], Sequence[Tensor]], whole: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Inside the block every module of `model` that is on the meta device gets its weights (parameters, and buffers
    that a checkpoint holds) just before it runs.

    Its children without children get theirs with it, since a model asks them for things before it runs them: a linear
    layer for its dtype, the embeddings for their device (Llama 4).

    Args:
        load: weights by their names in the model, in this order.
        whole: modules that get all their weights at once, for parts of them may be used otherwise than by a call.
    """

    def prepare(names: dict[str, nn.Module]) -> None:
        missing = {
            f"{name}.{key}" if name else key: (module, key)
            for name, module in names.items()
            for key in _waiting(module)
        }
        if missing:
            for (module, key), weight in zip(missing.values(), load(list(missing)), strict=True):
                if key in module._buffers:
                    module._buffers[key] = weight
                else:
                    module._parameters[key] = nn.Parameter(weight, requires_grad=False)

    handles = []
    for name, module in model.named_modules():
        if module in whole:
            near = dict(module.named_modules(prefix=name))
        else:
            leaves = (child for child in module.named_children() if next(child[1].children(), None) is None)
            near = {name: module} | {f"{name}.{child}" if name else child: leaf for child, leaf in leaves}
        if any(map(_waiting, near.values())):
            handles.append(module.register_forward_pre_hook(lambda _module, _inputs, near=near: prepare(near)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _waiting(module: nn.Module) -> list[str]:
    """The names of the module's own weights that are on the meta device."""
    weights = {**module._parameters, **module._buffers}
    return [key for key, weight in weights.items() if weight is not None and weight.is_meta]
