"""Time per stage of a prediction, candidates interleaved so that a drift of the machine's speed hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evla_cli.runtime.policy import Policy

STAGES = ("vision", "language_model", "action_head")


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one prediction by stage, over all runs; `total` is the sum of a run's stages."""

    runs: dict[str, tuple[float, ...]]

    def median(self, stage: str) -> float:
        return statistics.median(self.runs[stage])

    def p95(self, stage: str) -> float:
        return sorted(self.runs[stage])[max(0, round(0.95 * len(self.runs[stage])) - 1)]


def measure_latency(
    policies: Mapping[str, Policy], image: Any, instruction: str, runs: int = 20, warmup: int = 3
) -> dict[str, Latency]:
    """One image and instruction at a time (batch 1, as on a robot), each candidate once a round.

    The image is always the same: under `vla_cache`, that is a camera before which nothing moves.
    """
    times: dict[str, dict[str, list[float]]] = {name: {stage: [] for stage in (*STAGES, "total")} for name in policies}
    for round_number in range(warmup + runs):
        for name, policy in policies.items():
            measured = _stage_times(policy, image, instruction)
            if round_number >= warmup:
                for stage, value in zip(STAGES, measured, strict=True):
                    times[name][stage].append(value)
                times[name]["total"].append(sum(measured))
    return {name: Latency({stage: tuple(values) for stage, values in t.items()}) for name, t in times.items()}


@torch.inference_mode()
def _stage_times(policy: Policy, image: Any, instruction: str) -> Sequence[float]:
    device = next(policy.model.parameters()).device
    inputs = policy.prepare([image], [instruction])
    noise = policy.draw_noise(1, torch.Generator().manual_seed(0))
    embeds, vision = _timed(lambda: policy.see(inputs), device)
    (cognition, _), language_model = _timed(lambda: policy.think(inputs, embeds), device)
    _, action_head = _timed(lambda: policy.act(cognition, noise), device)
    return vision, language_model, action_head


def _timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    _synchronize(device)
    start = time.perf_counter()
    result = function()
    _synchronize(device)
    return result, 1000 * (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
