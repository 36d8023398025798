"""Which visual tokens a decoder takes over from the frame before, and from which layer on (VLA-Cache).

Xu et al., "VLA-Cache", arXiv 2502.02175, section 3. Letters used here: B batch, V visual tokens, L decoder layers,
R context rows, T positions, S image size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evla_cli.settings import VisualTokenSettings


@dataclass(frozen=True)
class TokenReuse:
    """
    Attributes:
        exit_layers: (B, V), the first layer in which a token's keys and values are the previous frame's; L for never.
        static: (B, V), true where the picture has not changed.
        task: (B, V), true where a static token is computed all the same, since the task depends on it.
        num_layers: L.
    """

    exit_layers: Tensor
    static: Tensor
    task: Tensor
    num_layers: int

    @property
    def reused(self) -> list[float]:
        """Visual tokens taken over in each layer, mean over the batch."""
        layers = torch.arange(self.num_layers, device=self.exit_layers.device)
        return (self.exit_layers[:, None] <= layers[None, :, None]).sum(dim=2).double().mean(dim=0).tolist()

    @property
    def share(self) -> float:
        """The part of all visual tokens of all layers that was taken over."""
        return sum(self.reused) / (self.num_layers * self.exit_layers.shape[1])


def plan_reuse(similarity: Tensor, relevance: Tensor, entropies: Tensor, settings: VisualTokenSettings) -> TokenReuse:
    """
    Static tokens, but for those that the task depends on, leave the computation layer by layer, the least attended
    first. What has left cannot return: its hidden state is not known any more. So where the paper's share falls from
    one layer to the next, here it stays.

    Args:
        similarity: (B, V), cosines of the patches' pixels in this frame and the one before; -1 forbids reuse.
        relevance: (B, V), attention that the tokens received from the prompt in the frame before.
        entropies: (B, L), of the prompt's attention in the frame before.
    """
    num_visual = similarity.shape[1]
    static = similarity >= settings.similarity_threshold
    if settings.num_static is not None:
        static &= _rank(similarity, descending=True) < settings.num_static
    num_task = num_visual // 2 if settings.num_task is None else settings.num_task
    task = static & (_rank(relevance, descending=True) < num_task)
    reusable = static & ~task
    queue = _rank(relevance.masked_fill(~reusable, torch.inf))  # (B, V): who of the reusable ones leaves first
    counts = (reuse_shares(entropies, settings.entropy_scale) * reusable.sum(dim=1, keepdim=True)).floor()  # (B, L)
    exit_layers = (counts[:, :, None] <= queue[:, None, :]).sum(dim=1)  # (B, V)
    return TokenReuse(exit_layers, static, task, entropies.shape[1])


def reuse_shares(entropies: Tensor, scale: float) -> Tensor:
    """(B, L) -> (B, L), ascending in [0, 1]: the more attention has concentrated since the first layer, the larger.

    min(k * sum over j <= l of (E(j-1) - E(j)) / E(j-1), 1) in the paper; nothing is reused in layer 0.
    """
    before, after = entropies[:, :-1], entropies[:, 1:]
    drops = F.pad((before - after) / before.clamp(min=1e-9), (1, 0))
    return (scale * drops.cumsum(dim=1)).clamp(0, 1).cummax(dim=1).values


def attention_entropy(attention: Tensor, context: Tensor) -> Tensor:
    """Of every layer, mean over the context rows: (B, L, R, T) and (B, R), 1 where a row counts, -> (B, L)."""
    entropy = torch.special.entr(attention).sum(dim=3)  # (B, L, R)
    return (entropy * context[:, None]).sum(dim=2) / context.sum(dim=1, keepdim=True).clamp(min=1)


def patch_similarity(pixels: Tensor, previous: Tensor, num_visual: int) -> Tensor:
    """(B, 3, S, S) in [0, 1], twice -> (B, V): cosine of each patch's pixels in the two pictures."""
    size = pixels.shape[-1] // math.isqrt(num_visual)
    ours, theirs = (F.unfold(image.float(), size, stride=size) for image in (pixels, previous))  # (B, 3 * size^2, V)
    return F.cosine_similarity(ours, theirs, dim=1)


def _rank(values: Tensor, descending: bool = False) -> Tensor:
    """(B, V) -> (B, V): place of each value in its row's order; ties go to the lower index."""
    return values.sort(dim=1, descending=descending, stable=True).indices.argsort(dim=1)
