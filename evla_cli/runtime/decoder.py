"""The decoder loop with visual-token pruning, over transformers' own layers: no fork, no patch, no generate.

Letters used here: B batch, T positions, V visual tokens, D hidden size. The sequence is [BOS] [V visual] [prompt].
"""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaModel, apply_rotary_pos_emb, repeat_kv

from evla_cli.methods.visual_tokens import TokenSelection, attention_received, select_tokens
from evla_cli.settings import VisualTokenSettings

Rotary = tuple[Tensor, Tensor]  # cosines and sines, (1 or B, T, head width)


def run_decoder(
    decoder: LlamaModel,
    inputs_embeds: Tensor,
    mask: Tensor | None,
    context: Tensor,
    num_visual: int,
    settings: VisualTokenSettings,
) -> tuple[Tensor, Tensor | None, TokenSelection | None]:
    """
    Args:
        inputs_embeds: (B, T, D).
        mask: (B, T), 1 for real positions; None where none is padding.
        context: (B, T - 1 - V), 1 for the prompt tokens after the image whose attention scores the visual tokens.

    Returns: hidden states after the final norm (B, T', D), their mask, and what was selected (None if all was kept).
    """
    selection = None
    hidden_states = inputs_embeds
    positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
    rotary = decoder.rotary_emb(hidden_states, position_ids=positions)
    attention_mask = _causal_mask(decoder, hidden_states, mask)
    prunes = settings.num_keep is not None and settings.num_keep < num_visual
    for index, layer in enumerate(decoder.layers):
        if prunes and index == settings.prune_layer - 1:
            scores = _visual_scores(layer, hidden_states, rotary, mask, context, num_visual)
        if prunes and index == settings.prune_layer:
            selection = select_tokens(
                scores,
                inputs_embeds[:, 1 : 1 + num_visual],
                settings.num_keep or num_visual,
                settings.num_key,
                settings.task_ratio,
                settings.diversity,
            )
            keep = _positions_to_keep(selection.kept, num_visual, hidden_states.shape[1])  # (B, T')
            hidden_states = _take(hidden_states, keep)
            # Kept tokens keep their positions. The mask is built without them: given positions with gaps, transformers
            # takes each gap for the border between two packed sequences.
            rotary = (_take(rotary[0], keep), _take(rotary[1], keep))
            mask = None if mask is None else mask.gather(1, keep)
            attention_mask = _causal_mask(decoder, hidden_states, mask)
        hidden_states = layer(hidden_states, attention_mask=attention_mask, position_embeddings=rotary)
    return decoder.norm(hidden_states), mask, selection


def _visual_scores(
    layer: Any,
    hidden_states: Tensor,
    rotary: Rotary,
    mask: Tensor | None,
    context: Tensor,
    num_visual: int,
) -> Tensor:
    """(B, V): attention from the prompt rows to the visual tokens; one extra query-key product."""
    attention = layer.self_attn
    first_row = 1 + num_visual
    normed = layer.input_layernorm(hidden_states)
    queries = _heads(attention.q_proj(normed[:, first_row:]), attention.head_dim)
    keys = _heads(attention.k_proj(normed), attention.head_dim)
    cos, sin = rotary
    queries, _ = apply_rotary_pos_emb(queries, queries, cos[:, first_row:], sin[:, first_row:])
    keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    keys = repeat_kv(keys, attention.num_key_value_groups)
    positions = torch.arange(first_row, hidden_states.shape[1], device=hidden_states.device)
    received = attention_received(queries, keys, context, positions, attention.scaling, mask)
    return received[:, 1:first_row]


def _positions_to_keep(kept: Tensor, num_visual: int, length: int) -> Tensor:
    """BOS, the kept visual tokens and the prompt, as positions: (B, K) -> (B, T')."""
    batch = kept.shape[0]
    bos = kept.new_zeros(batch, 1)
    prompt = torch.arange(1 + num_visual, length, device=kept.device).expand(batch, -1)
    return torch.cat((bos, 1 + kept, prompt), dim=1)


def _take(values: Tensor, positions: Tensor) -> Tensor:
    """(1 or B, T, D) at (B, T') -> (B, T', D)."""
    values = values.expand(positions.shape[0], -1, -1)
    return values.gather(1, positions[:, :, None].expand(-1, -1, values.shape[2]))


def _heads(values: Tensor, head_dim: int) -> Tensor:
    """(B, T, N * C) -> (B, N, T, C)."""
    return values.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _causal_mask(decoder: LlamaModel, hidden_states: Tensor, mask: Tensor | None) -> Any:
    return create_causal_mask(
        config=decoder.config,
        inputs_embeds=hidden_states,
        attention_mask=mask,
        past_key_values=None,
        position_ids=None,
    )
