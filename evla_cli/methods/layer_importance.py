"""How much each decoder layer does: 1 - mean cosine of its input and output (EfficientVLA, arXiv 2506.10100, Eq. 1).

A decoder ends in a norm, to which the length of what leaves it is nothing. What leaves a vision tower is not normed:
there the length counts, too.

Letters used here: B batch, T positions, D hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def position_similarity(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Cosine of a layer's input and output at every position, in float32: two (B, T, D) -> (B, T)."""
    return F.cosine_similarity(inputs.float(), outputs.float(), dim=-1, eps=1e-12)


def position_likeness(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The cosine less what the lengths differ by, so that 1 - likeness = |out - in|^2 / (2 |in| |out|), in float32: two
    (B, T, D) -> (B, T). Where both are of the same length it is the cosine; it has no lower bound."""
    inputs, outputs = inputs.float(), outputs.float()
    before, after = (torch.linalg.vector_norm(states, dim=-1).clamp_min(1e-12) for states in (inputs, outputs))
    return position_similarity(inputs, outputs) + 1 - (before / after + after / before) / 2


def sample_similarity(similarity: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real positions of each sample: (B, T) and its mask, or how often each counts -> (B,), float64."""
    if mask is None:
        return similarity.double().mean(dim=1)
    real = mask.double()
    return (similarity.double() * real).sum(dim=1) / real.sum(dim=1)


def importance_and_error(similarities: Sequence[float]) -> tuple[float, float | None]:
    """1 - mean over samples, and the standard error of that mean (None for a single sample)."""
    count = len(similarities)
    mean = math.fsum(similarities) / count
    if count < 2:
        return 1.0 - mean, None
    variance = math.fsum((value - mean) ** 2 for value in similarities) / (count - 1)
    return 1.0 - mean, math.sqrt(variance / count)


def run_layer(layer: torch.nn.Module, hidden_states: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One batch through one layer: the similarity of input and output at every position (B, T), and the output.

    Args:
        hidden_states: (B, T, D).
        arguments: of the layer's forward, besides.
    """
    output = layer(hidden_states, **arguments)
    return position_similarity(hidden_states, output), output


def real_positions(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T), bool, on the hidden states' device."""
    shape, device = hidden_states.shape[:2], hidden_states.device
    return torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool().to(device)


def position_weights(modalities: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """How often each position counts, (B, T), float64: by its kind, once where `weights` does not name that."""
    return torch.stack([mask.double() * weights.get(kind, 1.0) for kind, mask in modalities.items()]).sum(dim=0)
