"""The decoder loop with visual-token pruning, over transformers' own layers: no fork, no patch, no generate.

Letters used here: B batch, T positions, V visual tokens, D hidden size, N attention heads, C head width. The sequence
is [BOS] [V visual] [prompt].
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaModel

from evla_cli.methods.visual_tokens import TokenSelection, attention_received, row_attention, select_tokens
from evla_cli.settings import VisualTokenSettings

Rotary = tuple[Tensor, Tensor]  # cosines and sines, (1 or B, T, C)
KeysValues = tuple[Tensor, Tensor]


def run_decoder(
    decoder: LlamaModel,
    inputs_embeds: Tensor,
    mask: Tensor | None,
    context: Tensor,
    num_visual: int,
    settings: VisualTokenSettings,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, TokenSelection | None]:
    """
    Args:
        inputs_embeds: (B, T, D).
        mask: (B, T), 1 for real positions; None where none is padding.
        context: (B, T - 1 - V), 1 for the prompt tokens after the image whose attention scores the visual tokens.
        scores: (B, V), what the visual tokens are chosen by; None for that attention, in the layer before they leave.

    Returns: hidden states after the final norm (B, T', D), their mask, and what was selected (None if all was kept).
    """
    selection = None
    hidden_states = inputs_embeds
    positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
    rotary = decoder.rotary_emb(hidden_states, position_ids=positions)
    attention_mask = causal_mask(positions, mask)
    prunes = settings.num_keep is not None and settings.num_keep < num_visual
    for index, layer in enumerate(decoder.layers):
        if prunes and scores is not None and index == settings.prune_layer:
            selection = select_tokens(scores, inputs_embeds[:, 1 : 1 + num_visual], settings)
            keep = _positions_to_keep(selection.kept, num_visual, hidden_states.shape[1])  # (B, T')
            hidden_states = take(hidden_states, keep)
            rotary = (take(rotary[0], keep), take(rotary[1], keep))  # kept tokens keep their positions
            mask = None if mask is None else mask.gather(1, keep)
            attention_mask = causal_mask(positions[:, : keep.shape[1]], mask)
        if prunes and scores is None and index == settings.prune_layer - 1:
            hidden_states, queries, (keys, _) = run_layer(layer, hidden_states, rotary, attention_mask)
            attention = row_attention(queries[:, :, 1 + num_visual :], keys, mask)
            scores = attention_received(attention, context)[:, 1 : 1 + num_visual]
        else:
            hidden_states = layer(hidden_states, attention_mask=attention_mask, position_embeddings=rotary)
    return decoder.norm(hidden_states), mask, selection


def run_layer(
    layer: Any,
    hidden_states: Tensor,
    rotary: Rotary,
    attention_mask: Tensor | None,
    merge: Callable[[Tensor, Tensor], KeysValues] | None = None,
) -> tuple[Tensor, Tensor, KeysValues]:
    """One decoder layer over its own modules, with its queries, keys and values. Bit-equal to calling the layer.

    transformers hands out keys through its cache alone, whose calling convention changes between versions.

    Args:
        hidden_states: (B, T', D), of the positions that are computed.
        rotary: of these positions.
        attention_mask: see `visible`; None where each position sees itself and all before it.
        merge: given the keys and values of these positions, those of all T; None: these are all.

    Returns: hidden states (B, T', D), queries (B, N, T', C), and keys and values (B, key-value heads, T, C); queries
        and keys are rotated.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_states)
    queries, keys, values = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, heads, T', C)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    queries, keys = _rotate(queries, rotary), _rotate(keys, rotary)
    if merge is not None:
        keys, values = merge(keys, values)
    shares = queries.shape[1] // keys.shape[1]
    mixed = F.scaled_dot_product_attention(
        queries,
        keys.repeat_interleave(shares, dim=1),
        values.repeat_interleave(shares, dim=1),
        attn_mask=attention_mask,
        is_causal=attention_mask is None,
    )
    hidden_states = hidden_states + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states)), queries, (keys, values)


def _positions_to_keep(kept: Tensor, num_visual: int, length: int) -> Tensor:
    """BOS, the kept visual tokens and the prompt, as positions: (B, K) -> (B, T')."""
    batch = kept.shape[0]
    bos = kept.new_zeros(batch, 1)
    prompt = torch.arange(1 + num_visual, length, device=kept.device).expand(batch, -1)
    return torch.cat((bos, 1 + kept, prompt), dim=1)


def take(values: Tensor, positions: Tensor) -> Tensor:
    """(1 or B, T, D) at (B, T') -> (B, T', D)."""
    values = values.expand(positions.shape[0], -1, -1)
    return values.gather(1, positions[:, :, None].expand(-1, -1, values.shape[2]))


def causal_mask(positions: Tensor, mask: Tensor | None) -> Tensor | None:
    """As the layers want it: without padding, none, for then SDPA masks faster by itself."""
    return None if mask is None else visible(positions, positions, mask)


def visible(slots: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 1, T', T), true where a computed position, one of `slots`, sees one of all: the real ones up to itself."""
    seen = positions[:, None, None, :] <= slots[:, None, :, None]
    return seen if mask is None else seen & mask[:, None, None, :].bool()


def _rotate(values: Tensor, rotary: Rotary) -> Tensor:
    """(B, heads, T, C), at the positions that `rotary` is of: halves of a head turned against each other."""
    cosines, sines = (part[:, None] for part in rotary)
    first, second = values.chunk(2, dim=-1)
    return values * cosines + torch.cat((-second, first), dim=-1) * sines
