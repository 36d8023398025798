"""The decoder loop with visual-token pruning, over transformers' own layers: no fork, no patch, no generate.

Letters used here: B batch, T positions, V visual tokens, D hidden size. The sequence is [BOS] [V visual] [prompt].
"""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaModel, apply_rotary_pos_emb, repeat_kv

from evla_cli.methods.visual_tokens import TokenSelection, attention_received, row_attention, select_tokens
from evla_cli.settings import VisualTokenSettings

Rotary = tuple[Tensor, Tensor]  # cosines and sines, (1 or B, T, head width)


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
    attention_mask = causal_mask(decoder, hidden_states, mask)
    prunes = settings.num_keep is not None and settings.num_keep < num_visual
    for index, layer in enumerate(decoder.layers):
        if prunes and scores is not None and index == settings.prune_layer:
            selection = select_tokens(scores, inputs_embeds[:, 1 : 1 + num_visual], settings)
            keep = _positions_to_keep(selection.kept, num_visual, hidden_states.shape[1])  # (B, T')
            hidden_states = take(hidden_states, keep)
            # Kept tokens keep their positions. The mask is built without them: given positions with gaps, transformers
            # takes each gap for the border between two packed sequences.
            rotary = (take(rotary[0], keep), take(rotary[1], keep))
            mask = None if mask is None else mask.gather(1, keep)
            attention_mask = causal_mask(decoder, hidden_states, mask)
        scoring = prunes and scores is None and index == settings.prune_layer - 1
        seen = _Keys() if scoring else None
        prompt = hidden_states[:, 1 + num_visual :]
        hidden_states = layer(
            hidden_states, attention_mask=attention_mask, position_embeddings=rotary, past_key_values=seen
        )
        if seen is not None:
            attention = prompt_attention(layer, prompt, rotary, seen.keys, mask)
            scores = attention_received(attention, context)[:, 1 : 1 + num_visual]
    return decoder.norm(hidden_states), mask, selection


def prompt_attention(layer: Any, prompt: Tensor, rotary: Rotary, keys: Tensor, mask: Tensor | None) -> Tensor:
    """(B, R, T): attention of the last R positions, mean over heads. Costs their queries and one product.

    Args:
        prompt: (B, R, D), their hidden states as they enter the layer.
        rotary: of all T positions.
        keys: (B, key-value heads, T, C), of all T positions, rotated.
        mask: (B, T), 1 for real positions; None where none is padding.
    """
    attention, first_row = layer.self_attn, keys.shape[2] - prompt.shape[1]
    queries = _heads(attention.q_proj(layer.input_layernorm(prompt)), attention.head_dim)
    queries = _rotate(queries, (rotary[0][:, first_row:], rotary[1][:, first_row:]))
    keys = repeat_kv(keys, attention.num_key_value_groups)
    positions = torch.arange(first_row, keys.shape[2], device=keys.device)
    return row_attention(queries, keys, positions, attention.scaling, mask)


class _Keys:
    """Stands in for transformers' key-value cache in one layer: sees its keys, (B, key-value heads, T, C), rotated."""

    keys: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        self.keys = keys
        return keys, values


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


def _heads(values: Tensor, head_dim: int) -> Tensor:
    """(B, T, N * C) -> (B, N, T, C)."""
    return values.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(values: Tensor, rotary: Rotary) -> Tensor:
    """(B, N, T, C), at the positions that `rotary` is of."""
    return apply_rotary_pos_emb(values, values, *rotary)[0]


def causal_mask(decoder: LlamaModel, hidden_states: Tensor, mask: Tensor | None) -> Any:
    return create_causal_mask(
        config=decoder.config,
        inputs_embeds=hidden_states,
        attention_mask=mask,
        past_key_values=None,
        position_ids=None,
    )
