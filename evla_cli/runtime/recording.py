"""What the action head's modules put out at every denoising step: how much caching could reuse."""

from typing import Any

import torch
from torch import Tensor

from evla_cli.methods.action_cache import step_similarity
from evla_cli.models.action_head import ActionHead
from evla_cli.runtime.actions import sample_actions
from evla_cli.settings import ActionCacheSettings, DiffusionSettings


def denoise_similarity(head: ActionHead, cognition: Tensor, seed: int = 0) -> dict[str, Any]:
    """Cosine of each block's attention and MLP output between consecutive DDIM steps (the paper's figure 1c).

    Args:
        cognition: (B, 1, D), from calibration samples.
    """
    outputs: dict[tuple[str, int], list[Tensor]] = {}

    def recorder(kind: str, block: int) -> Any:
        return lambda _module, _inputs, output: outputs.setdefault((kind, block), []).append(output)

    handles = []
    blocks: Any = head.blocks
    for number, block in enumerate(blocks):
        handles.append(block.attn.register_forward_hook(recorder("attention", number)))
        handles.append(block.mlp.register_forward_hook(recorder("mlp", number)))
    noise = torch.randn(
        len(cognition),
        head.config.action_horizon,
        head.config.action_dim,
        generator=torch.Generator().manual_seed(seed),
    )
    settings = DiffusionSettings()
    try:
        sample_actions(head, cognition, noise, settings, ActionCacheSettings())
    finally:
        for handle in handles:
            handle.remove()
    similarity = {
        kind: [step_similarity(outputs[kind, number]) for number in range(len(head.blocks))]
        for kind in ("attention", "mlp")
    }
    return {"num_denoise_steps": settings.num_denoise_steps, "seed": seed, "step_similarity": similarity}
