"""Diffusion over action chunks: the noise schedule, DDIM and DDPM sampling.

Noise schedule "squaredcos_cap_v2" and fixed small variance: Nichol and Dhariwal, arXiv 2102.09672. DDPM: Ho et al.,
arXiv 2006.11239. DDIM: Song et al., arXiv 2010.02502. As in CogACT: 100 training steps, the network predicts the
noise, the predicted clean actions are not clipped. All schedule constants are float64 until they meet a tensor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evla_cli.errors import EvlaError

# predict_noise(noisy_actions (B, H, A), timestep, step index since the start of sampling) -> noise (B, H, A)
NoisePredictor = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class NoiseSchedule:
    """The fraction of signal left after each training step: `alphas_cumprod[t]`, float64, falling."""

    alphas_cumprod: tuple[float, ...]

    @classmethod
    def squared_cosine(cls, num_train_steps: int = 100, max_beta: float = 0.999) -> "NoiseSchedule":
        def signal(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        product, products = 1.0, []
        for step in range(num_train_steps):
            beta = min(1 - signal((step + 1) / num_train_steps) / signal(step / num_train_steps), max_beta)
            product *= 1.0 - beta
            products.append(product)
        return cls(tuple(products))

    def add_noise(self, actions: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Training: actions and noise (B, H, A), timesteps (B,) -> noisy actions (B, H, A)."""
        kept = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device=actions.device)[timesteps][:, None, None]
        return kept.sqrt().to(actions.dtype) * actions + (1 - kept).sqrt().to(actions.dtype) * noise


def ddim_timesteps(num_steps: int, num_train_steps: int = 100) -> list[int]:
    """The training steps visited, first to last: 10 of 100 gives 90, 80, ... 0.

    As in CogACT's respacing: the smallest stride that gives exactly `num_steps` steps from 0; one step is step 50.
    """
    if num_steps == 1:
        return [num_train_steps // 2]
    for stride in range(1, num_train_steps):
        steps = range(0, num_train_steps, stride)
        if len(steps) == num_steps:
            return list(reversed(steps))
    possible = sorted({len(range(0, num_train_steps, stride)) for stride in range(1, num_train_steps)} | {1})
    raise EvlaError(
        f"num_denoise_steps {num_steps} does not divide {num_train_steps} training steps with a whole stride; "
        f"possible: {', '.join(map(str, possible))}."
    )


def sample_ddim(
    predict_noise: NoisePredictor, noise: Tensor, num_steps: int, schedule: NoiseSchedule | None = None
) -> Tensor:
    """Deterministic sampling (eta 0): starting noise (B, H, A) -> normalised actions (B, H, A)."""
    schedule = schedule or NoiseSchedule.squared_cosine()
    timesteps = ddim_timesteps(num_steps, len(schedule.alphas_cumprod))
    sample = noise
    for index, timestep in enumerate(timesteps):
        kept = schedule.alphas_cumprod[timestep]
        kept_next = schedule.alphas_cumprod[timesteps[index + 1]] if index + 1 < num_steps else 1.0
        predicted = predict_noise(sample, timestep, index)
        clean = math.sqrt(1 / kept) * sample - math.sqrt(1 / kept - 1) * predicted
        sample = math.sqrt(kept_next) * clean + math.sqrt(1 - kept_next) * predicted
    return sample


def sample_ddpm(
    predict_noise: NoisePredictor,
    noise: Tensor,
    generator: torch.Generator | None = None,
    schedule: NoiseSchedule | None = None,
) -> Tensor:
    """Ancestral sampling over every training step with the small fixed variance: (B, H, A) -> (B, H, A)."""
    schedule = schedule or NoiseSchedule.squared_cosine()
    num_steps = len(schedule.alphas_cumprod)
    sample = noise
    for index, timestep in enumerate(reversed(range(num_steps))):
        kept = schedule.alphas_cumprod[timestep]
        kept_before = schedule.alphas_cumprod[timestep - 1] if timestep else 1.0
        beta = 1 - kept / kept_before
        predicted = predict_noise(sample, timestep, index)
        clean = math.sqrt(1 / kept) * sample - math.sqrt(1 / kept - 1) * predicted
        clean_weight = beta * math.sqrt(kept_before) / (1 - kept)
        sample_weight = (1 - kept_before) * math.sqrt(1 - beta) / (1 - kept)
        sample = clean_weight * clean + sample_weight * sample
        if timestep:
            fresh = torch.randn(noise.shape, generator=generator, dtype=torch.float32).to(noise)
            sample = sample + math.sqrt(beta * (1 - kept_before) / (1 - kept)) * fresh
    return sample
