"""Refit pruned vision towers to the dense ones, block by block, as `evla_cli.refitting` does it for the decoder.

Letters: N positions, K inputs of fc2 (kept channels), D the tower's width.

The last linear layer of every kept MLP is moved, weight and bias, so that the pruned tower's hidden states come as near
as they can to the dense one's at the input of the next kept block. After the last kept block those are the features:
patches alone count there, all positions before. With LayerScale a block adds g * (fc2(h)), g one factor a dimension:

    argmin over Delta (D, K + 1) of  sum over n of | g * (Delta [h_n, 1]) - R_n |^2 + lambda | g * Delta |^2

has the solution of the plain problem divided by g, row by row; rows with g = 0 stay.

A block judges itself by held-out samples, and so does the whole: features that refit did not bring nearer to the dense
tower's than pruning alone had left them leave all of the tower's weights as they were.

Held are one block of the dense tower and of the pruned one, the next one being read, two sets of hidden states of one
tower and the held-out part of a third, one Gram matrix, and the rows of one block that judge.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evla_cli.calibration import Sample
from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors, is_finite
from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint, Tower, prune_config
from evla_cli.methods.layer_pruning import prune_weights
from evla_cli.methods.refit import RIDGES, NormalEquations, best_fit, squared_error
from evla_cli.models.scratch import Scratch, move
from evla_cli.models.streaming import DecoderStream, captured_inputs
from evla_cli.plan import PrunePlan, StackPlan
from evla_cli.progress import progress_bar

_IN_MEMORY_BYTES = 2**27  # of refit weights; what is more stands in a file


@dataclass(frozen=True)
class RefitTowers:
    """
    Attributes:
        checkpoint: the source with its towers pruned and refit, and its decoder as it was; nothing is written of it.
        weights: those that change, under their names in the pruned checkpoint.
        report: tower -> source block -> as for the decoder's layers.
        final_rms: tower -> root mean square distance of its features from the dense ones on held-out samples, pruned
            and refit. Where the second is not the smaller one, the tower is not refit.
    """

    checkpoint: Checkpoint
    weights: LazyTensors
    report: dict[str, dict[int, dict[str, Any]]]
    final_rms: dict[str, list[float]]


@torch.inference_mode()
def refit_towers(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    samples: Sequence[Sample],
    num_fit: int,
    batch_size: int,
    device: torch.device | str,
    memory_budget: int | None,
) -> RefitTowers:
    """Fit the towers that the plan prunes to the first `num_fit` samples; the others judge."""
    family = checkpoint.family
    changed: dict[str, LazyTensors] = {}
    report: dict[str, dict[int, dict[str, Any]]] = {}
    final: dict[str, list[float]] = {}
    done = Scratch(_IN_MEMORY_BYTES)
    for name, stack in plan.vision.items():
        tower = family.towers[name]
        stream = DecoderStream(
            checkpoint, samples, batch_size, torch.float32, device, memory_budget=memory_budget, tower=tower
        )
        student = _Student(stream, tower, num_fit, tower.num_prefix_tokens(stream.config), memory_budget)
        changed[name], report[name] = {}, {}
        with progress_bar(f"refitting {name}", len(stack.keep_layers) - 1, "block") as bar:
            for position, (block, fit) in enumerate(_walk(stream, student, checkpoint, tower, stack)):
                report[name][block] = {"ridge": fit.ridge, "held_out_rms": list(fit.rms)}
                for kind, tensor in fit.parameters.items():
                    changed[name][f"{position}.mlp.fc2.{kind}"] = LazyTensor.of(done.hold(tensor.cpu()))
                bar.update()
        before, after = final[name] = student.final_rms()
        if after >= before:
            changed[name] = {}
    towers_alone = plan.of_towers()
    weights = prune_weights(checkpoint.weights, towers_alone, family.decoder_layers, family.tower_prefixes)
    pruned = replace(
        checkpoint,
        config=prune_config(checkpoint.config, family, towers_alone),
        weights=weights | _named(changed, family.tower_prefixes),
    )
    return RefitTowers(pruned, _named(changed, checkpoint.tower_prefixes), report, final)


def _named(changed: dict[str, LazyTensors], prefixes: dict[str, tuple[str, ...]]) -> LazyTensors:
    return {f"{prefixes[name][0]}.{key}": lazy for name, tensors in changed.items() for key, lazy in tensors.items()}


@dataclass(frozen=True)
class _Fit:
    """fc2's new weight and bias in the dtypes they are stored in (empty: as they were), the ridge, and the held-out
    error before and after: root mean square over positions and dimensions."""

    parameters: dict[str, Tensor]
    ridge: float | None
    rms: tuple[float, float]


def _walk(
    stream: DecoderStream, student: "_Student", checkpoint: Checkpoint, tower: Tower, stack: StackPlan
) -> Iterator[tuple[int, _Fit]]:
    """Every kept block that runs with what became of its fc2, once the teacher has reached the kept block after it."""
    pending: tuple[int, nn.Module, list[dict[str, Any]]] | None = None
    keep = dict(zip(stack.keep_layers, stack.mlp_keep or [None] * len(stack.keep_layers), strict=True))

    def fit(last: bool) -> tuple[int, _Fit]:
        assert pending is not None
        index, block, arguments = pending
        prefix = f"{tower.blocks}.{index}.mlp.fc2"
        stored = {kind: checkpoint.weights[f"{prefix}.{kind}"].dtype for kind in ("weight", "bias")}
        return index, student.pass_through(block, arguments, stored, last)

    for index, block in enumerate(stream.layers()):
        if index in keep:
            if pending is not None:
                yield fit(last=False)
            pending = (index, _narrowed(block, keep[index]), [batch.arguments[index] for batch in stream.batches])
        for batch in stream.batches:
            hidden_states, _ = stream.on_device(batch)
            batch.hidden_states.copy_(block(hidden_states, **stream.arguments(batch, index)))
    yield fit(last=True)


def _narrowed(block: nn.Module, channels: tuple[int, ...] | None) -> nn.Module:
    """The block as the pruned tower has it. It shares what is not sliced, and keeps it when the stream drops it."""
    narrow: Any = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    if channels is not None:
        fc1, fc2 = narrow.mlp.fc1, narrow.mlp.fc2
        kept = torch.tensor(channels, device=fc1.weight.device)
        fc1.weight = nn.Parameter(fc1.weight.index_select(0, kept), requires_grad=False)
        fc1.bias = nn.Parameter(fc1.bias.index_select(0, kept), requires_grad=False)
        fc2.weight = nn.Parameter(fc2.weight.index_select(1, kept), requires_grad=False)
        fc1.out_features = fc2.in_features = len(channels)
    return narrow


class _Student:
    """The samples' hidden states in the pruned tower; the first `num_fit` samples are fit to, the others judge. Those
    that judge go through the tower without refit, too."""

    def __init__(self, stream: DecoderStream, tower: Tower, num_fit: int, num_prefix: int, memory_budget: int | None):
        self._stream, self._scale, self._num_prefix = stream, tower.scale, num_prefix
        held = Scratch(2**62 if memory_budget is None else memory_budget)
        self._hidden_states = [held.hold(batch.hidden_states.clone()) for batch in stream.batches]
        counts = [len(batch.hidden_states) for batch in stream.batches]
        self._num_fit = [min(max(num_fit - sum(counts[:n]), 0), count) for n, count in enumerate(counts)]
        judging = [number for number, count in enumerate(counts) if self._num_fit[number] < count]
        self._plain = {number: held.hold(stream.batches[number].hidden_states.clone()) for number in judging}

    def pass_through(
        self, block: Any, arguments: list[dict[str, Any]], stored: dict[str, torch.dtype], last: bool
    ) -> _Fit:
        """Fit the block to the teacher, then take the hidden states through it."""
        fc2: nn.Linear = block.mlp.fc2
        begin = self._num_prefix if last else 0
        for number, hidden_states in self._plain.items():
            hidden_states.copy_(self._run(block, hidden_states, arguments[number])[1])
        fit = self._fit(block, fc2, arguments, stored, begin)
        for kind, tensor in fit.parameters.items():
            setattr(fc2, kind, nn.Parameter(tensor.to(getattr(fc2, kind)), requires_grad=False))
        for number, hidden_states in enumerate(self._hidden_states):
            hidden_states.copy_(self._run(block, hidden_states, arguments[number])[1])
            if not is_finite(hidden_states):
                raise EvlaError("The pruned tower gives NaN or infinite hidden states; it cannot be refit.")
        return fit

    def _fit(
        self, block: Any, fc2: nn.Linear, arguments: list[dict[str, Any]], stored: dict[str, torch.dtype], begin: int
    ) -> _Fit:
        before = torch.column_stack((fc2.weight.double(), fc2.bias.double()))  # (D, K + 1)
        scale = torch.ones(len(before), 1) if self._scale is None else block.get_parameter(self._scale)[:, None]
        scale = scale.to(before)
        equations = NormalEquations(before.shape[1], len(before), before.device)
        for inputs, residual in self._rows(block, arguments, begin, to_fit=True):
            equations.add(inputs, residual)
        held = Scratch(_IN_MEMORY_BYTES)
        judging = [held.hold(rows) for rows in self._rows(block, arguments, begin, to_fit=False)]
        count = sum(residual.numel() for _, residual in judging)

        def rounded(change: Tensor | None) -> Tensor | None:
            if change is None:
                return None
            after = before + torch.where(scale == 0, 0.0, change / scale)
            return torch.column_stack([part.to(stored[kind]).double() for kind, part in _split(after).items()])

        def error(after: Tensor | None) -> float:
            moved = None if after is None else scale * (after - before)
            rows = (move(rows, self._stream.device) for rows in judging)
            return math.sqrt(sum(squared_error(inputs, residual, moved) for inputs, residual in rows) / count)

        # Where nothing is lacking, before the first block that was pruned, there is nothing to solve.
        ridges = RIDGES if bool(equations.moment.any()) else ()
        best = best_fit(lambda ridge: rounded(equations.solution(ridge)), error, ridges)
        parts = {} if best.weight is None else _split(best.weight)
        parameters = {kind: part.to(stored[kind]) for kind, part in parts.items()}
        return _Fit(parameters, best.ridge, best.errors)

    def _rows(
        self, block: Any, arguments: list[dict[str, Any]], begin: int, to_fit: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """By batch, from position `begin` on: what goes into fc2 and a 1 for its bias (N, K + 1), and what the block's
        output lacks (N, D)."""
        for number, (batch, num_fit) in enumerate(zip(self._stream.batches, self._num_fit, strict=True)):
            chosen = slice(0, num_fit) if to_fit else slice(num_fit, None)
            if len(batch.hidden_states[chosen]) == 0:
                continue
            inputs, output = self._run(block, self._hidden_states[number], arguments[number])
            teacher, _ = self._stream.on_device(batch)
            inputs = torch.cat((inputs, torch.ones_like(inputs[..., :1])), dim=2)
            residual = teacher - output
            yield inputs[chosen, begin:].flatten(0, 1), residual[chosen, begin:].flatten(0, 1)

    def final_rms(self) -> list[float]:
        """How far the features are from the teacher's after the last block on the samples that judge, without refit
        and with it: root mean square over patches and dimensions."""
        squares, count = [0.0, 0.0], 0
        for number, plain in self._plain.items():
            chosen = (slice(self._num_fit[number], None), slice(self._num_prefix, None))
            teacher = self._stream.batches[number].hidden_states[chosen]
            count += teacher.numel()
            for which, states in enumerate((plain, self._hidden_states[number])):
                off = (states[chosen] - teacher).contiguous()  # summed in the same order, whatever the towers' layout
                squares[which] += float(off.double().square().sum())
        return [math.sqrt(each / count) for each in squares]

    def _run(self, block: Any, hidden_states: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A batch through the block: what goes into fc2 (B, T, K), and the block's output (B, T, D)."""
        hidden_states, arguments = move((hidden_states, arguments), self._stream.device)
        with captured_inputs(block.mlp.fc2) as seen:
            output = block(hidden_states, **arguments)
        return seen[0], output


def _split(joined: Tensor) -> dict[str, Tensor]:
    """(D, K + 1) -> fc2's weight (D, K) and bias (D)."""
    return {"weight": joined[:, :-1], "bias": joined[:, -1]}
