"""Choose the layers to remove by running the model on calibration samples, one layer in memory at a time.

- `iterative`: the paper's score, measured anew after every removal.
- `refit-aware`: the set of layers whose removal moves the output least once the layer before each gap is refit, as
  `prune --refit` will do it. One pass; held-out samples judge.
- objective `action`: what counts is how far the predicted action chunk moves. `cosine` then ranks once, each layer
  removed alone; `iterative` removes one, measures again, and so on; `refit-aware` prices errors by it.

Variants of the model without a layer share the pass: each variant's hidden states go through the same loaded layer as
the others', so that weights are read once a pass, whatever the number of variants.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evla_cli.calibration import (
    Sample,
    hold_out,
    load_samples,
    samples_sha256,
    sort_samples,
    spread,
    warn_of_one_side,
)
from evla_cli.checkpoint.writer import parse_size
from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint
from evla_cli.methods.layer_choice import Absorber, Run, cheapest_runs, longest_run, relative_error
from evla_cli.methods.layer_importance import position_weights, real_positions, run_layer, sample_similarity
from evla_cli.methods.stability import resample_weights, set_stability, stability
from evla_cli.models.cogact import cognition_token
from evla_cli.models.scratch import Scratch, move
from evla_cli.models.skeleton import check_device
from evla_cli.models.streaming import Batch, DecoderStream, captured_inputs, check_mlp_is_added
from evla_cli.progress import progress_bar
from evla_cli.runtime.actions import sample_actions
from evla_cli.settings import ActionCacheSettings, DiffusionSettings

_MAX_ROWS = 4096  # positions that a refit is tried on, and about as many that judge it
_SNAPSHOT_EVERY = 4  # layers; states are kept there, so that a pass need not begin at the first layer


@dataclass(frozen=True)
class ChoiceOptions:
    """How layers are chosen, and the samples that the model is run on.

    Attributes:
        method, objective: of `settings.LAYER_METHODS` and `settings.OBJECTIVES`.
        held_out: only a held-out fifth judges, because the others are what layers are, or will be, fit to.
        weights: how often a position of each kind counts; None: once.
    """

    method: str
    objective: str
    data: Path
    num_samples: int | None = None
    batch_size: int = 8
    device: str = "cpu"
    memory_budget: str | None = None
    held_out: bool = False
    weights: dict[str, float] | None = None


@torch.inference_mode()
def choose_by_samples(
    checkpoint: Checkpoint, options: ChoiceOptions, num_drop: int, forced: Collection[int], protected: Collection[int]
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The layers that go, ascending, and the report for the plan.

    Args:
        num_drop: how many go in all, `forced` ones included.
        protected: layers that stay.
    """
    check_device(options.device)
    if checkpoint.tokenizer_dir is None:
        raise EvlaError(f"{checkpoint.root} has no tokenizer.json; copy the tokenizer's files there.")
    if options.objective == "action" and checkpoint.family.action_head is None:
        raise EvlaError(f"{checkpoint.root} has no action head; use --objective hidden.")
    samples = sort_samples(load_samples(options.data, checkpoint.family.sample_kind, options.num_samples))
    if num_drop == len(forced):
        return tuple(sorted(forced)), {"rounds": []}  # nothing is left to choose
    fit_to, judging = _split(samples, options)
    choice = _Choice(checkpoint, options, fit_to, judging, num_drop, sorted(forced), protected)
    facts = {
        "samples_sha256": samples_sha256(samples),
        "num_samples": len(samples),
        "num_judging": choice.num_judging,
        "batch_size": options.batch_size,
    }
    if options.method == "refit-aware":
        dropped, found = choice.refit_aware()
    else:
        dropped, found = choice.by_rounds(again=options.method == "iterative")
    return dropped, facts | {"passes": round(choice.layers_run / choice.layers_a_pass, 2)} | found


def _split(samples: list[Sample], options: ChoiceOptions) -> tuple[list[Sample], list[Sample]]:
    if options.method != "refit-aware" and not options.held_out:
        return [], samples
    fit_to, judging = hold_out(samples, options.data)
    if options.method != "refit-aware":
        return [], judging
    warn_of_one_side(fit_to, judging)
    return fit_to, [judging[number] for number in spread(judging)]  # as many of them judge as there is room for


class _Choice:
    """The stream of all samples, those that judge last, and what every method counts with.

    Attributes:
        num_judging: samples that judge. Where layers are fit, at most as many as hold `_MAX_ROWS` positions.
        layers_run: layers that samples went through, of all variants; `layers_a_pass` of them are one whole pass.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: ChoiceOptions,
        fit_to: list[Sample],
        judging: list[Sample],
        num_drop: int,
        forced: list[int],
        protected: Collection[int],
    ):
        self._checkpoint, self._weights = checkpoint, options.weights
        self._num_drop, self._forced, self._protected = num_drop, forced, protected
        budget = None if options.memory_budget is None else parse_size(options.memory_budget) // 2
        self._stream = DecoderStream(
            checkpoint, fit_to + judging, options.batch_size, torch.float32, options.device, memory_budget=budget
        )
        self._kept_states = _KeptStates(budget)
        self._values: dict[int, list[float]] = {}
        real = [real_positions(batch.hidden_states, batch.mask).cpu() for batch in self._stream.batches]  # (B, T) each
        number = torch.arange(len(fit_to) + len(judging)).split([len(rows) for rows in real])
        fit_rows = [rows & (place < len(fit_to))[:, None] for rows, place in zip(real, number, strict=True)]
        self._fit_rows = _thinned(fit_rows, _MAX_ROWS) if fit_to else fit_rows
        lengths = torch.cat([rows.sum(dim=1) for rows in real])[len(fit_to) :]
        self.num_judging = max(1, int((lengths.cumsum(0) <= _MAX_ROWS).sum())) if fit_to else len(judging)
        end = len(fit_to) + self.num_judging
        judges = [(place >= len(fit_to)) & (place < end) for place in number]
        self._judging_rows = [rows & judge[:, None] for rows, judge in zip(real, judges, strict=True)]
        counted = [self._counts(batch)[rows] for batch, rows in self._judged()]
        self._row_weights = torch.cat(counted).cpu()  # (M)
        counts = torch.cat([rows.sum(dim=1) for rows in self._judging_rows])[len(fit_to) :]
        self._row_samples = torch.arange(len(counts)).repeat_interleave(counts)  # (M)
        self._norm = self._stream.load_last_parts()
        self._head: Any = None
        if options.objective == "action":
            self._head = self._stream.load_part(checkpoint.family.action_head or "")
        self.layers_run, self.layers_a_pass = 0, len(self._stream) * (len(fit_to) + len(judging))

    # One layer after the other

    def by_rounds(self, again: bool) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Remove the layer that does least until enough are gone, measured `again` after every removal, or once."""
        kept = [layer for layer in range(len(self._stream)) if layer not in self._forced]
        dropped, steps = list(self._forced), list[dict[str, Any]]()
        more = self._num_drop - len(dropped)
        self.keep(0, self._states())
        dense = self._dense_output() if self._head is not None and self._forced else None
        found: dict[str, Any] = {}
        rounds = more if again else min(more, 1)
        with progress_bar("choosing layers", sum(len(kept) - number for number in range(rounds)), "layer") as bar:
            while len(dropped) < self._num_drop:
                candidates = [layer for layer in kept if layer not in self._protected]
                if self._head is None:
                    values = self._cosines(kept, candidates, dropped[-1] if steps else 0, bar)
                else:
                    values, facts, dense = self._action_changes(kept, candidates, dense, bar)
                    found |= facts
                scores = values.mean(axis=0)
                for layer, score in zip(candidates, scores, strict=True):
                    if not math.isfinite(score):
                        raise EvlaError(f"Layer {layer} has the score {score}; it must be a finite number.")
                ordered = [candidates[place] for place in np.argsort(scores, kind="stable")]
                going = ordered[: 1 if again else more]
                table = np.zeros((len(values), len(self._stream)))
                table[:, candidates] = values
                steps.append(
                    {
                        "dropped": going,
                        "scores": {layer: float(score) for layer, score in zip(candidates, scores, strict=True)},
                        "stability": stability(table, going, candidates),
                    }
                )
                dropped += going
                kept = [layer for layer in kept if layer not in going]
        return tuple(sorted(dropped)), {"rounds": steps} | found

    def _cosines(self, kept: list[int], candidates: list[int], resume: int, bar: Any) -> np.ndarray:
        """1 - mean cosine of input and output, (samples, candidates). What stands before layer `resume` is as it was,
        so that the pass begins at the last layer up to there whose input was kept."""
        begin = resume // _SNAPSHOT_EVERY * _SNAPSHOT_EVERY
        self._put_back(begin)
        values = self._values = {layer: found for layer, found in self._values.items() if layer < begin}
        left = [layer for layer in kept if layer >= begin]
        bar.update(len(kept) - len(left))
        mark = begin
        for index, layer in zip(left, self._stream.layers(left, again=True), strict=True):
            while mark <= index:  # the input of the first layer from `mark` on
                self.keep(mark, self._states())
                mark += _SNAPSHOT_EVERY
            values[index] = []
            for batch in self._stream.batches:
                hidden_states, _ = self._stream.on_device(batch)
                similarity, output = run_layer(layer, hidden_states, self._stream.arguments(batch, index))
                batch.hidden_states.copy_(output)
                values[index] += (1.0 - sample_similarity(similarity, self._counts(batch))).tolist()
                self.layers_run += len(hidden_states)
            bar.update()
        return np.array([values[layer] for layer in candidates]).T

    def _action_changes(
        self, kept: list[int], candidates: list[int], dense: "_Output | None", bar: Any
    ) -> tuple[np.ndarray, dict[str, Any], "_Output"]:
        """How far the dense model's action chunk moves when one more layer goes, (samples, candidates); how far the
        cognition token does, for the report; and the dense model's output, once the full model has been run."""
        self._put_back(0)
        variants = _Variants(self)
        for index, layer in zip(kept, self._stream.layers(kept, again=True), strict=True):
            variants.run(index, layer)
            if index in candidates:
                variants.begin(index, self._states())
            self._advance(index, layer)
            bar.update()
        dense = dense or self.output(self._states())
        moved = {layer: self.change(dense, self.output(variants.states(layer))) for layer in candidates}
        cognition = {layer: float(relative.mean()) for layer, (_, relative) in moved.items()}
        return np.stack([actions for actions, _ in moved.values()], axis=1), {"cognition_change": cognition}, dense

    def _dense_output(self) -> "_Output":
        for index, layer in enumerate(self._stream.layers(again=True)):
            self._advance(index, layer)
        return self.output(self._states())

    # Runs of layers, absorbed by the layer before them

    def refit_aware(self) -> tuple[tuple[int, ...], dict[str, Any]]:
        """All in one pass. At the input of layer j, every earlier layer i shows how near it comes to the state there
        when what is between goes. Each layer removed alone is carried on to the end, to see what an error costs."""
        num_layers = len(self._stream)
        removable = [layer for layer in range(num_layers) if layer not in self._protected]
        longest = longest_run(num_layers, self._num_drop, removable, self._forced)
        errors: dict[Run, np.ndarray] = {}  # by sample
        ridges: dict[int, float | None] = {}
        absorbers: dict[int, Absorber | None] = {-1: None}
        variants, embedded = _Variants(self), self._rows(self._judging_rows)

        def end_runs(j: int) -> None:
            fit_to, target = self._rows(self._fit_rows), self._rows(self._judging_rows)
            for i in range(j - 2, max(-1, j - 1 - longest) - 1, -1):
                if i + 1 not in removable:
                    return
                absorber = absorbers[i]
                found = embedded if absorber is None else absorber.best(fit_to, target)
                errors[i, j] = self.by_sample(relative_error(found, target))
                if i == j - 2:
                    ridges[j - 1] = None if absorber is None else absorber.ridge
                    variants.begin(j - 1, self._with_rows(found))
            absorbers.pop(j - 1 - longest, None)

        with progress_bar("choosing layers", num_layers, "layer") as bar:
            for index, layer in enumerate(self._stream.layers()):
                if index > 0:
                    end_runs(index)
                variants.run(index, layer)
                absorbers[index] = self._absorber(index, layer)
                bar.update()
            end_runs(num_layers)
        dense = self.output(self._states())
        moved = {layer: self.change(dense, self.output(variants.states(layer)))[0] for layer in removable}
        if self._head is not None:
            moved = {layer: values**2 for layer, values in moved.items()}  # as errors of states are
        return self._cheapest(errors, moved, ridges)

    def _absorber(self, index: int, layer: Any) -> Absorber:
        """Run layer `index`; what its last linear map gets and what the layer gives, at the chosen positions."""
        inputs: list[list[Tensor]] = [[], []]
        for number, batch in enumerate(self._stream.batches):
            if index == 0 and number == 0:
                check_mlp_is_added(layer, self._stream.on_device(batch)[0], self._stream.arguments(batch, 0))
            with captured_inputs(layer.mlp.down_proj) as seen:
                self._advance_batch(index, layer, batch)
            for rows, found in zip((self._fit_rows, self._judging_rows), inputs, strict=True):
                found.append(seen[0][rows[number].to(seen[0].device)])
        fit_to, judging = map(torch.cat, inputs)
        return Absorber(fit_to, judging, self._rows(self._fit_rows), self._rows(self._judging_rows))

    def _cheapest(
        self, errors: dict[Run, np.ndarray], moved: dict[int, np.ndarray], ridges: dict[int, float | None]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """The set of runs that moves the output least, as these samples have it, and as resampled ones would.

        Args:
            errors: of every run at its end, by sample.
            moved: how far the output moves when a layer is removed alone, by sample; squared, so that errors add up.
        """
        drawn = np.vstack([np.full(self.num_judging, 1 / self.num_judging), resample_weights(self.num_judging)])
        costs: dict[Run, np.ndarray] = {}
        for (i, j), error in errors.items():
            alone, moves = drawn @ errors[j - 2, j], drawn @ moved[j - 1]
            price = np.divide(moves, alone, out=np.zeros_like(moves), where=alone > 0)
            costs[i, j] = price * (drawn @ error)
        for run, cost in costs.items():
            if not np.isfinite(cost).all():
                raise EvlaError(f"Removing the layers between {run[0]} and {run[1]} has no finite cost.")
        dropped = cheapest_runs(costs, len(self._stream), self._num_drop, self._forced)
        chosen = tuple(int(layer) for layer in dropped[0].nonzero()[0])
        candidates = sorted(set(moved) - set(self._forced))
        found = {
            "scores": {layer: float(values.mean()) for layer, values in moved.items()},
            "relative_error": {layer: float(errors[layer - 1, layer + 1].mean()) for layer in moved},
            "ridge": ridges,
            "stability": set_stability(dropped[1:], chosen, candidates) if self.num_judging > 1 else None,
        }
        return chosen, {"rounds": [{"dropped": [n for n in chosen if n not in self._forced], **found}]}

    # What all of them use

    def _states(self) -> list[Tensor]:
        return [batch.hidden_states for batch in self._stream.batches]

    def _put_back(self, slot: int) -> None:
        for batch, states in zip(self._stream.batches, self._kept_states[slot], strict=True):
            batch.hidden_states.copy_(states)

    def _advance(self, index: int, layer: nn.Module) -> None:
        for batch in self._stream.batches:
            self._advance_batch(index, layer, batch)

    def _advance_batch(self, index: int, layer: nn.Module, batch: Batch) -> None:
        batch.hidden_states.copy_(self.run(index, layer, batch, batch.hidden_states))

    def run(self, index: int, layer: nn.Module, batch: Batch, states: Tensor) -> Tensor:
        """A variant's hidden states of a batch through a layer."""
        self.layers_run += len(states)
        output = layer(move(states, self._stream.device), **self._stream.arguments(batch, index))
        self._stream.check_finite(index, output)
        return output

    def _counts(self, batch: Batch) -> Tensor:
        """How often each position counts, (B, T)."""
        hidden_states, mask = self._stream.on_device(batch)
        real, split = real_positions(hidden_states, mask), self._checkpoint.family.modalities
        kinds = {"text": real} if split is None else split(self._checkpoint.config, real)
        return position_weights(kinds, self._weights or {})

    def _judged(self) -> list[tuple[Batch, Tensor]]:
        return list(zip(self._stream.batches, self._judging_rows, strict=True))

    def judged_batches(self) -> list[int]:
        return [number for number, rows in enumerate(self._judging_rows) if bool(rows.any())]

    @property
    def batches(self) -> list[Batch]:
        return self._stream.batches

    def keep(self, slot: Any, states: Sequence[Tensor]) -> list[Tensor]:
        return self._kept_states.put(slot, states)

    def _rows(self, rows: list[Tensor]) -> Tensor:
        """The hidden states at the chosen positions (B, T) of every batch: (rows, D), on the device."""
        return move(
            torch.cat([batch.hidden_states[chosen] for batch, chosen in zip(self.batches, rows, strict=True)]),
            self._stream.device,
        )

    def _with_rows(self, found: Tensor) -> list[Tensor]:
        """All hidden states, with those (M, D) at the judging positions."""
        states = []
        parts = found.split([int(rows.sum()) for rows in self._judging_rows])
        for batch, rows, part in zip(self.batches, self._judging_rows, parts, strict=True):
            changed = batch.hidden_states.clone()
            changed[rows] = part.to(changed)
            states.append(changed)
        return states

    def by_sample(self, values: Tensor) -> np.ndarray:
        """The mean over every judging sample's positions: (M) -> (samples)."""
        values, count = values.double().cpu() * self._row_weights, self.num_judging
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, self._row_samples, values)
        return (
            sums / torch.zeros(count, dtype=torch.float64).index_add_(0, self._row_samples, self._row_weights)
        ).numpy()

    def output(self, states: Sequence[Tensor]) -> "_Output":
        """What the model puts out, given the last layer's output for every batch that judges (all, or those alone)."""
        judged = self.judged_batches()
        if len(states) == len(self.batches):
            states = [states[number] for number in judged]
        rows, tokens = [], []
        for number, hidden_states in zip(judged, states, strict=True):
            normed = self._norm(move(hidden_states, self._stream.device))
            chosen = self._judging_rows[number].to(normed.device)
            if self._head is None:
                rows.append(normed[chosen])
            else:
                mask = self._stream.on_device(self.batches[number])[1]
                tokens.append(cognition_token(normed, mask)[chosen.any(dim=1)])
        if self._head is None:
            return _Output(rows=torch.cat(rows))
        cognition, config = torch.cat(tokens), self._head.config
        shape = (self.num_judging, config.action_horizon, config.action_dim)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        actions = sample_actions(self._head, cognition, noise.to(cognition), DiffusionSettings(), ActionCacheSettings())
        return _Output(cognition=cognition[:, 0], actions=actions)

    def change(self, dense: "_Output", other: "_Output") -> tuple[np.ndarray, np.ndarray]:
        """By sample: of the output; of the state that it is made from. Actions: mean absolute difference, normalised;
        states: squared distance over squared length."""
        if dense.actions is None or other.actions is None:
            moved = self.by_sample(relative_error(other.rows, dense.rows))
            return moved, moved
        actions = (other.actions - dense.actions).abs().double().mean(dim=(1, 2)).cpu().numpy()
        return actions, relative_error(other.cognition, dense.cognition).cpu().numpy()


@dataclass
class _Output:
    """Of the judging samples: normed states at their positions (M, D), or cognition tokens (S, D) and actions."""

    rows: Any = None
    cognition: Any = None
    actions: Tensor | None = None


class _Variants:
    """The model without a layer, for several layers at once: each one's hidden states, of the batches that judge."""

    def __init__(self, choice: _Choice):
        self._choice = choice
        self._numbers = choice.judged_batches()
        self._states: dict[int, list[Tensor]] = {}

    def begin(self, removed: int, states: Sequence[Tensor]) -> None:
        """What the layer after `removed` is to see; all batches."""
        self._states[removed] = self._choice.keep(("without", removed), [states[number] for number in self._numbers])

    def run(self, index: int, layer: nn.Module) -> None:
        for states in self._states.values():
            for number, hidden_states in zip(self._numbers, states, strict=True):
                hidden_states.copy_(self._choice.run(index, layer, self._choice.batches[number], hidden_states))

    def states(self, removed: int) -> list[Tensor]:
        return self._states[removed]


class _KeptStates:
    """Copies of hidden states under a key, in memory up to a budget, then in a file; a key's room is used again."""

    def __init__(self, memory_budget: int | None):
        self._scratch = Scratch(2**62 if memory_budget is None else memory_budget)
        self._held: dict[Any, list[Tensor]] = {}

    def put(self, key: Any, states: Sequence[Tensor]) -> list[Tensor]:
        if key not in self._held:
            self._held[key] = self._scratch.hold([tensor.clone() for tensor in states])
        else:
            for held, tensor in zip(self._held[key], states, strict=True):
                held.copy_(tensor)
        return self._held[key]

    def __getitem__(self, key: Any) -> list[Tensor]:
        return self._held[key]


def _thinned(rows: list[Tensor], limit: int) -> list[Tensor]:
    """At most `limit` of the chosen positions (B, T), evenly spaced over all batches."""
    count = sum(int(part.sum()) for part in rows)
    if count <= limit:
        return rows
    keep = torch.zeros(count, dtype=torch.bool)
    keep[torch.arange(limit) * count // limit] = True
    thinned = []
    for part, chosen in zip(rows, keep.split([int(part.sum()) for part in rows]), strict=True):
        thin = torch.zeros_like(part)
        thin[part] = chosen
        thinned.append(thin)
    return thinned
