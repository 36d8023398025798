"""Sampling an action chunk from the cognition token: classifier-free guidance, DDIM or DDPM, block reuse.

Letters used here: B batch, H action horizon, A action dim, D language-model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from evla_cli.methods.action_cache import ModuleCache, StackCache, cache_schedule
from evla_cli.models.action_head import ActionHead
from evla_cli.models.diffusion import NoiseSchedule, sample_ddim, sample_ddpm
from evla_cli.settings import ActionCacheSettings, DiffusionSettings


def sample_actions(
    head: ActionHead,
    cognition: Tensor,
    noise: Tensor,
    diffusion: DiffusionSettings,
    cache_settings: ActionCacheSettings,
    generator: torch.Generator | None = None,
    make_cache: Callable[[ActionCacheSettings, int, int], StackCache | ModuleCache | None] | None = None,
) -> Tensor:
    """Denoise a chunk: (B, 1, D) and noise (B, H, A) -> normalised actions (B, H, A).

    Args:
        generator: feeds the noise that DDPM adds at every step.
        make_cache: another cache than the settings' own, from settings, number of steps and number of blocks.
    """
    weight = head.x_embedder.linear.weight
    schedule = NoiseSchedule.squared_cosine(head.config.num_train_steps)
    guided = diffusion.cfg_scale > 1.0
    condition = cognition.to(weight.dtype)
    if guided:  # rows [0, B) see the cognition token, rows [B, 2B) the null condition: one batch, one cache
        condition = torch.cat((condition, head.null_condition(len(condition))))
    embedded = head.z_embedder(condition)  # (B or 2B, 1, E), the same at every step
    num_steps = diffusion.num_denoise_steps if diffusion.sampler == "ddim" else len(schedule.alphas_cumprod)
    cache = (make_cache or _make_cache)(cache_settings, num_steps, len(head.blocks))

    def predict_noise(noisy: Tensor, timestep: int, step: int) -> Tensor:
        batch = torch.cat((noisy, noisy)) if guided else noisy
        time = head.t_embedder(torch.full((len(batch),), timestep, device=batch.device))
        predicted = head.denoise(batch, time.unsqueeze(1) + embedded, cache.at(step) if cache else None)
        if not guided:
            return predicted
        conditional, unconditional = predicted.chunk(2)
        return unconditional + diffusion.cfg_scale * (conditional - unconditional)

    noise = noise.to(weight)
    if diffusion.sampler == "ddpm":
        return sample_ddpm(predict_noise, noise, generator, schedule)
    return sample_ddim(predict_noise, noise, num_steps, schedule)


def _make_cache(settings: ActionCacheSettings, num_steps: int, num_blocks: int) -> StackCache | ModuleCache | None:
    """A fresh cache: it lives for one call, so nothing leaks into the next chunk, episode or step count."""
    if settings.interval == 1:
        return None
    schedule = cache_schedule(num_steps, settings.interval)
    if settings.whole_stack:
        return StackCache(schedule)
    blocks = settings.blocks if settings.blocks is not None else range(num_blocks)
    return ModuleCache(schedule, settings.modules, blocks)
