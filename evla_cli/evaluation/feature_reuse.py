"""What the action head's cache reuses against what it would have computed, block by block and step by step.

Letters used here: B batch, N samples, H action horizon, E head width.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evla_cli.evaluation.intervals import mean_estimate
from evla_cli.methods.action_cache import ModuleCache, cache_schedule
from evla_cli.runtime.actions import sample_actions
from evla_cli.runtime.policy import Policy
from evla_cli.settings import ActionCacheSettings


@dataclass(frozen=True)
class FeatureReuse:
    """
    Attributes:
        steps, blocks: where features are reused.
        cosine: "attention" or "mlp" -> (N, blocks, steps), of the reused output and the one computed from the same
            input, mean over tokens and both halves of guidance.
        relative_error: the same places, norm of their difference by the norm of the computed one.
    """

    steps: list[int]
    blocks: list[int]
    cosine: dict[str, np.ndarray]
    relative_error: dict[str, np.ndarray]

    def to_record(self, seed: int = 0) -> dict[str, Any]:
        """Means over samples with intervals: of every block and step, and over blocks or steps."""
        modules = {}
        for kind in self.cosine:
            modules[kind] = {
                name: {
                    "each": mean_estimate(values, seed).to_record(),
                    "by_step": mean_estimate(values.mean(axis=1), seed).to_record(),
                    "by_block": mean_estimate(values.mean(axis=2), seed).to_record(),
                }
                for name, values in (("cosine", self.cosine[kind]), ("relative_error", self.relative_error[kind]))
            }
        return {"steps": self.steps, "blocks": self.blocks, "modules": modules}


@torch.inference_mode()
def feature_reuse(policy: Policy, cognition: Tensor, noise: Tensor, batch_size: int = 8) -> FeatureReuse:
    """Of a policy that caches, along its own cached sampling.

    Args:
        cognition: (N, 1, D).
        noise: (N, H, A).
    """
    cosines: dict[str, list[np.ndarray]] = defaultdict(list)
    errors: dict[str, list[np.ndarray]] = defaultdict(list)
    caches: list[_WatchedCache] = []

    def make_cache(settings: ActionCacheSettings, num_steps: int, num_blocks: int) -> ModuleCache:
        blocks = range(num_blocks) if settings.blocks is None else settings.blocks
        caches.append(_WatchedCache(cache_schedule(num_steps, settings.interval), settings.modules, sorted(blocks)))
        return caches[-1]

    for start in range(0, len(noise), batch_size):
        part = slice(start, start + batch_size)
        sample_actions(
            policy.model.action_head,
            cognition[part],
            noise[part],
            policy.settings.diffusion,
            policy.settings.action_cache,
            torch.Generator().manual_seed(0),
            make_cache,
        )
        cache, count = caches[-1], len(noise[part])
        for kind in cache.modules:
            cosines[kind].append(cache.collected(cache.cosines, kind, count))
            errors[kind].append(cache.collected(cache.errors, kind, count))
    return FeatureReuse(
        steps=caches[0].reused_steps,
        blocks=list(caches[0].blocks),
        cosine={kind: np.concatenate(parts) for kind, parts in cosines.items()},
        relative_error={kind: np.concatenate(parts) for kind, parts in errors.items()},
    )


class _WatchedCache(ModuleCache):
    """Reuses what `ModuleCache` does, and computes it as well."""

    def __init__(self, schedule: Sequence[bool], modules: Collection[str], blocks: Collection[int]):
        super().__init__(schedule, modules, blocks)
        self.reused_steps = [step for step, computed in enumerate(schedule) if not computed]
        self.cosines: dict[tuple[str, int, int], Tensor] = {}  # of module, block, step: (B,)
        self.errors: dict[tuple[str, int, int], Tensor] = {}

    def collected(self, values: dict[tuple[str, int, int], Tensor], kind: str, count: int) -> np.ndarray:
        """(B or 2B,) at every place -> (B, blocks, steps)."""
        rows = [torch.stack([values[kind, block, step] for step in self.reused_steps]) for block in self.blocks]
        stacked = torch.stack(rows).unflatten(2, (-1, count)).mean(dim=2)  # (blocks, steps, B)
        return stacked.permute(2, 0, 1).double().cpu().numpy()

    def _output(self, step: int, block: int, kind: str, norm: Any, module: Any, tokens: Tensor) -> Tensor:
        output = super()._output(step, block, kind, norm, module, tokens)  # (B or 2B, 1 + H, E)
        if kind in self.modules and block in self.blocks and not self.schedule[step]:
            fresh, reused = module(norm(tokens)).float(), output.float()
            self.cosines[kind, block, step] = F.cosine_similarity(reused, fresh, dim=2).mean(dim=1)
            self.errors[kind, block, step] = (reused - fresh).norm(dim=(1, 2)) / fresh.norm(dim=(1, 2))
        return output
