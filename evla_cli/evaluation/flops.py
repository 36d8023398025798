"""Floating-point operations of one prediction, from a model on the meta device and its inference settings.

Conventions, always named:
- "paper" (EfficientVLA, arXiv 2506.10100): two operations a weight of every linear layer a token it sees; attention
  products are not counted, the last block of each vision tower is, and there are 32 prompt tokens and no lm_head. It
  reproduces the paper's totals for CogACT-Base to 0.1 % and its percentages to 0.5 points.
- "full": what the runtime executes: attention products are counted, unused blocks are not, and what does not change
  from one denoising step to the next is computed once.
- "stock": the same for `evla_cli.evaluation.stock`: every block of both towers, SigLIP's pooling, and lm_head over all
  positions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from evla_cli.methods.action_cache import cache_schedule
from evla_cli.settings import InferenceSettings, VisualTokenSettings

PAPER_PROMPT_TOKENS = 32  # BOS and prompt; with 256 visual tokens the paper's 288


@dataclass(frozen=True)
class Flops:
    """Operations of one prediction of a single sample, by stage."""

    vision: float
    projector: float
    language_model: float
    action_head: float

    @property
    def total(self) -> float:
        return self.vision + self.projector + self.language_model + self.action_head

    def to_record(self) -> dict[str, float]:
        return asdict(self) | {"total": self.total}


def count_flops(
    model: Any,
    settings: InferenceSettings,
    num_prompt_tokens: int = PAPER_PROMPT_TOKENS,
    convention: str = "paper",
    reused: Sequence[float] = (),
) -> Flops:
    """
    Args:
        model: a CogACT, on any device, the meta device included.
        num_prompt_tokens: BOS and prompt, without the visual tokens.
        reused: under `vla_cache`, the visual tokens that each layer took over from the frame before, as measured
            (`TokenReuse.reused`); without it, the cost of an episode's first frame.
    """
    full, stock = convention != "paper", convention == "stock"
    language_model = _language_model(model, settings.visual_tokens, num_prompt_tokens, reused, full)
    if stock:
        length = num_prompt_tokens + model.config.num_visual_tokens
        language_model += _linear(model.language_model.lm_head) * length
    return Flops(
        _vision(model, full, skip_last=full and not stock) + (_pooling(model) if stock else 0),
        _linear(model.projector) * model.config.num_visual_tokens,
        language_model,
        _head(model, settings, full, embed_once=full and not stock),
    )


def _vision(model: Any, full: bool, skip_last: bool) -> float:
    config, visual = model.config, model.config.num_visual_tokens
    dino_blocks, siglip_blocks = list(model.dino.encoder.layer), list(model.siglip.encoder.layers)
    dino_tokens = 1 + config.dino_config.num_register_tokens + visual
    if skip_last:
        dino_blocks, siglip_blocks = dino_blocks[:-1], siglip_blocks[:-1]
    dino = sum(_linear(block) for block in dino_blocks) * dino_tokens
    siglip = sum(_linear(block) for block in siglip_blocks) * visual
    patches = _linear(model.dino.embeddings) + _linear(model.siglip.embeddings)
    operations = dino + siglip + patches * visual
    if full:
        operations += len(dino_blocks) * _attention(dino_tokens, dino_tokens, config.dino_config.hidden_size)
        operations += len(siglip_blocks) * _attention(visual, visual, config.siglip_config.hidden_size)
    return operations


def _pooling(model: Any) -> float:
    """SigLIP's attention pooling: one query over all patches, then an MLP. Its input projections are one parameter."""
    head, visual, width = model.siglip.head, model.config.num_visual_tokens, model.config.siglip_config.hidden_size
    return _linear(head) + 2.0 * width * width * (1 + 2 * visual) + 4.0 * visual * width


def _language_model(
    model: Any, tokens: VisualTokenSettings, num_prompt_tokens: int, reused: Sequence[float], full: bool
) -> float:
    visual, layers = model.config.num_visual_tokens, model.language_model.model.layers
    kept = visual if tokens.num_keep is None else tokens.num_keep
    operations = 0.0
    for index, layer in enumerate(layers):
        length = num_prompt_tokens + (visual if index < tokens.prune_layer else kept)
        computed = length - (reused[index] if reused else 0)
        operations += _linear(layer) * computed
        if full:
            width = layer.self_attn.q_proj.out_features
            operations += _attention(computed, length, width)
            # Scores: the products of the prompt's queries with the layer's own keys, once more.
            leaves = kept < visual and index == tokens.prune_layer - 1 and tokens.method != "random"
            if leaves or tokens.method == "vla_cache":
                rows = num_prompt_tokens - 1
                operations += 2 * rows * length * width
    return operations


def _head(model: Any, settings: InferenceSettings, full: bool, embed_once: bool) -> float:
    head, config, diffusion = model.action_head, model.config.action_config, settings.diffusion
    steps = config.num_train_steps if diffusion.sampler == "ddpm" else diffusion.num_denoise_steps
    rows = 2 if diffusion.cfg_scale > 1 else 1
    tokens = config.action_horizon + 1
    cache = settings.action_cache
    computed = sum(cache_schedule(steps, cache.interval))
    operations = 0.0
    for number, block in enumerate(head.blocks):
        reuses = cache.blocks is None or number in cache.blocks
        attention = _linear(block.attn) * tokens + (_attention(tokens, tokens, config.hidden_size) if full else 0)
        mlp = _linear(block.mlp) * tokens
        for kind, cost in (("attention", attention), ("mlp", mlp)):
            operations += cost * (computed if reuses and kind in cache.modules else steps)
    once_a_step = _linear(head.x_embedder) * config.action_horizon + _linear(head.final_layer) * tokens
    once_a_step += _linear(head.t_embedder)
    condition = _linear(head.z_embedder) * (1 if embed_once else steps)
    return rows * (operations + steps * once_a_step + condition)


def _linear(module: nn.Module) -> float:
    """Two operations a weight of the linear layers and patch embeddings inside, for one token."""
    return 2.0 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def _attention(rows: float, length: float, width: int) -> float:
    """Query-key and attention-value products of one layer."""
    return 4.0 * rows * length * width
