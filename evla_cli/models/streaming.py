"""Run a decoder layer by layer over many samples: each layer's weights are read once, whatever the number of samples.

What a layer is called with besides hidden states (masks, rotary embeddings, window types) does not depend on the hidden
states. So the decoder's own forward runs once a batch with recorders in place of its layers: that gives the first
layer's input and every layer's arguments exactly as transformers makes them, for any decoder.

While one layer computes, a thread reads and checks the next and brings it to the device. On a CPU that computes in
float32, linear weights stored in half precision stay as they are and are widened as they are multiplied: see
`tiled_linear`.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from evla_cli.calibration import Sample
from evla_cli.checkpoint.tensors import give_back_freed_memory, is_finite, load_finite
from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint, Tower
from evla_cli.models.first_use import loading_on_first_use
from evla_cli.models.scratch import Scratch, move
from evla_cli.models.skeleton import (
    NothingOnMeta,
    assign_weights,
    checked_skeleton,
    drop_weights,
    move_buffers,
    with_tied,
)
from evla_cli.models.tiled_linear import tile_linear
from evla_cli.models.upload import Upload

_MAX_BEND = 0.05  # rounding gives 1e-6; a norm after the MLP changes its output altogether
_Read = tuple[dict[str, Tensor], torch.cuda.Event | None]


@dataclass
class Batch:
    """
    Attributes:
        hidden_states: (B, T, D), the input of the layer whose turn it is; its output is copied over it.
        mask: (B, T), or None where no position is padding.
        arguments: what each layer is called with besides, by layer index.
    """

    hidden_states: Tensor
    mask: Tensor | None
    arguments: list[dict[str, Any]]


class DecoderStream:
    """The decoder of a checkpoint, one layer in memory at a time (and the next one being read).

    Args:
        tower: stream the blocks of this vision tower instead, those that run.
        watch: given the model, what to do while samples go through everything before the layers.
        memory_budget: bytes of hidden states and layer arguments held in the device's memory; those of further batches
            stand in a file, see `Scratch`. None: all in memory.

    Errors: NaN or infinite weights or activations, with the name of the weight or the index of the layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[Sample],
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        memory_budget: int | None = None,
        tower: Tower | None = None,
        watch: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
    ):
        self.device = device
        self.checkpoint, self._dtype = checkpoint, dtype
        self._upload = Upload(device)
        self._model = checked_skeleton(checkpoint.family, checkpoint.config, checkpoint.weights, checkpoint.root)
        self._weights = with_tied(self._model, checkpoint.weights)
        move_buffers(self._model, device)
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(dtype)  # vision towers ask a weight what dtype their input should have
        # Linear weights in half precision are held as they are, for they need not be widened before they are used. What
        # the family keeps in float32 is small, and asked what dtype its input should have.
        self._dtypes: dict[str, torch.dtype] = {}
        for name, module in self._model.named_modules():
            if not checkpoint.family.follows_dtype(name):
                continue
            if type(module) is nn.Linear and (weight := self._weights.get(f"{name}.weight")):
                stored = weight.dtype if dtype == torch.float32 else dtype
                if tile_linear(module, stored, dtype, device):
                    self._dtypes[f"{name}.weight"] = stored
        family = checkpoint.family
        self._prefix = family.decoder_layers if tower is None else tower.blocks
        self._embed, self._watch = (family.embed if tower is None else tower.see), watch
        blocks = list(cast(nn.ModuleList, self._model.get_submodule(self._prefix)))
        self._layers, self._idle = (blocks, []) if tower is None else (blocks[:-1], blocks[-1:])
        self._layer_form = _LayerForm(known=tower is not None or family.layers_give_tensors)
        self._last_parts: list[str] = []
        self._ready: dict[int, dict[str, Tensor]] = {}  # weights of a layer that was run to see what it gives
        scratch = None if memory_budget is None else Scratch(memory_budget)
        self.batches: list[Batch] = []
        for start in range(0, len(samples), batch_size):
            batch = self._record(list(samples[start : start + batch_size]))
            self.batches.append(batch if scratch is None else replace(batch, **scratch.hold(vars(batch))))
        for layer in self._layers:
            layer.register_forward_hook(_hidden_states_alone)
        if self._layers and not any(value.is_meta for value in self._layers[0].state_dict().values()):
            self._ready[0] = self._layers[0].state_dict()
        for module in self._model.children():
            drop_weights(module)
        give_back_freed_memory()

    @property
    def config(self) -> Any:
        return self._model.config

    def __len__(self) -> int:
        return len(self._layers)

    def layers(self, indices: Sequence[int] | None = None, again: bool = False) -> Iterator[nn.Module]:
        """Each layer in turn with its weights loaded. The caller runs it over every batch and puts its output there.

        Args:
            indices: the layers to run, ascending; None: all.
            again: keep what the layers are called with, for another pass. The caller puts hidden states back.
        """
        order = range(len(self._layers)) if indices is None else indices
        if not self.batches:  # nothing is to be read for
            yield from (self._layers[index] for index in order)
            return
        with ThreadPoolExecutor(1, "evla-next-layer") as reader:
            following = [reader.submit(self._read_layer, index) for index in order[:1]]
            for place, index in enumerate(order):
                layer = self._layers[index]
                weights, complete = following.pop().result()
                self._upload.wait(complete, weights.values())
                assign_weights(layer, weights)
                following = [reader.submit(self._read_layer, index) for index in order[place + 1 : place + 2]]
                yield layer
                for batch in self.batches:
                    self.check_finite(index, batch.hidden_states)
                    if not again:
                        batch.arguments[index] = {}  # the last reference to what only this layer needed
                drop_weights(layer)

    def check_finite(self, index: int, hidden_states: Tensor) -> None:
        """Errors: what layer `index` gave is not all numbers."""
        if not is_finite(hidden_states):
            raise EvlaError(f"Layer {index} gives NaN or infinite hidden states in {self._dtype}; try --dtype float32.")

    def on_device(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """A batch's hidden states and mask, for those that stand in a file, too."""
        return move((batch.hidden_states, batch.mask), self.device)

    def arguments(self, batch: Batch, index: int) -> dict[str, Any]:
        """What layer `index` is called with besides, on the device."""
        return move(batch.arguments[index], self.device)

    def load_last_parts(self) -> nn.Module:
        """What the decoder does to the last layer's output: its final norm, whatever it is called."""
        return nn.Sequential(
            *(self.load_part(f"{self._prefix.rpartition('.')[0]}.{name}") for name in self._last_parts)
        )

    def load_part(self, name: str) -> Any:
        """Another part of the model, such as the final norm or the action head, with its weights."""
        part = self._model.get_submodule(name)
        weights, complete = self._read(part, f"{name}.")
        self._upload.wait(complete, weights.values())
        assign_weights(part, weights)
        return part

    def _read_layer(self, index: int) -> _Read:
        if index in self._ready:
            return self._ready.pop(index), None
        return self._read(self._layers[index], f"{self._prefix}.{index}.")

    def _read(self, module: nn.Module, prefix: str) -> _Read:
        """A module's weights on the device, and what to wait for before they are used. Can be done by a thread."""
        weights = {name: self._read_weight(prefix + name) for name in module.state_dict()}
        return weights, self._upload.done()

    def _read_weight(self, name: str) -> Tensor:
        lazy = self._weights[name]
        dtype = self._dtypes.get(name) or self.checkpoint.family.compute_dtype(name, self._dtype)
        return self._upload.put(load_finite(name, lazy), dtype)

    def _record(self, samples: list[Sample]) -> Batch:
        """One batch through everything before the layers, and the arguments of every layer."""
        owner_name, _, attribute = self._prefix.rpartition(".")
        owner = self._model.get_submodule(owner_name)
        recorders = [_Recorder(layer, self._layer_form) for layer in self._layers]
        assert self.checkpoint.tokenizer_dir is not None
        like = torch.empty(0, device=self.device, dtype=self._dtype)
        with (
            loading_on_first_use(self._model, self._load_now, self._layers[:1]),
            self._watch(self._model),
            _called_after(recorders[-1], owner) as self._last_parts,
            torch.inference_mode(),
            NothingOnMeta(),
        ):
            setattr(owner, attribute, nn.ModuleList([*recorders, *self._idle]))
            try:
                mask = self._embed(self._model, samples, self.checkpoint.tokenizer_dir, like)
            finally:
                setattr(owner, attribute, nn.ModuleList([*self._layers, *self._idle]))
        calls = [recorder.call for recorder in recorders]
        return Batch(calls[0][0], mask, [arguments for _, arguments in calls])

    def _load_now(self, names: Sequence[str]) -> list[Tensor]:
        weights = [self._read_weight(name) for name in names]
        self._upload.wait(self._upload.done(), weights)
        give_back_freed_memory()  # else what stays lies scattered in it, and the heap grows block by block
        return weights


@contextmanager
def captured_inputs(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """The first argument of every call of `module` inside the block; nothing without a module."""
    seen: list[Tensor] = []
    if module is None:
        yield seen
        return
    handle = module.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        handle.remove()


def check_mlp_is_added(layer: Any, hidden_states: Tensor, arguments: dict[str, Any]) -> None:
    """What a closed form for `mlp.down_proj` rests on: the layer gives its output plus what does not depend on it.

    Errors: it does not, or there is no such layer.
    """
    down = getattr(getattr(layer, "mlp", None), "down_proj", None)
    if not isinstance(down, nn.Linear):
        raise EvlaError("The decoder's layers have no mlp.down_proj that could be refit.")
    with captured_inputs(down) as seen:
        output = layer(hidden_states, **arguments)
    handle = down.register_forward_hook(lambda _module, _inputs, added: torch.zeros_like(added))
    try:
        without = layer(hidden_states, **arguments)
    finally:
        handle.remove()
    added = down(seen[0])
    if float((output - without - added).norm()) > _MAX_BEND * float(added.norm()):
        raise EvlaError(
            "This decoder changes what mlp.down_proj gives before it adds it (a norm after the MLP, as in Gemma2): "
            "there is no closed form to refit it; leave out --refit and --layer-method refit-aware."
        )


@dataclass
class _LayerForm:
    """What layers give: a tuple, hidden states first, and what stands `beside` them; or hidden states alone."""

    known: bool
    gives_tuple: bool = False
    beside: tuple[Any, ...] = ()


class _Recorder(nn.Module):
    """Stands where a layer stood: keeps what it is called with and passes the hidden states on.

    Where nobody knows yet what layers give, the layer is run once to see. All else that the decoder asks of it (in
    transformers before 5.6 a layer knows its kind of attention) is answered by the layer.
    """

    call: tuple[Tensor, dict[str, Any]]

    def __init__(self, layer: nn.Module, form: _LayerForm):
        super().__init__()
        self.__dict__.update(layer=layer, form=form)  # no submodule: its weights have their names already

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, form = self.__dict__["layer"], self.__dict__["form"]
        names = list(inspect.signature(layer.forward).parameters)
        self.call = (hidden_states, dict(zip(names[1:], args, strict=False)) | kwargs)
        if any(value is given for value in (*args, *kwargs.values()) for given in form.beside if given is not None):
            raise EvlaError(
                f"Layers of this decoder ({type(layer).__name__}) hand on more than hidden states; they cannot be run "
                "one by one."
            )
        if not form.known:
            output = layer(hidden_states, *args, **kwargs)
            form.known, form.gives_tuple = True, isinstance(output, tuple)
            form.beside = output[1:] if form.gives_tuple else ()
        return (hidden_states, *form.beside) if form.gives_tuple else hidden_states


def _hidden_states_alone(_layer: nn.Module, _inputs: Any, output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _called_after(last: nn.Module, owner: nn.Module) -> Iterator[list[str]]:
    """The names of the children of `owner` that run after module `last` has, in order, filled inside the block."""
    names: list[str] = []
    ended = [False]

    def note(name: str) -> None:
        if ended[0]:
            names.append(name)

    handles = [last.register_forward_hook(lambda *_: ended.__setitem__(0, True))]
    handles += [
        child.register_forward_pre_hook(lambda *_, name=name: note(name))
        for name, child in owner.named_children()
        if not isinstance(child, nn.ModuleList)
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
