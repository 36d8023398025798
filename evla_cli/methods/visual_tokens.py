"""Which visual tokens stay, by EfficientVLA (arXiv 2506.10100), FastV (arXiv 2403.06764) or at random.

Letters used here: B batch, V visual tokens, K tokens kept, D feature width, R context rows, T positions, N attention
heads, C head width.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evla_cli.errors import EvlaError
from evla_cli.settings import VisualTokenSettings


@dataclass(frozen=True)
class TokenSelection:
    """Indices into the visual tokens by the reason for which they were kept, each (B, number of that reason).

    The reasons: "key", "task" and "diverse" (EfficientVLA), "attended" (FastV), "random".
    """

    reasons: dict[str, Tensor]

    @property
    def kept(self) -> Tensor:
        """All of them, ascending: (B, K)."""
        return torch.cat(tuple(self.reasons.values()), dim=1).sort(dim=1).values


def select_tokens(scores: Tensor, features: Tensor, settings: VisualTokenSettings) -> TokenSelection:
    """Choose `settings.num_keep` of V tokens by `settings.method`; ties go to the lower index.

    Args:
        scores: (B, V), the attention that a token receives, or what `random_scores` drew.
        features: (B, V, D), what distances are measured on: the decoder's visual input embeddings.

    Errors: scores that are all equal or not finite say nothing about the image.
    """
    low, high = scores.aminmax(dim=1)
    if not bool((high > low).all()) or not bool(high.isfinite().all() & low.isfinite().all()):
        raise EvlaError("The attention scores of the visual tokens are all equal or not finite; they cannot be ranked.")
    return SELECTORS[settings.method](scores, features, settings)


def select_efficient(scores: Tensor, features: Tensor, settings: VisualTokenSettings) -> TokenSelection:
    """The key tokens by score, then a share by score and the rest by distance (EfficientVLA, Eqs. 2-5)."""
    num_keep, num_key = settings.num_keep or scores.shape[1], settings.num_key
    low, high = scores.aminmax(dim=1, keepdim=True)
    scores = (scores - low) / (high - low)  # Eq. 3; the order is what counts
    num_task = math.floor(settings.task_ratio * (num_keep - num_key))
    num_diverse = num_keep - num_key - num_task
    order = scores.sort(dim=1, descending=True, stable=True).indices  # (B, V)
    key, task = order[:, :num_key], order[:, num_key : num_key + num_task]
    rest = order[:, num_key + num_task :].sort(dim=1).values
    directions = F.normalize(features.float(), dim=-1)
    if settings.diversity == "greedy":
        diverse = _farthest_first(directions, torch.cat((key, task), dim=1), num_diverse)
        return TokenSelection({"key": key, "task": task, "diverse": diverse})
    anchors = key if settings.diversity == "one_shot" else torch.cat((key, task), dim=1)
    similarity = _gather(directions, rest) @ _gather(directions, anchors).transpose(1, 2)  # (B, rest, anchors)
    dissimilarity = 1 - similarity.max(dim=2).values  # Eq. 4
    farthest = dissimilarity.sort(dim=1, descending=True, stable=True).indices[:, :num_diverse]
    return TokenSelection({"key": key, "task": task, "diverse": rest.gather(1, farthest)})


def select_attended(scores: Tensor, _features: Tensor, settings: VisualTokenSettings) -> TokenSelection:
    """The tokens of highest attention (FastV)."""
    return TokenSelection({"attended": _highest(scores, settings.num_keep)})


def select_random(scores: Tensor, _features: Tensor, settings: VisualTokenSettings) -> TokenSelection:
    """The tokens that drew the highest numbers: see `random_scores`."""
    return TokenSelection({"random": _highest(scores, settings.num_keep)})


SELECTORS: dict[str, Callable[[Tensor, Tensor, VisualTokenSettings], TokenSelection]] = {
    "evla": select_efficient,
    "fastv": select_attended,
    "random": select_random,
}


def random_scores(batch_size: int, num_visual: int, seed: int, episode: int, call: int) -> Tensor:
    """(B, V): the same numbers on every device and platform, and in a row whatever the other rows are."""
    draw = [random.Random(f"{seed}/{episode}/{call}/{row}").random for row in range(batch_size)]
    return torch.tensor([[number() for _ in range(num_visual)] for number in draw])


def attention_received(attention: Tensor, context: Tensor) -> Tensor:
    """How much attention each position receives from the context rows, summed over them (EfficientVLA, Eq. 2).

    The paper's sum runs over what a visual token attends to. Under a causal mask, with the image before the text, that
    is 0 everywhere; here the text rows are the queries and the visual tokens the keys.

    Args:
        attention: (B, R, T), see `row_attention`.
        context: (B, R), 1 where a row counts.

    Returns: (B, T).
    """
    return (attention * context[:, :, None]).sum(dim=1)


def row_attention(queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of the last R rows, mean over heads: (B, R, T). Costs one product.

    Args:
        queries: (B, N, R, C), rotated, of these rows alone.
        keys: (B, key-value heads, T, C), rotated, of all positions.
        mask: (B, T), 1 for real positions; None where none is padding.
    """
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = (queries @ keys.transpose(2, 3)).float() * queries.shape[3] ** -0.5  # (B, N, R, T)
    positions = torch.arange(keys.shape[2], device=keys.device)
    visible = positions[None, :] <= positions[-queries.shape[2] :, None]  # (R, T)
    if mask is not None:
        visible = visible & mask[:, None, None, :].bool()
    return logits.masked_fill(~visible, -torch.inf).softmax(dim=-1).mean(dim=1)


def _highest(scores: Tensor, count: int | None) -> Tensor:
    """(B, V) -> (B, K), best first."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _farthest_first(directions: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Greedy max-min: each next token is the one farthest from everything chosen so far."""
    similarity = directions @ _gather(directions, chosen).transpose(1, 2)  # (B, V, chosen)
    closest = similarity.max(dim=2).values.scatter(1, chosen, torch.inf)  # chosen ones are never taken again
    picks = []
    for _ in range(count):
        pick = closest.argmin(dim=1, keepdim=True)  # (B, 1)
        picks.append(pick)
        closest = torch.maximum(closest, (directions @ _gather(directions, pick).transpose(1, 2))[..., 0])
        closest = closest.scatter(1, pick, torch.inf)
    return torch.cat(picks, dim=1) if picks else chosen[:, :0]


def _gather(values: Tensor, indices: Tensor) -> Tensor:
    """(B, V, D) at (B, K) -> (B, K, D)."""
    return values.gather(1, indices[:, :, None].expand(-1, -1, values.shape[2]))
