"""Refit the kept layers to the dense model, one after the other, so that each makes up for what pruning took before it.

Two sets of hidden states of the calibration samples go through the decoder side by side: the teacher's through the
dense layers, the student's through those that are left, as narrow as they will be and refit as far as they are. The
last linear layer of every kept MLP is moved so that the student's hidden states come as near as they can to the
teacher's at the input of the next kept layer (of the final norm, after the last). One ridge regression a layer absorbs
the removed layers after it, its removed rows, and the drift of all layers before it.

Held are: the dense layer and the student's, the next one being read, both sets of hidden states, one Gram matrix with
its factor, and the candidates for one weight. The refit weights wait in an unnamed file until they are written.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evla_cli.calibration import load_samples, samples_sha256
from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors, is_finite
from evla_cli.checkpoint.writer import parse_size
from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint
from evla_cli.methods.refit import NormalEquations, best_candidate, squared_error
from evla_cli.models.scratch import Scratch, move
from evla_cli.models.skeleton import check_device
from evla_cli.models.streaming import Batch, DecoderStream, captured_inputs
from evla_cli.plan import PrunePlan
from evla_cli.progress import progress_bar
from evla_cli.vision.refitting import refit_towers

_HELD_OUT = 5  # every fifth sample judges what the others are fit to
_IN_MEMORY_BYTES = 2**27  # of refit weights and of candidates; what is more stands in a file
_MAX_BEND = 0.05  # rounding gives 1e-6; a norm after the MLP changes its output altogether


@dataclass(frozen=True)
class RefitOptions:
    """What `--refit` needs: calibration samples, and how they are run.

    Attributes:
        last_weight: how often a sample's last position (a VLA's cognition token) counts, where the others count once.
    """

    data: Path
    num_samples: int | None = None
    batch_size: int = 8
    last_weight: float = 1.0
    device: str = "cpu"
    memory_budget: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.last_weight < math.inf:
            raise EvlaError(f"refit_last_weight must be a number above 0, got {self.last_weight}.")


@torch.inference_mode()
def refit_layers(checkpoint: Checkpoint, plan: PrunePlan, options: RefitOptions) -> tuple[LazyTensors, dict[str, Any]]:
    """The weights that change, under their names in the pruned checkpoint, and the report for the plan.

    The report has, for every kept layer, lambda relative to the mean of the Gram matrix's diagonal (null: the weight
    stays), and how far the student's hidden states are off on held-out samples (root mean square), before and after.

    Errors: fewer than two samples, other samples than those of a plan that was refit, a decoder whose MLPs do not end
    in a plain addition.
    """
    check_device(options.device)
    if checkpoint.tokenizer_dir is None:
        raise EvlaError(f"{checkpoint.root} has no tokenizer.json; copy the tokenizer's files there.")
    samples = load_samples(options.data, checkpoint.family.sample_kind, options.num_samples)
    if len(samples) < 2:
        raise EvlaError(f"{options.data}: --refit needs at least 2 samples, one of them to judge the others' fit.")
    held_out = samples[_HELD_OUT - 1 :: _HELD_OUT] or samples[-1:]
    settings = {
        "samples_sha256": samples_sha256(samples),
        "num_samples": len(samples),
        "num_held_out": len(held_out),
        "batch_size": options.batch_size,
        "last_weight": options.last_weight,
    }
    recorded = plan.how.get("refit_report", settings)
    for key in [key for key, value in settings.items() if recorded.get(key) != value]:
        raise EvlaError(f"The plan was refit with {key} {recorded.get(key)}, not {settings[key]}: give the same.")
    # Those that judge come last, so that at most one batch holds samples of both kinds.
    ordered = [sample for sample in samples if sample not in held_out] + held_out
    budget = None if options.memory_budget is None else parse_size(options.memory_budget) // 2  # two sets of states
    num_fit = len(samples) - len(held_out)
    weights: LazyTensors = {}
    begin = None
    if plan.vision:  # first, so that the decoder's layers make up for what the towers' could not
        towers = refit_towers(checkpoint, plan, ordered, num_fit, options.batch_size, options.device, budget)
        weights |= towers.weights
        begin = DecoderStream(
            towers.checkpoint, ordered, options.batch_size, torch.float32, options.device, memory_budget=budget
        ).batches
    stream = DecoderStream(checkpoint, ordered, options.batch_size, torch.float32, options.device, memory_budget=budget)
    student = _Student(stream, num_fit, options.last_weight, budget, begin)
    layers: dict[int, dict[str, Any]] = {}
    done = Scratch(_IN_MEMORY_BYTES)
    with progress_bar("refitting", len(plan.keep_layers), "layer") as bar:
        for position, (layer, fit) in enumerate(_walk(stream, student, checkpoint, plan)):
            layers[layer] = {"ridge": fit.ridge, "held_out_rms": list(fit.rms)}
            if fit.weight is not None:
                name = f"{checkpoint.layer_prefix}.{position}.mlp.down_proj.weight"
                weights[name] = LazyTensor.of(done.hold(fit.weight.cpu()))
            bar.update()
    return weights, settings | {"layers": layers} | ({"vision": towers.report} if plan.vision else {})


@dataclass(frozen=True)
class _Fit:
    """A layer's new weight in the dtype it is stored in (None: as it was), its ridge, the held-out error before and
    after: root mean square over positions and dimensions."""

    weight: Tensor | None
    ridge: float | None
    rms: tuple[float, float]


def _walk(
    stream: DecoderStream, student: "_Student", checkpoint: Checkpoint, plan: PrunePlan
) -> Iterator[tuple[int, _Fit]]:
    """Every kept layer with what became of its weight, once the teacher has reached the kept layer after it."""
    pending: tuple[int, nn.Module, list[dict[str, Any]]] | None = None
    keep = dict(zip(plan.keep_layers, plan.mlp_keep or [None] * len(plan.keep_layers), strict=True))

    def fit() -> tuple[int, _Fit]:
        assert pending is not None
        index, layer, arguments = pending
        stored = checkpoint.weights[f"{checkpoint.family.decoder_layers}.{index}.mlp.down_proj.weight"].dtype
        return index, student.pass_through(layer, arguments, stored)

    for index, layer in enumerate(stream.layers()):
        if index in keep:
            if pending is not None:
                yield fit()
            arguments = [batch.arguments[index] for batch in stream.batches]
            pending = (index, _narrowed(layer, keep[index]), arguments)
        for batch in stream.batches:
            hidden_states, _ = stream.on_device(batch)
            batch.hidden_states.copy_(layer(hidden_states, **stream.arguments(batch, index)))
    yield fit()


def _narrowed(layer: nn.Module, channels: tuple[int, ...] | None) -> nn.Module:
    """The layer as the pruned model has it. It shares what is not sliced, and keeps it when the stream drops it."""
    narrow: Any = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    mlp: Any = getattr(narrow, "mlp", None)
    if not isinstance(getattr(mlp, "down_proj", None), nn.Linear):
        raise EvlaError("The decoder's layers have no mlp.down_proj; --refit cannot change them.")
    if channels is not None:
        for name, parameter in list(mlp.named_parameters()):
            kept = torch.tensor(channels, device=parameter.device)
            owner, kind = mlp.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if name == "down_proj.weight":
                owner.in_features = len(channels)
                setattr(owner, kind, nn.Parameter(parameter.index_select(1, kept), requires_grad=False))
            elif name != "down_proj.bias":
                owner.out_features = len(channels)
                setattr(owner, kind, nn.Parameter(parameter.index_select(0, kept), requires_grad=False))
    return narrow


class _Student:
    """The samples' hidden states in the pruned model; the first `num_fit` samples are fit to, the others judge.

    The teacher's, which they are held against, are those that `stream` has at the time.
    """

    def __init__(
        self,
        stream: DecoderStream,
        num_fit: int,
        last_weight: float,
        memory_budget: int | None,
        begin: list[Batch] | None = None,
    ):
        """`begin` holds the pruned model's hidden states before the first layer, and is taken over; None: they are the
        dense model's."""
        self._stream, self._last_weight = stream, last_weight
        held = Scratch(2**62 if memory_budget is None else memory_budget)
        if begin is None:
            self._hidden_states = [held.hold(batch.hidden_states.clone()) for batch in stream.batches]
        else:
            self._hidden_states = [batch.hidden_states for batch in begin]
        counts = [len(batch.hidden_states) for batch in stream.batches]
        starts = [sum(counts[:number]) for number in range(len(counts))]
        self._fits = [torch.arange(start, start + count) < num_fit for start, count in zip(starts, counts, strict=True)]
        self._checked = False

    def pass_through(self, layer: Any, arguments: list[dict[str, Any]], stored: torch.dtype) -> _Fit:
        """Fit the layer to the teacher, then take the hidden states through it."""
        down: nn.Linear = layer.mlp.down_proj
        if not self._checked:
            self._check_addition(layer, arguments[0])
            self._checked = True
        fit = self._fit(layer, down, arguments, stored)
        if fit.weight is not None:
            down.weight = nn.Parameter(fit.weight.to(down.weight), requires_grad=False)
        for number, hidden_states in enumerate(self._hidden_states):
            hidden_states.copy_(self._run(layer, number, arguments[number])[1])
            if not is_finite(hidden_states):
                raise EvlaError("The pruned layers give NaN or infinite hidden states; they cannot be refit.")
        return fit

    def _fit(self, layer: Any, down: nn.Linear, arguments: list[dict[str, Any]], stored: torch.dtype) -> _Fit:
        equations = NormalEquations(down.in_features, down.out_features, down.weight.device)
        for inputs, residual, weights in self._rows(layer, arguments, to_fit=True):
            equations.add(inputs, residual, weights)
        weight = down.weight.double()
        held = Scratch(_IN_MEMORY_BYTES)
        ridges: list[float | None] = [None]
        candidates: list[Tensor | None] = [None]
        for ridge, change in equations.solutions():
            ridges.append(ridge)
            candidates.append(held.hold((weight + change).to(stored)))
        del equations
        errors, count = [0.0] * len(candidates), 0.0
        for inputs, residual, weights in self._rows(layer, arguments, to_fit=False):
            count += float(weights.sum()) * residual.shape[1]
            for number, candidate in enumerate(candidates):
                moved = None if candidate is None else candidate.to(weight.device).double() - weight
                errors[number] += squared_error(inputs, residual, moved, weights)
        best = best_candidate(errors)
        before, after = (math.sqrt(error / count) for error in (errors[0], errors[best]))
        return _Fit(candidates[best], ridges[best], (before, after))

    def _rows(
        self, layer: Any, arguments: list[dict[str, Any]], to_fit: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """By batch, at real positions: what goes into down_proj (N, K), what the layer's output lacks (N, D), and how
        often each position counts (N)."""
        for number, (batch, fits) in enumerate(zip(self._stream.batches, self._fits, strict=True)):
            chosen = fits if to_fit else ~fits
            if not bool(chosen.any()):
                continue
            inputs, output = self._run(layer, number, arguments[number])
            teacher, mask = self._stream.on_device(batch)
            real = torch.ones(output.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
            weights = torch.ones(real.shape, dtype=torch.float64)  # (B, T)
            weights[torch.arange(len(real)), real.long().cumsum(dim=1).argmax(dim=1)] = self._last_weight
            rows = (real & chosen[:, None]).to(output.device)  # (B, T)
            yield inputs[rows], teacher[rows] - output[rows], weights.to(output.device)[rows]

    def _run(self, layer: Any, number: int, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A batch through the layer: what goes into down_proj (B, T, K), and the layer's output (B, T, D)."""
        hidden_states, arguments = move((self._hidden_states[number], arguments), self._stream.device)
        with captured_inputs(layer.mlp.down_proj) as seen:
            output = layer(hidden_states, **arguments)
        return seen[0], output

    def _check_addition(self, layer: Any, arguments: dict[str, Any]) -> None:
        """Errors: the layer's output is not down_proj's output plus something that does not depend on it."""
        down: nn.Linear = layer.mlp.down_proj
        inputs, output = self._run(layer, 0, arguments)
        handle = down.register_forward_hook(lambda _module, _inputs, added: torch.zeros_like(added))
        try:
            without = self._run(layer, 0, arguments)[1]
        finally:
            handle.remove()
        added = down(inputs)
        if float((output - without - added).norm()) > _MAX_BEND * float(added.norm()):
            raise EvlaError(
                "This decoder changes what mlp.down_proj gives before it adds it (a norm after the MLP, as in Gemma2): "
                "there is no closed form; prune it without --refit."
            )
