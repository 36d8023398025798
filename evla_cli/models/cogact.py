"""CogACT as a transformers model: two vision towers, a projector, a Llama decoder and a diffusion action head.

Letters used here: B batch, V visual tokens, T prompt tokens, D language-model width, H action horizon, A action dim.

Everything comes from transformers' own classes but the projector and the action head. What is peculiar to CogACT:
- the features of each tower are the output of its second-to-last block, without the final norm, without class and
  register tokens; the two towers are joined along the channels;
- the sequence is [BOS] [V visual tokens] [rest of the prompt], and the last prompt token's hidden state after the
  final norm, the cognition token, is all that the action head sees;
- SigLIP's MLP uses the exact GELU, since CogACT builds the tower with timm 0.9.10 (Hugging Face's SigLIP default is
  the tanh approximation).

Reference: Li et al., "CogACT", arXiv 2411.19650.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from evla_cli.models.action_head import ActionHead, ActionHeadConfig


class DinoConfig(Dinov2WithRegistersConfig):
    """With MLPs of any width; without one, `mlp_ratio` times the tower's."""

    intermediate_size: Any = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size * self.mlp_ratio
        super().__post_init__(**kwargs)


class SiglipConfig(SiglipVisionConfig):
    vision_use_head: bool = True  # before transformers 5.23 nothing declares it


class CogACTConfig(PreTrainedConfig):
    """Nested configs of the four parts, and what un-normalises the actions.

    Attributes:
        prompt_suffix_ids: the two token ids that end every prompt, the last one being the cognition token's; None takes
            CogACT's own, 29871 and 2, where the vocabulary has them, else the tokenizer's "▁" and "</s>".
        projector_hidden_size: None is four times the joined vision width, as published.
        norm_stats: `{dataset: {"action": {"q01": [A], "q99": [A], "mask": [A]}}}`, in the units of the robot.
    """

    model_type = "cogact"
    sub_configs = {
        "dino_config": DinoConfig,
        "siglip_config": SiglipConfig,
        "text_config": LlamaConfig,
        "action_config": ActionHeadConfig,
    }

    dino_config: Any = None
    siglip_config: Any = None
    text_config: Any = None
    action_config: Any = None
    norm_stats: Any = None
    projector_hidden_size: Any = None
    prompt_suffix_ids: Any = None

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                setattr(self, name, config_class(**{k: v for k, v in (value or {}).items() if k != "model_type"}))
        if self.projector_hidden_size is None:
            self.projector_hidden_size = 4 * (self.dino_config.hidden_size + self.siglip_config.hidden_size)
        super().__post_init__(**kwargs)

    @property
    def num_visual_tokens(self) -> int:
        return (self.dino_config.image_size // self.dino_config.patch_size) ** 2

    @property
    def num_dino_prefix_tokens(self) -> int:
        return 1 + self.dino_config.num_register_tokens


class CogACTForActionPrediction(PreTrainedModel):
    config_class = CogACTConfig
    base_model_prefix = "cogact"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer", "Dinov2WithRegistersLayer", "SiglipEncoderLayer", "DiTBlock"]

    def __init__(self, config: CogACTConfig):
        super().__init__(config)
        vision_width = config.dino_config.hidden_size + config.siglip_config.hidden_size
        self.config: CogACTConfig
        self.dino = Dinov2WithRegistersModel(config.dino_config)
        if not hasattr(self.dino.encoder.layer[0].attention, "q_proj"):  # before transformers 5.18
            for block in self.dino.encoder.layer:
                block.attention = DinoAttention(config.dino_config)
        hidden_size, width = config.dino_config.hidden_size, config.dino_config.intermediate_size
        if width != hidden_size * config.dino_config.mlp_ratio:  # transformers knows whole ratios alone
            for block in self.dino.encoder.layer:
                mlp: Any = block.mlp
                mlp.fc1, mlp.fc2 = nn.Linear(hidden_size, width), nn.Linear(width, hidden_size)
        siglip = SiglipVisionModel(config.siglip_config)
        self.siglip = getattr(siglip, "vision_model", siglip)  # before transformers 5.6
        self.projector = Projector(vision_width, config.projector_hidden_size, config.text_config.hidden_size)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.action_head = ActionHead(config.action_config)
        self.post_init()
        # Whatever a config asks for: the runtime makes its masks for it (`runtime.decoder.causal_mask`).
        self.language_model.set_attn_implementation("sdpa")

    def forward(
        self,
        input_ids: Tensor,
        dino_pixels: Tensor,
        siglip_pixels: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The cognition token, (B, 1, D).

        Args:
            input_ids: (B, T), from BOS to the cognition token; shorter prompts are padded on the right.
            dino_pixels, siglip_pixels: (B, 3, image_size, image_size), each normalised for its tower.
            attention_mask: (B, T), 1 for real tokens; None means that none is padding.
        """
        hidden_states = self.embed_inputs(input_ids, dino_pixels, siglip_pixels)
        mask = self.expand_mask(attention_mask, input_ids)
        hidden_states = self.language_model.model(
            inputs_embeds=hidden_states, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return cognition_token(hidden_states, mask)

    def embed_inputs(self, input_ids: Tensor, dino_pixels: Tensor, siglip_pixels: Tensor) -> Tensor:
        """(B, V + T, D): the decoder's input, [BOS] [V visual tokens] [rest of the prompt]."""
        visual = self.projector(self.vision_features(dino_pixels, siglip_pixels))  # (B, V, D)
        text = self.language_model.model.embed_tokens(input_ids)  # (B, T, D)
        return torch.cat((text[:, :1], visual.to(text.dtype), text[:, 1:]), dim=1)

    def vision_features(self, dino_pixels: Tensor, siglip_pixels: Tensor) -> Tensor:
        """(B, V, D_dino + D_siglip). The last block of each tower and its final norm are never run."""
        return torch.cat((self.dino_features(dino_pixels), self.siglip_features(siglip_pixels)), dim=2)

    def dino_features(self, pixels: Tensor) -> Tensor:
        hidden_states = self.dino.embeddings(pixels)  # (B, 1 + registers + V, D_dino)
        for block in self.dino.encoder.layer[:-1]:
            hidden_states = block(hidden_states)
        return hidden_states[:, self.config.num_dino_prefix_tokens :]

    def siglip_features(self, pixels: Tensor) -> Tensor:
        hidden_states = self.siglip.embeddings(pixels)  # (B, V, D_siglip)
        for block in self.siglip.encoder.layers[:-1]:
            hidden_states = block(hidden_states, attention_mask=None)
        return hidden_states

    def expand_mask(self, attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
        """(B, T) -> (B, V + T): visual tokens are always real. None stays None."""
        if attention_mask is None:
            return None
        visual = attention_mask.new_ones(input_ids.shape[0], self.config.num_visual_tokens)
        return torch.cat((attention_mask[:, :1], visual, attention_mask[:, 1:]), dim=1)


def cognition_token(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T, D) -> (B, 1, D): the last real position, which padding on the right may follow."""
    if attention_mask is None:
        return hidden_states[:, -1:]
    last = attention_mask.long().cumsum(dim=1).argmax(dim=1)  # (B,)
    return hidden_states[torch.arange(len(last), device=last.device), last].unsqueeze(1)


class DinoAttention(nn.Module):
    """What transformers computes, under its present names: those of a bundle's weights are the same in all versions."""

    def __init__(self, config: DinoConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        queries, keys, values = (
            project(hidden_states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Projector(nn.Module):
    """Vision width to language-model width: the "fused GELU MLP" of Prismatic VLMs (arXiv 2402.07865)."""

    def __init__(self, vision_width: int, hidden_size: int, text_width: int):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(vision_width, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, text_width),
            nn.GELU(),
            nn.Linear(text_width, text_width),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.projector(features)
