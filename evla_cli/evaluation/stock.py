"""The stock baseline: the same weights as somebody would run them who has transformers and CogACT's paper, not evla.

An independent path, sharing only preprocessing with the runtime. What it does that the runtime's neutral path does not:
- layers are `nn.Linear` in the VLM's dtype, whether or not the processor can multiply in it; the head's in float32;
- both vision towers run to their end, for the hidden states of their second-to-last block;
- the language model is called as a `LlamaForCausalLM`: with key-value cache, every layer's hidden states, and lm_head
  over all positions, for the last hidden state of one;
- at every denoising step the action head embeds time and condition anew and computes every block, its attention as
  two products and a softmax. Both halves of classifier-free guidance are one batch, as in CogACT's own code.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evla_cli.errors import EvlaError
from evla_cli.methods.visual_tokens import TokenSelection
from evla_cli.models.action_head import ActionHead, DiTBlock
from evla_cli.models.cogact import CogACTForActionPrediction
from evla_cli.models.diffusion import NoiseSchedule, sample_ddim, sample_ddpm
from evla_cli.models.processing import CogACTInputs, CogACTProcessor
from evla_cli.models.skeleton import load_plain_model
from evla_cli.runtime.policy import Policy, open_acting
from evla_cli.settings import DiffusionSettings, InferenceSettings


def load_stock_policy(
    source: Path,
    diffusion: DiffusionSettings | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> "StockPolicy":
    """Of any checkpoint that acts, a pruned one included; of its settings, only how actions are sampled counts."""
    checkpoint = open_acting(source)
    model = load_plain_model(checkpoint.family, checkpoint.config, checkpoint.weights, source, dtype, device)
    assert isinstance(model, CogACTForActionPrediction)
    assert checkpoint.tokenizer_dir is not None
    processor = CogACTProcessor(model.config, checkpoint.tokenizer_dir)
    return StockPolicy(model, processor, InferenceSettings(diffusion=diffusion or DiffusionSettings()))


class StockPolicy(Policy):
    """Errors: settings that it would not obey, since evla's runtime alone does: which tokens stay, what is cached."""

    def __init__(
        self, model: CogACTForActionPrediction, processor: CogACTProcessor, settings: InferenceSettings, seed: int = 0
    ):
        if settings != InferenceSettings(diffusion=settings.diffusion):
            raise EvlaError("The stock policy keeps all visual tokens and caches nothing; give it diffusion alone.")
        super().__init__(model, processor, settings, seed)

    def see(self, inputs: CogACTInputs) -> Tensor:
        model = self.model
        dino = _second_to_last(model.dino, model.dino.encoder.layer, inputs.dino_pixels)
        siglip = _second_to_last(model.siglip, model.siglip.encoder.layers, inputs.siglip_pixels)
        patches = dino[:, 1 + model.config.dino_config.num_register_tokens :]  # without class and register tokens
        visual = model.projector(torch.cat((patches, siglip), dim=2))
        text = model.language_model.get_input_embeddings()(inputs.input_ids)
        return torch.cat((text[:, :1], visual, text[:, 1:]), dim=1)

    def think(self, inputs: CogACTInputs, inputs_embeds: Tensor) -> tuple[Tensor, TokenSelection | None]:
        batch, length = inputs_embeds.shape[:2]
        padded = 0 if inputs.attention_mask is None else (inputs.attention_mask == 0).sum(dim=1)
        last = torch.full((batch,), length - 1, device=inputs_embeds.device) - padded
        mask = (torch.arange(length, device=inputs_embeds.device) <= last[:, None]).long()
        outputs = self.model.language_model(
            inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=True, output_hidden_states=True
        )
        return outputs.hidden_states[-1][torch.arange(batch, device=last.device), last][:, None], None

    def act(self, cognition: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
        head, diffusion = self.model.action_head, self.settings.diffusion
        cognition = cognition.to(head.positional_embedding)  # float32 behind a language model in bfloat16
        guided = diffusion.cfg_scale > 1.0

        def predict_noise(noisy: Tensor, timestep: int, step: int) -> Tensor:
            condition = torch.cat((cognition, head.null_condition(len(cognition)))) if guided else cognition
            batch = torch.cat((noisy, noisy)) if guided else noisy
            times = torch.full((len(batch),), timestep, device=batch.device)
            predicted = _denoise(head, batch, times, condition)
            if not guided:
                return predicted
            conditional, unconditional = predicted.chunk(2)
            return unconditional + diffusion.cfg_scale * (conditional - unconditional)

        schedule = NoiseSchedule.squared_cosine(head.config.num_train_steps)
        noise = noise.to(cognition)
        if diffusion.sampler == "ddpm":
            return sample_ddpm(predict_noise, noise, generator or self._generator, schedule)
        return sample_ddim(predict_noise, noise, diffusion.num_denoise_steps, schedule)


def _second_to_last(tower: Any, blocks: Any, pixels: Tensor) -> Tensor:
    """The output of a tower's second-to-last block, (B, T, D): not every version hands it out when asked for it."""
    seen: list[Tensor] = []
    handle = blocks[-2].register_forward_hook(lambda _block, _inputs, output: seen.append(output))
    try:
        tower(pixels)
    finally:
        handle.remove()
    return seen[0]


def _denoise(head: ActionHead, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
    """(B, H, A), (B,), (B, 1, D) -> the predicted noise (B, H, A)."""
    context = head.t_embedder(times)[:, None] + head.z_embedder(condition)
    tokens = torch.cat((context, head.x_embedder(noisy)), dim=1) + head.positional_embedding
    for block in head.blocks:
        assert isinstance(block, DiTBlock)
        tokens = tokens + _attention(block, block.norm1(tokens))
        hidden = F.gelu(block.mlp.fc1(block.norm2(tokens)), approximate="tanh")
        tokens = tokens + block.mlp.fc2(hidden)
    return head.final_layer(tokens)[:, 1:]


def _attention(block: DiTBlock, tokens: Tensor) -> Tensor:
    heads = block.attn.num_heads
    query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in block.attn.qkv(tokens).chunk(3, 2))
    weights = (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(dim=3)  # (B, heads, 1 + H, 1 + H)
    return block.attn.proj((weights @ value).transpose(1, 2).flatten(2))
