"""The decoder loop of VLA-Cache (arXiv 2502.02175): what did not change since the frame before is not computed anew.

Letters used here: B batch, T positions, V visual tokens, D hidden size, N key-value heads, C head width, L layers,
R prompt positions. The sequence is [BOS] [V visual] [prompt].
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaModel

from evla_cli.methods.frame_reuse import TokenReuse, attention_entropy, patch_similarity, plan_reuse
from evla_cli.methods.visual_tokens import attention_received, row_attention
from evla_cli.runtime.decoder import KeysValues, causal_mask, run_layer, take, visible
from evla_cli.settings import VisualTokenSettings


@dataclass(frozen=True)
class _Frame:
    """What one pass leaves for the next; `relevance` and `entropies` as in `plan_reuse`.

    Attributes:
        prompt: (B, 2, T'), token ids and their mask.
        pixels: (B, 3, S, S).
        keys_values: of every layer, (B, N, T, C) each.
    """

    prompt: Tensor
    pixels: Tensor
    keys_values: list[KeysValues]
    relevance: Tensor
    entropies: Tensor


class FrameCache:
    """Each row of a batch is a stream of its own: row i of a call follows row i of the call before.

    A row whose prompt changed starts anew; so do all when the batch's shape changes.
    """

    def __init__(self, settings: VisualTokenSettings):
        self.settings = settings
        self.frame: _Frame | None = None

    def reset(self) -> None:
        self.frame = None

    def run_decoder(
        self,
        decoder: LlamaModel,
        inputs_embeds: Tensor,
        mask: Tensor | None,
        context: Tensor,
        num_visual: int,
        prompt: Tensor,
        pixels: Tensor,
    ) -> tuple[Tensor, Tensor | None, TokenReuse]:
        """
        Args:
            inputs_embeds: (B, T, D).
            mask: (B, T), 1 for real positions; None where none is padding.
            context: (B, T - 1 - V), 1 for the prompt tokens after the image whose attention says what the task needs.
            prompt: (B, 2, T - V), token ids and their mask.
            pixels: (B, 3, S, S), in [0, 1].

        Returns: hidden states after the final norm of what was computed (B, T', D), their mask, and what was reused.
        """
        frame, self.frame = self.frame, None  # a pass that is interrupted leaves no half frame behind
        if frame is not None and frame.prompt.shape != prompt.shape:
            frame = None
        reuse = self._plan(frame, prompt, pixels, num_visual, len(decoder.layers))
        exits, counts = _computed(reuse, inputs_embeds.shape[1], num_visual)

        hidden_states = inputs_embeds
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).repeat(len(inputs_embeds), 1)
        rotary = full_rotary = decoder.rotary_emb(hidden_states, position_ids=positions[:1])
        attention_mask = causal_mask(positions, mask)
        slots = positions  # (B, T'), what is computed, as positions
        keys_values, attentions = [], []
        for index, layer in enumerate(decoder.layers):
            if index > 0 and counts[index] != counts[index - 1]:
                # Rows that compute fewer tokens than others repeat BOS in front.
                chosen = torch.where(exits > index, positions, 0).sort(dim=1).values
                chosen = chosen[:, -max(counts[index]) :].contiguous()
                hidden_states = take(hidden_states, torch.searchsorted(slots, chosen))
                slots = chosen
                rotary = (take(full_rotary[0], slots), take(full_rotary[1], slots))
                attention_mask = visible(slots, positions, mask)
            merge = partial(_merge, frame.keys_values[index], slots) if frame and slots is not positions else None
            hidden_states, queries, merged = run_layer(layer, hidden_states, rotary, attention_mask, merge)
            keys_values.append(merged)
            attentions.append(row_attention(queries[:, :, -context.shape[1] :], merged[0], mask))
        attention = torch.stack(attentions, dim=1)  # (B, L, R, T)
        relevance = attention_received(attention.mean(dim=1), context)[:, 1 : 1 + num_visual]
        self.frame = _Frame(prompt, pixels, keys_values, relevance, attention_entropy(attention, context))
        return decoder.norm(hidden_states), None if mask is None else mask.gather(1, slots), reuse

    def _plan(
        self, frame: _Frame | None, prompt: Tensor, pixels: Tensor, num_visual: int, num_layers: int
    ) -> TokenReuse:
        if frame is None:
            nowhere = torch.zeros(len(prompt), num_visual, dtype=torch.bool, device=prompt.device)
            return TokenReuse(torch.full_like(nowhere, num_layers, dtype=torch.long), nowhere, nowhere, num_layers)
        similarity = patch_similarity(pixels, frame.pixels, num_visual)
        same = (prompt == frame.prompt).flatten(1).all(dim=1, keepdim=True)
        return plan_reuse(similarity.masked_fill(~same, -1), frame.relevance, frame.entropies, self.settings)


def _merge(old: KeysValues, slots: Tensor, keys: Tensor, values: Tensor) -> KeysValues:
    """The old keys and values with the new ones at their places: (B, N, T', C) -> (B, N, T, C)."""
    index = slots[:, None, :, None].expand_as(keys)
    return old[0].scatter(2, index, keys), old[1].scatter(2, index, values)


def _computed(reuse: TokenReuse, length: int, num_visual: int) -> tuple[Tensor, list[list[int]]]:
    """(B, T), the layer from which on a position is not computed, and how many are in each layer and row."""
    exits = torch.full((len(reuse.exit_layers), length), reuse.num_layers, device=reuse.exit_layers.device)
    exits[:, 1 : 1 + num_visual] = reuse.exit_layers
    layers = torch.arange(reuse.num_layers, device=exits.device)
    return exits, (exits[None] > layers[:, None, None]).sum(dim=2).tolist()
