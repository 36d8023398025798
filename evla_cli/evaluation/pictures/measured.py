"""What a report needs of the models themselves: one is loaded at a time, and none where nothing is asked of it."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from evla_cli.calibration import sort_samples, spread
from evla_cli.evaluation.bench import describe_environment, make_batch
from evla_cli.evaluation.candidates import Candidate
from evla_cli.evaluation.fidelity import Predictions, cognition_tokens, predict_from
from evla_cli.evaluation.latency import Batch, Latency, measure_latency
from evla_cli.evaluation.memory import release
from evla_cli.evaluation.pictures.inputs import Inputs
from evla_cli.methods.visual_tokens import TokenSelection
from evla_cli.runtime.policy import Policy, policy_from_checkpoint
from evla_cli.runtime.recording import denoise_similarity
from evla_cli.settings import InferenceSettings, VisualTokenSettings

NUM_OTHER_NOISES = 8  # with which the dense model predicts each sample again, for scale
_SIMILARITY_SAMPLES = 8  # the first ones, on which denoising steps are compared
_SWEEP = 8  # numbers of kept tokens, from an eighth to all
WARMUP = 2


@dataclass
class Measured:
    """
    Attributes:
        selections: by sample; None where the bundle keeps all tokens, or chooses them by the frame before.
        compressed, dense: by sample, what the bundle and the dense model predict from the same noise.
        other_noises: by sample, what the dense model predicts from others.
        step_similarity: of the action head's modules between denoising steps; with the model's name and the number of
            samples.
        latencies: by number of kept tokens.
    """

    selections: dict[int, TokenSelection | None] = field(default_factory=dict)
    compressed: dict[int, Predictions] = field(default_factory=dict)
    dense: dict[int, Predictions] = field(default_factory=dict)
    other_noises: dict[int, list[Predictions]] = field(default_factory=dict)
    step_similarity: tuple[dict[str, Any], str, int] | None = None
    latencies: dict[int, Latency] = field(default_factory=dict)
    environment: dict[str, Any] | None = None


def measure(inputs: Inputs) -> Measured:
    found, request = Measured(), inputs.request
    analyzed = inputs.importance is not None and inputs.importance[0].action_head is not None
    compares_steps = bool(inputs.samples) and not analyzed
    sweep = sweep_settings(inputs.bundle) if inputs.bundle is not None and request.runs else {}
    if inputs.bundle is not None and (inputs.chosen or sweep):
        policy = _load(inputs.bundle, inputs)
        dtype = str(next(policy.model.projector.parameters()).dtype).removeprefix("torch.")
        for index in inputs.chosen:
            cognition, found.selections[index] = _look(policy, inputs, index)
            if inputs.dense is not None:
                found.compressed[index] = _predict(policy, cognition, inputs, 0)
        if compares_steps and inputs.dense is None:
            found.step_similarity = _compare_steps(policy, inputs, inputs.bundle)
        if sweep:
            policies = {str(count): policy.with_settings(settings) for count, settings in sweep.items()}
            latencies = measure_latency(policies, _batch(inputs), request.runs, WARMUP)
            found.latencies = {int(count): latency for count, latency in latencies.items()}
            found.environment = describe_environment(request.device) | {"dtype": dtype}
            del policies
        del policy
        release(request.device)
    if inputs.dense is not None and inputs.samples:
        policy = _load(inputs.dense, inputs)
        for index in inputs.chosen if inputs.bundle is not None else ():
            cognition = cognition_tokens(policy, [inputs.samples[index]])
            found.dense[index] = _predict(policy, cognition, inputs, 0)
            found.other_noises[index] = [
                _predict(policy, cognition, inputs, other) for other in range(1, 1 + NUM_OTHER_NOISES)
            ]
        if compares_steps:
            found.step_similarity = _compare_steps(policy, inputs, inputs.dense)
    return found


def sweep_settings(bundle: Candidate) -> dict[int, InferenceSettings]:
    """The bundle's settings by number of kept tokens, its own number among them, ascending; all tokens last.

    A method that drops no tokens gives way to EfficientVLA's with its defaults. Nothing where the decoder is too short
    for tokens to leave.
    """
    visual, tokens = bundle.config.num_visual_tokens, bundle.settings.visual_tokens
    if tokens.method not in ("evla", "fastv", "random"):
        tokens = VisualTokenSettings()
    if tokens.prune_layer >= bundle.checkpoint.num_layers:
        return {}
    counts = {-(-visual * part // _SWEEP) for part in range(1, 1 + _SWEEP)} | {tokens.num_keep or visual}
    least = tokens.num_key if tokens.method == "evla" else 1
    return {
        count: replace(bundle.settings, visual_tokens=replace(tokens, num_keep=count))
        for count in sorted(counts)
        if count >= least
    }


def _load(candidate: Candidate, inputs: Inputs) -> Policy:
    dtype = None if inputs.request.dtype is None else getattr(torch, inputs.request.dtype)
    return policy_from_checkpoint(candidate.path, candidate.settings, device=inputs.request.device, dtype=dtype)


@torch.inference_mode()
def _look(policy: Policy, inputs: Inputs, index: int) -> tuple[Tensor, TokenSelection | None]:
    """A sample's cognition token, and the tokens that were kept for it: alone, as an episode's first frame, but for a
    method that remembers frames, which has seen those of its episode that stand before it."""
    policy.reset()
    sample, before = inputs.samples[index], []
    if policy.settings.visual_tokens.remembers_frames:
        before = [each for each in inputs.samples[:index] if each.episode == sample.episode]
    for frame in (*before, sample):
        prepared = policy.prepare([frame.image], [frame.instruction])
        cognition, selection = policy.think(prepared, policy.see(prepared))
    return cognition, selection if isinstance(selection, TokenSelection) else None


def _predict(policy: Policy, cognition: Tensor, inputs: Inputs, other: int) -> Predictions:
    return predict_from(policy, cognition, unnorm_key=inputs.unnorm_key, seed=inputs.request.seed + other)


@torch.inference_mode()
def _compare_steps(policy: Policy, inputs: Inputs, candidate: Candidate) -> tuple[dict[str, Any], str, int]:
    # In the order of `analyze --figures`: noise is drawn sample by sample.
    samples = sort_samples([inputs.samples[number] for number in spread(inputs.samples)[:_SIMILARITY_SAMPLES]])
    tokens = cognition_tokens(policy, samples)
    return denoise_similarity(policy.model.action_head, tokens, inputs.request.seed), candidate.label, len(samples)


def _batch(inputs: Inputs) -> Batch:
    if not inputs.chosen:
        return make_batch(None, 1, inputs.request.seed)
    sample = inputs.samples[inputs.chosen[0]]
    return Batch([sample.image], [sample.instruction], inputs.request.seed)
