"""Which visual tokens stay: the key ones, then half by task relevance, half by diversity.

EfficientVLA (arXiv 2506.10100), Eqs. 2-5. Letters used here: B batch, V visual tokens, K tokens kept, D feature width,
R context rows, T positions, N attention heads, C head width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evla_cli.errors import EvlaError


@dataclass(frozen=True)
class TokenSelection:
    """Indices into the visual tokens, by the reason for which each was kept: (B, K_key), (B, K_task), (B, K_div)."""

    key: Tensor
    task: Tensor
    diverse: Tensor

    @property
    def kept(self) -> Tensor:
        """All of them, ascending: (B, K)."""
        return torch.cat((self.key, self.task, self.diverse), dim=1).sort(dim=1).values


def select_tokens(
    scores: Tensor,
    features: Tensor,
    num_keep: int,
    num_key: int = 4,
    task_ratio: float = 0.5,
    diversity: str = "one_shot",
) -> TokenSelection:
    """Choose `num_keep` of V tokens; ties go to the lower index.

    Args:
        scores: (B, V), attention that a token receives (Eq. 2).
        features: (B, V, D), what distances are measured on: the decoder's visual input embeddings.

    Errors: scores that are all equal or not finite say nothing about the image.
    """
    low, high = scores.aminmax(dim=1)
    if not bool((high > low).all()) or not bool(high.isfinite().all() & low.isfinite().all()):
        raise EvlaError("The attention scores of the visual tokens are all equal or not finite; they cannot be ranked.")
    scores = (scores - low[:, None]) / (high - low)[:, None]  # Eq. 3; the order is what counts
    num_task = math.floor(task_ratio * (num_keep - num_key))
    num_diverse = num_keep - num_key - num_task
    order = scores.sort(dim=1, descending=True, stable=True).indices  # (B, V)
    key, task = order[:, :num_key], order[:, num_key : num_key + num_task]
    rest = order[:, num_key + num_task :].sort(dim=1).values
    directions = F.normalize(features.float(), dim=-1)
    if diversity == "greedy":
        return TokenSelection(key, task, _farthest_first(directions, torch.cat((key, task), dim=1), num_diverse))
    anchors = key if diversity == "one_shot" else torch.cat((key, task), dim=1)
    similarity = _gather(directions, rest) @ _gather(directions, anchors).transpose(1, 2)  # (B, rest, anchors)
    dissimilarity = 1 - similarity.max(dim=2).values  # Eq. 4
    farthest = dissimilarity.sort(dim=1, descending=True, stable=True).indices[:, :num_diverse]
    return TokenSelection(key, task, rest.gather(1, farthest))


def attention_received(
    queries: Tensor, keys: Tensor, context: Tensor, positions: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """How much attention each position receives from the context rows: mean over heads, sum over rows (Eq. 2).

    The paper's sum runs over what a visual token attends to. Under a causal mask, with the image before the text, that
    is 0 everywhere; here the text rows are the queries and the visual tokens the keys.

    Args:
        queries: (B, N, R, C), rotated, of the context rows alone.
        keys: (B, N, T, C), rotated, of all positions.
        context: (B, R), 1 where a row counts.
        positions: (R,), where in the sequence the rows stand.
        mask: (B, T), 1 for real positions; None where none is padding.

    Returns: (B, T).
    """
    logits = (queries @ keys.transpose(2, 3)).float() * scaling  # (B, N, R, T)
    visible = torch.arange(keys.shape[2], device=keys.device)[None, :] <= positions[:, None]  # (R, T)
    if mask is not None:
        visible = visible & mask[:, None, None, :].bool()
    attention = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1).mean(dim=1)  # (B, R, T)
    return (attention * context[:, :, None]).sum(dim=1)


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
