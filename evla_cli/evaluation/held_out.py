"""How far what a recipe made lies from its source on held-out samples: the last line of `evla run`.

Letters used here: B batch, T positions, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evla_cli.calibration import Sample, spread
from evla_cli.checkpoint.writer import parse_size
from evla_cli.evaluation.candidates import open_candidates
from evla_cli.evaluation.fidelity import Predictions, fidelity, predict_samples
from evla_cli.evaluation.intervals import mean_estimate
from evla_cli.evaluation.memory import release
from evla_cli.families import open_checkpoint
from evla_cli.methods.layer_importance import real_positions
from evla_cli.models.skeleton import failures_of_transformers, out_of_memory
from evla_cli.models.streaming import DecoderStream
from evla_cli.progress import progress_bar
from evla_cli.runtime.policy import policy_from_weights

_MAX_SAMPLES = 32  # two predictions each, the dense one's as slow as any
_ADVICE = "the result is complete, and evla compare measures it on as few samples as you like; or use --device cpu"


@dataclass(frozen=True)
class HeldOutError:
    """
    Attributes:
        measure: "action": mean absolute difference of normalised actions, gripper excluded, from the same noise.
            "hidden": of a model without actions, distance of its last hidden states over their length.
        value, low, high: mean over samples and its 95 % interval, which a single sample does not have.
        num_samples, num_held_out: those that were run, and those that refit held out.
    """

    measure: str
    value: float
    low: float | None
    high: float | None
    num_samples: int
    num_held_out: int


def judge(
    source: Path,
    result: Path,
    held_out: Sequence[Sample],
    *,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str | None = None,
    memory_budget: str | None = None,
) -> HeldOutError:
    """Run source and result on some of the samples that refit held out.

    Args:
        dtype: to compute in; None: a policy computes as it is stored, a model without actions in float32.
    """
    chosen = [held_out[number] for number in sorted(spread(held_out)[:_MAX_SAMPLES])]
    torch_dtype = None if dtype is None else getattr(torch, dtype)
    with out_of_memory(device, _ADVICE), failures_of_transformers(result):
        if open_checkpoint(source).family.has_action_head:
            measure, errors = "action", _action_errors(source, result, chosen, batch_size, device, torch_dtype)
        else:
            budget = None if memory_budget is None else parse_size(memory_budget) // 2
            measure = "hidden"
            errors = _hidden_errors(source, result, chosen, batch_size, device, torch_dtype or torch.float32, budget)
    found = mean_estimate(errors).to_record()
    return HeldOutError(measure, found["value"], found["low"], found["high"], len(chosen), len(held_out))


def _action_errors(
    source: Path, result: Path, samples: list[Sample], batch_size: int, device: str, dtype: torch.dtype | None
) -> np.ndarray:
    """By sample. One policy is loaded at a time."""
    found: list[Predictions] = []
    candidates = open_candidates([source, result])
    key = min(candidates[0].config.norm_stats)  # any will do: normalised actions are compared
    with progress_bar("judging", len(candidates), "policy") as bar:
        for candidate in candidates:
            policy = policy_from_weights(candidate.checkpoint, candidate.settings, device=device, dtype=dtype)
            found.append(predict_samples(policy, samples, unnorm_key=key, batch_size=batch_size))
            del policy
            release(device)
            bar.update()
    return fidelity(*found).action_error


@torch.inference_mode()
def _hidden_errors(
    source: Path,
    result: Path,
    samples: list[Sample],
    batch_size: int,
    device: str,
    dtype: torch.dtype,
    memory_budget: int | None,
) -> np.ndarray:
    """By sample: distance after the final norm over all real positions, over the length of the source's states. One
    layer is loaded at a time."""
    streams, norms = [], []
    with progress_bar("judging", 2, "model") as bar:
        for path in (source, result):
            stream = DecoderStream(open_checkpoint(path), samples, batch_size, dtype, device, memory_budget)
            for index, layer in enumerate(stream.layers()):
                for batch in stream.batches:
                    states, _ = stream.on_device(batch)
                    output = layer(states, **stream.arguments(batch, index))
                    stream.check_finite(index, output)
                    batch.hidden_states.copy_(output)
            streams.append(stream)
            norms.append(stream.load_last_parts())
            bar.update()
    errors: list[float] = []
    for batches in zip(*(stream.batches for stream in streams), strict=True):
        states, mask = streams[0].on_device(batches[0])
        ours, theirs = (
            norm(stream.on_device(batch)[0]).double()
            for norm, stream, batch in zip(norms, streams, batches, strict=True)
        )
        real = real_positions(states, mask)  # (B, T)
        squares = [(part.square().sum(dim=2) * real).sum(dim=1) for part in (theirs - ours, ours)]
        errors += (squares[0] / squares[1]).sqrt().tolist()
    return np.array(errors)
