"""Refit the kept layers to the dense model, one after the other, so that each makes up for what pruning took before it.

Hidden states of the calibration samples go through the decoder side by side: the teacher's through the dense layers, a
student's through those that are left, as narrow as they will be and refit as far as they are. The last linear layer of
every kept MLP is moved so that the student's hidden states come as near as they can to the teacher's at the input of
the next kept layer (of the final norm, after the last). One ridge regression a layer absorbs the removed layers after
it, its removed rows, and the drift of all layers before it.

The student is fit to four samples of five, and what it is on the fifth chooses lambda and, at the end, whether refit
helps at all. What was judged is what is written: nothing is fit to the samples that judge, so that they can judge the
result, too. A second student, which is not refit, shows on the fifth what the first is to be held against. Where vision
towers are pruned, both stand behind those towers, refit before.

Held are: the dense layer and the student's, the next one being read, the sets of hidden states, one Gram matrix, and
the rows of one layer that judge. The refit weights wait in an unnamed file until they are written.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evla_cli.calibration import hold_out, load_samples, samples_sha256, sort_samples, warn_of_one_side
from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors, give_back_freed_memory, is_finite
from evla_cli.checkpoint.writer import parse_size
from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint
from evla_cli.methods.layer_importance import real_positions
from evla_cli.methods.refit import Fit, NormalEquations, best_fit, squared_error
from evla_cli.models.scratch import Scratch, move
from evla_cli.models.skeleton import check_device
from evla_cli.models.streaming import Batch, DecoderStream, captured_inputs, check_mlp_is_added
from evla_cli.plan import PrunePlan
from evla_cli.progress import progress_bar
from evla_cli.vision.refitting import refit_towers

_IN_MEMORY_BYTES = 2**27  # of refit weights, and of rows that judge; what is more stands in a file


@dataclass(frozen=True)
class RefitOptions:
    """What `--refit` needs: calibration samples, and how they are run.

    Attributes:
        last_weight: how often a sample's last position counts, where the others count once; None: once in a text, and
            in a VLA, where it is the cognition token, as often as all positions of its sample together.
    """

    data: Path
    num_samples: int | None = None
    batch_size: int = 8
    last_weight: float | None = None
    device: str = "cpu"
    memory_budget: str | None = None

    def __post_init__(self) -> None:
        if self.last_weight is not None and not 0 < self.last_weight < math.inf:
            raise EvlaError(f"refit_last_weight must be a number above 0, got {self.last_weight}.")


@torch.inference_mode()
def refit_layers(checkpoint: Checkpoint, plan: PrunePlan, options: RefitOptions) -> tuple[LazyTensors, dict[str, Any]]:
    """The weights that change, under their names in the pruned checkpoint, and the report for the plan.

    The report says how far the student is off on held-out samples (root mean square), without refit and with it: after
    every kept layer, and by kind of position at the end, where it decides.

    Errors: fewer than two samples, other samples than those of a plan that was refit, a decoder whose MLPs do not end
    in a plain addition.
    """
    check_device(options.device)
    if checkpoint.tokenizer_dir is None:
        raise EvlaError(f"{checkpoint.root} has no tokenizer.json; copy the tokenizer's files there.")
    samples = sort_samples(load_samples(options.data, checkpoint.family.sample_kind, options.num_samples))
    fit_to, held_out = hold_out(samples, options.data)
    warn_of_one_side(fit_to, held_out)
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
    ordered = fit_to + held_out
    sets = 4 if plan.vision else 3  # of hidden states: the dense model's, two students', what those begin with
    budget = None if options.memory_budget is None else parse_size(options.memory_budget) // sets
    num_fit = len(fit_to)
    towers, begin = None, None
    if plan.vision:  # first, so that the decoder's layers make up for what the towers' could not
        towers = refit_towers(checkpoint, plan, ordered, num_fit, options.batch_size, options.device, budget)
        begin = DecoderStream(
            towers.checkpoint, ordered, options.batch_size, torch.float32, options.device, memory_budget=budget
        ).batches
    stream = DecoderStream(checkpoint, ordered, options.batch_size, torch.float32, options.device, memory_budget=budget)
    walk = _Walk(stream, begin or stream.batches, num_fit, options.last_weight, budget)
    del begin
    weights: LazyTensors = {}
    layers: dict[int, dict[str, Any]] = {}
    done = Scratch(_IN_MEMORY_BYTES)
    with progress_bar("refitting", len(plan.keep_layers), "layer") as bar:
        for position, (index, layer, arguments) in enumerate(_pruned_layers(stream, plan)):
            stored = checkpoint.weights[f"{checkpoint.family.decoder_layers}.{index}.mlp.down_proj.weight"].dtype
            fit = walk.pass_through(layer, arguments, stored)
            layers[index] = {"ridge": fit.ridge, "held_out_rms": list(fit.errors)}
            if fit.weight is not None:
                name = f"{checkpoint.layer_prefix}.{position}.mlp.down_proj.weight"
                weights[name] = LazyTensor.of(done.hold(fit.weight.cpu()))
            del fit
            give_back_freed_memory()
            bar.update()
    final = walk.final_errors(stream.load_last_parts())
    before, after = list(final.values())[-1]
    helps = after < before
    report = settings | {"helps": helps, "final_rms": final, "layers": layers}
    if towers is None:
        return weights if helps else {}, report
    report |= {"vision": towers.report, "vision_final_rms": towers.final_rms}
    return towers.weights | (weights if helps else {}), report


def _pruned_layers(stream: DecoderStream, plan: PrunePlan) -> Iterator[tuple[int, nn.Module, list[dict[str, Any]]]]:
    """Every kept layer, as narrow as it will be, and what it is called with, batch by batch; each once the teacher's
    hidden states have reached the kept layer after it."""
    pending: tuple[int, nn.Module, list[dict[str, Any]]] | None = None
    keep = dict(zip(plan.keep_layers, plan.mlp_keep or [None] * len(plan.keep_layers), strict=True))
    for index, layer in enumerate(stream.layers()):
        if index in keep:
            if pending is not None:
                yield pending
            arguments = [batch.arguments[index] for batch in stream.batches]
            pending = (index, _narrowed(layer, keep[index]), arguments)
        for batch in stream.batches:
            hidden_states, _ = stream.on_device(batch)
            batch.hidden_states.copy_(layer(hidden_states, **stream.arguments(batch, index)))
    assert pending is not None
    yield pending


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


_Rows = tuple[Tensor, Tensor, Tensor]


class _Walk:
    """The students on their way; the first `num_fit` samples are fit to, the others judge."""

    def __init__(
        self,
        stream: DecoderStream,
        begin: list[Batch],
        num_fit: int,
        last_weight: float | None,
        memory_budget: int | None,
    ):
        """`begin`: the students' hidden states before the first layer; others than the dense model's where towers are
        pruned."""
        self._stream = stream
        sizes = [len(batch.hidden_states) for batch in stream.batches]
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self._judges = [start + torch.arange(size) >= num_fit for start, size in zip(starts, sizes, strict=True)]
        self._kinds = [_position_kinds(stream, batch) for batch in stream.batches]
        self._counts = [_counts(stream, batch, last_weight) for batch in stream.batches]
        self._refit = _Student(stream, begin, range(len(begin)), memory_budget)
        judging = [number for number, judges in enumerate(self._judges) if bool(judges.any())]
        self._plain = _Student(stream, begin, judging, memory_budget)
        self._checked = False
        self._ridge: float | None = None  # of the layer before: where the search for the next one's begins

    def pass_through(self, layer: Any, arguments: list[dict[str, Any]], stored: torch.dtype) -> Fit:
        """Fit the layer to the teacher, and take all hidden states through it: the fit that is to be written."""
        if not self._checked:
            check_mlp_is_added(layer, *self._refit.call(0, arguments[0]))
            self._checked = True
        down: nn.Linear = layer.mlp.down_proj
        as_it_was = down.weight
        self._plain.advance(layer, arguments)
        fit = self._fit(layer, down, arguments, stored)
        _put(down, fit.weight, as_it_was)
        self._refit.advance(layer, arguments)
        return fit

    def _fit(self, layer: Any, down: nn.Linear, arguments: list[dict[str, Any]], stored: torch.dtype) -> Fit:
        held = Scratch(_IN_MEMORY_BYTES)
        judging = [held.hold(rows) for rows in self._rows(layer, arguments, judges=True)]
        total = sum(float(counts.sum()) * residual.shape[1] for _, residual, counts in judging)
        equations = NormalEquations(down.in_features, down.out_features, down.weight.device)
        for inputs, residual, counts in self._rows(layer, arguments, judges=False):
            equations.add(inputs, residual, counts)

        def error(weight: Tensor | None) -> float:
            change = None if weight is None else weight.to(torch.float32, copy=True).sub_(down.weight)
            rows = (move(rows, self._stream.device) for rows in judging)
            squares = sum(squared_error(inputs, residual, change, counts) for inputs, residual, counts in rows)
            return math.sqrt(squares / total)

        fit = best_fit(lambda ridge: _changed(down.weight, equations.solution(ridge), stored), error, start=self._ridge)
        self._ridge = fit.ridge
        return fit

    def _rows(self, layer: Any, arguments: list[dict[str, Any]], judges: bool) -> Iterator[_Rows]:
        """Of the samples that judge, or of the others, by batch, at real positions: what goes into down_proj (N, K),
        what the layer's output lacks (N, D), and how often each position counts (N)."""
        for number, (batch, judging) in enumerate(zip(self._stream.batches, self._judges, strict=True)):
            chosen = judging == judges
            if not bool(chosen.any()):
                continue
            inputs, output = self._refit.run(layer, number, arguments[number])
            teacher, _ = self._stream.on_device(batch)
            counts = self._counts[number].to(output.device)
            rows = (counts > 0) & chosen.to(output.device)[:, None]  # (B, T)
            yield inputs[rows], teacher[rows] - output[rows], counts[rows]

    def final_errors(self, norm: nn.Module) -> dict[str, list[float]]:
        """Root mean square distance from the teacher after the final norm, on the samples that judge, without refit and
        with it: by kind of position."""
        squares: dict[str, list[float]] = {}
        for number, states in self._plain.hidden_states.items():
            teacher, _ = self._stream.on_device(self._stream.batches[number])
            target = norm(teacher)
            for which, student in enumerate((states, self._refit.hidden_states[number])):
                off = (norm(move(student, self._stream.device)) - target).double().square().mean(dim=2).cpu()  # (B, T)
                for kind, positions in self._kinds[number].items():
                    found = off[positions & self._judges[number][:, None]]
                    sums = squares.setdefault(kind, [0.0, 0.0, 0.0])
                    sums[which] += float(found.sum())
                    sums[2] += len(found) / 2  # counted for both students
        return {kind: [math.sqrt(sums[0] / sums[2]), math.sqrt(sums[1] / sums[2])] for kind, sums in squares.items()}


def _put(down: nn.Linear, weight: Tensor | None, otherwise: Tensor) -> None:
    down.weight = otherwise if weight is None else nn.Parameter(weight.to(otherwise), requires_grad=False)


def _changed(weight: Tensor, change: Tensor | None, stored: torch.dtype) -> Tensor | None:
    return None if change is None else change.add_(weight).to(stored)  # in place: it may take 270 MB


def _position_kinds(stream: DecoderStream, batch: Batch) -> dict[str, Tensor]:
    """Which positions (B, T) are of which kind; padding is of none."""
    real, split = _real(batch), stream.checkpoint.family.modalities
    return {"all": real} if split is None else split(stream.checkpoint.config, real)


def _counts(stream: DecoderStream, batch: Batch, last_weight: float | None) -> Tensor:
    """How often each position counts: (B, T), float64."""
    real = _real(batch)
    counts = real.double()
    if last_weight is not None:
        counts[_last(real)] = last_weight
    elif stream.checkpoint.family.modalities is not None:
        counts[_last(real)] = real.sum(dim=1).double()  # cognition tokens are all that the action head sees
    return counts


def _real(batch: Batch) -> Tensor:
    """(B, T), true where a position is no padding."""
    return real_positions(batch.hidden_states, batch.mask).cpu()


def _last(real: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(real)), real.long().cumsum(dim=1).argmax(dim=1)


class _Student:
    """A pruned model's hidden states of the batches of these numbers, at the input of the layer whose turn it is."""

    def __init__(self, stream: DecoderStream, begin: list[Batch], numbers: Iterable[int], memory_budget: int | None):
        self._stream = stream
        held = Scratch(2**62 if memory_budget is None else memory_budget)
        self.hidden_states = {number: held.hold(begin[number].hidden_states.clone()) for number in numbers}

    def advance(self, layer: Any, arguments: list[dict[str, Any]]) -> None:
        for number, hidden_states in self.hidden_states.items():
            hidden_states.copy_(self.run(layer, number, arguments[number])[1])
            if not is_finite(hidden_states):
                raise EvlaError("The pruned layers give NaN or infinite hidden states; they cannot be refit.")

    def run(self, layer: Any, number: int, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A batch through the layer: what goes into down_proj (B, T, K), and the layer's output (B, T, D)."""
        hidden_states, arguments = self.call(number, arguments)
        with captured_inputs(layer.mlp.down_proj) as seen:
            output = layer(hidden_states, **arguments)
        return seen[0], output

    def call(self, number: int, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What the layer is called with for a batch, on the device."""
        return move((self.hidden_states[number], arguments), self._stream.device)
